"""Simulate: one training step of the applied model on fake shards, with everything that happens written down.

The same code runs as on real devices, minus the arithmetic: hooks, boundaries, autograd, the optimizer. A block
that is planned like another does not run; the log says that it does again what the other did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import keras
import torch

from tp_planner.dryrun.collector import only_new_garbage, without_collector
from tp_planner.dryrun.metering import StepMeter
from tp_planner.dryrun.repeats import BlockRepeats, multiplicities, stand_ins
from tp_planner.dryrun.sharing import SimulatedShares
from tp_planner.dryrun.training_step import TrainingStep
from tp_planner.frontend.inputs import fake_inputs
from tp_planner.frontend.layer_tree import named_layers, named_variables
from tp_planner.frontend.trace import fake_tensors
from tp_planner.frontend.training_loss import TrainingLoss
from tp_planner.ir.caching_allocator import BLOCK, reserved_for
from tp_planner.ir.early import start_early
from tp_planner.ir.errors import PlanError, in_one_line
from tp_planner.ir.graph import ModelGraph, Repeat
from tp_planner.ir.holders import holders_of
from tp_planner.ir.placement import WHOLE
from tp_planner.ir.plan import Plan
from tp_planner.ir.step import Collective, Step
from tp_planner.ir.step_log import (
    Began,
    Freed,
    Kernel,
    StepLog,
    Twin,
    collectives_of,
    memory_of,
    unfold,
    work_of,
)
from tp_planner.job.axes import Axes
from tp_planner.layers.apply import Applied, applied_for_simulation
from tp_planner.passes.note_accumulation import note_accumulation
from tp_planner.passes.place_boundaries import tensor_names_again
from tp_planner.regions.calls import Site
from tp_planner.regions.recording import REASONS
from tp_planner.regions.summands import site_of
from tp_planner.training.accumulation import is_put_off, micro_steps_of, why_in_each
from tp_planner.training.averaging import MARKS
from tp_planner.training.optimizer import LOSS_SCALE, adopt_optimizer, require_elementwise, updates_all_at_once


@dataclass(frozen=True, slots=True)
class Simulation:
    """The collectives of a simulated step in order of execution, what else it takes, and what was left out."""

    collectives: tuple[Collective, ...]
    step: Step
    notes: tuple[str, ...]


def simulate(
    model: keras.Model,
    inputs: Any,
    plan: Plan,
    graph: ModelGraph,
    axes: Axes,
    optimizer: keras.optimizers.Optimizer | None,
    loss: TrainingLoss | None,
) -> Simulation:
    """Return what one training step takes of rank 0.

    Args:
        model: the plain model; it is as before afterwards.
        inputs: as for ``trace``.
        plan: the plan to simulate.
        graph: the trace of a training call that the plan was made from.
        axes: those of a mesh of the planned size, fake or real.
        optimizer: makes the update; it is not changed.
        loss: as for ``TrainingStep``.

    Raises:
        PlanError: if the forward or backward pass fails on fake tensors.
    """
    repeats = graph.repeats if _blocks_are_independent(model, graph) else {}
    left_out = graph.repeated_layers if repeats else frozenset()
    # An update that is no few ops on lists is made of all variables, of blocks that do not run too.
    updated = frozenset() if optimizer is None or updates_all_at_once(optimizer) else left_out
    equal = stand_ins(repeats)
    settings = None if optimizer is None else _settings(optimizer)  # reads values, so before tensors are fake
    micro_steps, averaged = micro_steps_of(optimizer), why_in_each(model, optimizer)
    meter = StepMeter(axes, BLOCK if plan.device == "cuda" else 1)
    blocks = BlockRepeats(named_layers(model), graph, repeats, meter)
    with fake_tensors(), without_collector(), only_new_garbage():
        arguments = fake_inputs(model, inputs)
        with (
            applied_for_simulation(model, plan, axes, left_out, updated) as applied,
            blocks.watched(),
            meter.attributing(model, left_out - {repeat.block for repeat in repeats.values()}),
        ):
            sharing = _shared_updates(applied, meter, optimizer)
            updating = (
                None if optimizer is None else _adopted(type(optimizer).from_config, settings, axes, not averaged)
            )
            variables = {key for layer in left_out - updated for key in graph.layers[layer].variables}
            step = TrainingStep(model, meter, updating, loss, variables, applied.replicas, sharing, without_values=True)
            _hold_left_out_variables(meter, plan, variables)
            try:
                with _refusing_what_fails(model):
                    step.run(arguments, {} if updated else multiplicities(repeats), equal if updated else {})
            finally:
                meter.forget()
    log = _of_all_blocks(meter.log, graph, repeats)
    log.events = start_early(log.events, plan.gathers_ahead)
    once = _put_off(model, plan) if micro_steps > 1 and not averaged else frozenset()
    _add_gradients(log, plan, step.trained, equal, once)
    if sharing is not None:
        sharing.reduce(log, step.trained, equal)
    memory = memory_of(log)
    if plan.device == "cuda":
        memory = replace(memory, reserved=reserved_for(log.events))
    name = "" if optimizer is None else type(optimizer).__name__
    taken = Step(name, step.loss_name, memory, work_of(log), step.whole_update, holders_of(log), micro_steps)
    notes = (*step.notes, *note_accumulation(plan, micro_steps, averaged))
    return Simulation(tuple(_made_once(each, micro_steps) for each in collectives_of(log)), taken, notes)


@contextmanager
def _refusing_what_fails(model: keras.Model) -> Iterator[None]:
    """Raise PlanError for what a step raises: the user's own code may raise anything."""
    try:
        yield
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"a training step of model {model.name!r} cannot be simulated: {in_one_line(error)[:300]}"
        ) from error


def _of_all_blocks(log: StepLog, graph: ModelGraph, repeats: Mapping[int, Repeat]) -> StepLog:
    """Return the log of a step in which blocks run that did not, as what equal ones did."""
    twins = {
        call: Twin(each.twin, dict(each.layers) | tensor_names_again(each, graph)) for call, each in repeats.items()
    }
    return unfold(log, twins)


def _put_off(model: keras.Model, plan: Plan) -> frozenset[int]:
    """Return the numbers of the buckets that replicas send once an update of several micro-steps."""
    variables = named_variables(model)
    in_parts = {each.key for each in plan.variables if each.slot_placement != WHOLE}
    return frozenset(
        number
        for number, keys in enumerate(plan.buckets)
        if all(key not in in_parts and is_put_off(variables[key]) for key in keys)
    )


def _made_once(collective: Collective, micro_steps: int) -> Collective:
    """Return a collective, marked if it belongs to an update of several micro-steps."""
    if micro_steps == 1 or collective.phase != "update" or collective.place == LOSS_SCALE.place:
        return collective
    return replace(collective, once=True)


def _shared_updates(
    applied: Applied, meter: StepMeter, optimizer: keras.optimizers.Optimizer | None
) -> SimulatedShares | None:
    """Let the simulated replica share updates with others, if the plan says so; raise PlanError if that cannot be."""
    if not applied.plan.shares_updates:
        return None
    if optimizer is not None:
        require_elementwise(optimizer)
    sharing = SimulatedShares(applied, meter)
    sharing.watch(applied.undo)
    return sharing


def _settings(optimizer: keras.optimizers.Optimizer) -> Any:
    try:
        return optimizer.get_config()
    except NotImplementedError as error:  # torch's, where a tensor on the meta device is read
        raise PlanError(
            f"optimizer {optimizer.name!r} was made on the meta device, so its learning rate is not known; compile the "
            f"model outside of keras.device('meta'), or inside of tp_planner.deferred_init()"
        ) from error


def _blocks_are_independent(model: keras.Model, graph: ModelGraph) -> bool:
    """Whether it is enough to run one of several equal blocks: nothing but the model's call depends on the others."""
    if any(variable.penalty != "none" for variable in graph.variables.values()):
        return False
    return all(variable.constraint is None for variable in model.trainable_variables)


def _hold_left_out_variables(meter: StepMeter, plan: Plan, left_out: Set[str]) -> None:
    """Count the variables of layers that do not run."""
    for variable in plan.variables:
        if variable.key in left_out:
            meter.log.allocate(math.prod(variable.local_shape) * variable.itemsize, "parameters")


def _add_gradients(
    log: StepLog, plan: Plan, trained: Set[str], others: Mapping[str, str], once: Set[int] = frozenset()
) -> None:
    """Note at the end of the backward pass that ranks add their summands, then that replicas average their gradients.

    In the simulated step they do not, because of equal blocks only one has gradients.

    Args:
        log: that of the step.
        plan: the plan.
        trained: the variables that have got a gradient.
        others: variables that took no part, each with an equal one that did.
        once: the numbers of the buckets with which travels what micro-steps before have added up.
    """
    positions = {event.phase: position for position, event in enumerate(log.events) if isinstance(event, Began)}
    if "backward" not in positions:
        return
    rest = log.events[positions.get("update", len(log.events)) :]
    del log.events[len(log.events) - len(rest) :]
    sizes = {each.key: math.prod(each.local_shape) * each.itemsize for each in plan.variables}
    for number, keys in enumerate(plan.sums):
        size = sum(sizes[key] for key in keys if others.get(key, key) in trained)
        if size:
            _add_together(log, (plan.axis, plan.axis_size), size, site_of(number), joined=True, kernels=1, once=False)
    itemsizes = {each.key: each.itemsize for each in plan.variables}
    shared = {each.key for each in plan.variables if each.slot_placement != WHOLE}
    for number, keys in enumerate(plan.buckets):
        if keys[0] in shared:
            continue
        several = len(keys) > 1
        size = (
            sum(map(sizes.__getitem__, keys)) + several * len(keys) * itemsizes[keys[0]]
        )  # a mark for each of several
        axis, site = (plan.mesh.batch_axis or "", plan.replicas), Site("", f"gradients {number}")
        _add_together(log, axis, size, site, several, 1 + several + (number in once), number in once)
    alone = sum(len(plan.buckets[number]) == 1 for number in once)
    if alone:
        axis = plan.mesh.batch_axis or "", plan.replicas
        _add_together(log, axis, alone * torch.float32.itemsize, MARKS, joined=True, kernels=1, once=True)
    log.events += rest


def _add_together(
    log: StepLog, axis: tuple[str, int], size: int, site: Site, joined: bool, kernels: int, once: bool
) -> None:
    """Note an all-reduce of gradients over an axis, name and size, which are joined for it, or one of them alone."""
    storage = log.allocate(size if joined else 0)
    log.events += [Kernel("backward", "", 0, 2 * size)] * kernels
    reason = REASONS["all_reduce"]
    log.events.append(Collective("all_reduce", *axis, size, site.layer, site.place, "backward", reason, once=once))
    log.events.append(Freed(storage))  # in the end, the gradients are in it, and no longer where they were


def _adopted(
    make: Callable[[Any], keras.optimizers.Optimizer], settings: Any, axes: Axes, puts_averaging_off: bool
) -> Any:
    """Return a new optimizer with these settings and no slots, adopted for sharded variables."""
    copied = make(settings)
    adopt_optimizer(copied, axes, puts_averaging_off)
    return copied
