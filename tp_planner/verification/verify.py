"""Verify: try a model under a plan on processes of this machine, against one device, in float32 and in float64."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import torch.distributed as dist

from tp_planner.api import require_fit
from tp_planner.frontend.inputs import CallArguments, fake_inputs
from tp_planner.frontend.layout_map import read_layout_map
from tp_planner.frontend.optimizer import read_optimizer
from tp_planner.frontend.trace import require_built
from tp_planner.frontend.training_loss import TrainingLoss
from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import Layout
from tp_planner.ir.verdict import Difference, judge
from tp_planner.planner import make_plan
from tp_planner.readable_plan import Plan
from tp_planner.training.model import applied_to
from tp_planner.verification.comparison import compare, rounding_of
from tp_planner.verification.precision import narrowest
from tp_planner.verification.processes import run_forked
from tp_planner.verification.readable import Verdict
from tp_planner.verification.rehearsal import Rehearsal, Scout, Scouted, in_float64
from tp_planner.verification.values import random_inputs, random_targets
from tp_planner.verification.watching import Seen

SEED = 0
ROWS = 4  # of each replica, where a model leaves the batch open


def verify(
    model: keras.Model,
    layout_map_or_plan: Any,
    inputs: Any = None,
    targets: Any = None,
    loss: Any = None,
    optimizer: str | keras.optimizers.Optimizer | None = None,
    metrics: Any = None,
    steps: int = 1,
) -> Verdict:
    """Return whether ``model`` under a layout is the same function as on one device; needs no accelerator.

    Processes of this machine, forked from this one, are the ranks; another is the single device. All have the same
    random weights, call the model and train it for some steps. Every layer's output and the gradient at it, the loss,
    metrics, the gradient of every variable, and all values after each step are compared, in float32 and again in
    float64, in which rounding falls by about 1e8 and an error stays. The model is as before.

    Args:
        model: a built Keras model that is not parallelized, on CPUs or on the meta device. All its weights are held by
            each of the processes: build it small.
        layout_map_or_plan: a LayoutMap, or a plan that ``plan`` made for this model.
        inputs: the batch that all replicas divide, as arrays; or specs of it, of which arrays are drawn.
        targets: targets for the loss; drawn where they are not given.
        loss: as for ``Model.compile``. By default that of the model; without one a mean of the outputs with random
            weights.
        optimizer: by default the model's, or AdamW.
        metrics: as for ``Model.compile``. By default none.
        steps: how many training steps.

    Raises:
        PlanError: if the layout cannot be planned, or the inputs are unknown.
        ParallelRuntimeError: if a process fails, with its traceback.

    >>> print(tp_planner.verify(model, layout_map))  # doctest: +SKIP
    """
    require_built(model)
    if dist.is_initialized():
        raise PlanError(
            "this process is one of a job; call tp_planner.verify_step, or tp_planner.verify in a process alone"
        )
    if applied_to(model) is not None:
        raise PlanError(f"model {model.name!r} is parallelized; call tp_planner.restore(model) before verifying it")
    given, weights = _loss_of(model, loss)
    updating = read_optimizer(optimizer, model) or keras.optimizers.AdamW()
    training_loss = None if given is None else TrainingLoss(given, weights, getattr(model, "output_names", None))
    plan = _planned(model, layout_map_or_plan, inputs, updating, training_loss)
    data, wanted = _data(model, plan, inputs, targets, training_loss)
    rehearsal = Rehearsal(model, plan, data, wanted, given or weighted_mean, weights, metrics, updating, steps)
    dtype = narrowest(model)
    single, narrow, failure = _run(rehearsal)
    if failure:
        return Verdict(plan, dtype, judge(narrow, None, dtype), single.readers, single.owners, failure)
    exact, wide, failure = _run(in_float64(rehearsal))
    judged = judge(narrow, wide, dtype, rounding_of(single, exact))
    return Verdict(plan, dtype, judged, exact.readers, exact.owners, failure)


def weighted_mean(targets: Any, outputs: Any) -> Any:
    """Return the mean of the outputs, weighted by the targets: a loss whose gradient reaches every output."""
    return keras.ops.mean(targets * outputs, axis=-1)


def _run(rehearsal: Rehearsal) -> tuple[Seen, list[Difference], str]:
    """Return what one device saw, the differences from it, and what the first rank that failed has failed with."""
    single, *ranks = run_forked(1 + rehearsal.plan.mesh.size, rehearsal)
    failures = [f"rank {rank}: {seen.failure}" for rank, seen in enumerate(ranks) if seen.failure]
    return single, compare(single, ranks, rehearsal.plan), next(iter(failures), "")


def _loss_of(model: keras.Model, loss: Any) -> tuple[Any, Any]:
    """Return the loss and its weights: those given, or those that the model is compiled with."""
    compiled = getattr(model, "_compile_loss", None)
    if loss is not None or compiled is None:
        return loss, None
    return compiled._user_loss, compiled._user_loss_weights


def _planned(
    model: keras.Model, given: Any, inputs: Any, optimizer: keras.optimizers.Optimizer, loss: TrainingLoss | None
) -> Plan:
    if isinstance(given, Plan):
        require_fit(model, given)
        return given
    layout = given if isinstance(given, Layout) else read_layout_map(given).across(None)
    # Apart, for its simulated step runs a backward pass, after which a torch built for CUDA is not to be forked.
    (plan,) = run_forked(1, lambda number, store: make_plan(model, layout, inputs, optimizer, loss))
    return plan


def _data(
    model: keras.Model, plan: Plan, inputs: Any, targets: Any, loss: TrainingLoss | None
) -> tuple[CallArguments, Any]:
    """Return inputs and targets for all replicas together, drawn where they are not given."""
    arguments = CallArguments.of(inputs) if inputs is not None else fake_inputs(model, None)
    if arguments.others:
        raise PlanError("verify trains by Model.train_on_batch, which passes one argument; give inputs= as that one")
    specs = arguments.map(lambda leaf: _whole_batch(leaf, plan, from_model=inputs is None))
    uneven = [each.shape[0] for each in specs.tensors if each.shape and each.shape[0] % plan.replicas]
    if uneven:
        raise PlanError(f"inputs of {uneven[0]} rows are not divided by {plan.replicas} replicas; give each as many")
    (scouted,) = run_forked(1, Scout(model, specs, loss))
    assert isinstance(scouted, Scouted)
    rng = np.random.default_rng(SEED)
    drawn = random_inputs(specs, scouted.limits, rng)
    if inputs is not None and all(not isinstance(leaf, keras.InputSpec) for leaf in arguments.tensors):
        drawn = arguments.map(lambda leaf: keras.ops.convert_to_numpy(leaf))
    if targets is None:
        found = random_targets(scouted.outputs, scouted.of_indices, rng)
        targets = found[0] if len(found) == 1 else keras.tree.pack_sequence_as(scouted.structure, found)
    return drawn, targets


def _whole_batch(leaf: Any, plan: Plan, from_model: bool) -> keras.InputSpec:
    shape = tuple(leaf.shape)
    if from_model and shape:
        shape = (ROWS * plan.replicas, *shape[1:])
    return keras.InputSpec(shape=shape, dtype=keras.backend.standardize_dtype(leaf.dtype))
