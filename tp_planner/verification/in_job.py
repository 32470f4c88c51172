"""In a job: the running model on its real weights, against a copy on rank 0 that holds the whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import torch.distributed as dist

from tp_planner.frontend.calling import without_distribution
from tp_planner.frontend.layer_tree import named_layers, named_variables, own_variables
from tp_planner.ir.errors import PlanError, in_one_line
from tp_planner.ir.plan import Plan
from tp_planner.ir.verdict import BEFORE, judge
from tp_planner.job.process_group import host_group
from tp_planner.job.rendezvous import exchange, meet
from tp_planner.job.together import together
from tp_planner.storage.variables import whole_tensor
from tp_planner.training.model import applied_to
from tp_planner.verification.comparison import compare, compare_copies
from tp_planner.verification.precision import narrowest
from tp_planner.verification.readable import Verdict
from tp_planner.verification.watching import Seen, Watch, note_gradients, note_values

_PHASE = "step 1"


def verify_step(model: keras.Model, inputs: Any, targets: Any, reference: bool = True) -> Verdict:
    """Return whether a parallel model computes, on its real weights, what one device does; all ranks have to call it.

    Outputs, the loss and every gradient of one step are compared with those of a copy on rank 0, without dropout and
    without an update; and variables that ranks hold whole are compared between ranks, bit by bit. The model, its
    gradients and random states are as before.

    Args:
        model: a compiled model that is parallelized.
        inputs: what the model is called with: this replica's share.
        targets: the targets for its loss.
        reference: whether there is a copy; without one only ranks are compared with each other.

    Raises PlanError for a model that is not parallelized or compiled, or cannot be copied.
    """
    applied = applied_to(model)
    if applied is None:
        raise PlanError(
            f"model {model.name!r} is not parallelized; call tp_planner.parallelize(model, layout_map), or under a "
            f"distribution the model itself, before tp_planner.verify_step"
        )
    if not getattr(model, "compiled", False):
        raise PlanError(f"model {model.name!r} has no loss; call compile before tp_planner.verify_step")
    meet("tp_planner.verify_step")
    seen = _step(model, inputs, targets, keep=dist.get_rank() == 0, in_job=True)
    single = _of_copy(model, applied.plan, inputs, targets) if reference else None
    everything, references = _gathered(seen), _gathered(single)
    (single,) = references[:1]
    found = compare_copies(everything) if single is None else compare(single, everything, applied.plan)
    dtype = narrowest(model)
    return Verdict(applied.plan, dtype, judge(found, None, dtype), (single or seen).readers, seen.owners)


def _step(model: keras.Model, inputs: Any, targets: Any, keep: bool, in_job: bool) -> Seen:
    """Run one step forward and backward, watched; gradients are then those of before."""
    watch = Watch(model)
    inputs, targets = keras.tree.map_structure(keras.ops.convert_to_tensor, (inputs, targets))
    note_values(watch.seen, BEFORE, model, keep, slots=False)
    with _gradients_given_back(model):
        with watch.phase(_PHASE):
            outputs = model(inputs, training=False)
            loss = model.compute_loss(x=inputs, y=targets, y_pred=outputs, training=False)
            loss.backward()
        watch.seen.note_logs(_PHASE, {"loss": _mean(float(loss.detach())) if in_job else float(loss.detach())})
        note_gradients(watch.seen, _PHASE, model, keep)
    return watch.seen


@contextlib.contextmanager
def _gradients_given_back(model: keras.Model) -> Iterator[None]:
    parameters = [variable._value for variable in named_variables(model).values()]
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def _of_copy(model: keras.Model, plan: Plan, inputs: Any, targets: Any) -> Seen | None:
    """Return what a copy of the model on rank 0 computes on the rows of all replicas; None on the others."""
    copies = together("copying the model in tp_planner.verify_step", lambda: _copies(model, inputs))
    for key, variable in named_variables(model).items():
        whole = whole_tensor(variable)
        for copy in copies:
            named_variables(copy)[key]._value.data = whole.detach().clone()
    arrays = keras.tree.map_structure(keras.ops.convert_to_numpy, (inputs, targets))
    shares = [part for rank, part in enumerate(_gathered(arrays)) if plan.mesh.coordinate(rank, plan.axis) == 0]
    batch = keras.tree.map_structure(lambda *parts: np.concatenate(parts), *shares)
    what = "the step of the copy in tp_planner.verify_step"
    return next(iter(together(what, lambda: [_step_of_copy(copy, *batch) for copy in copies])), None)


def _step_of_copy(copy: keras.Model, inputs: Any, targets: Any) -> Seen:
    try:
        with without_distribution():
            return _step(copy, inputs, targets, keep=True, in_job=False)
    except Exception as error:  # layers may raise anything
        raise PlanError(
            f"the copy of model {copy.name!r} on one device fails ({in_one_line(error)}); give reference=False"
        ) from error


def _copies(model: keras.Model, inputs: Any) -> list[keras.Model]:
    """Return a plain copy of the model with its loss, whose variables have the same keys, on rank 0 alone."""
    if dist.get_rank():
        return []
    try:
        config = keras.saving.serialize_keras_object(model)
        config.pop("compile_config", None)  # the optimizer has slots in shards, and is not needed
        classes = {type(layer).__name__: type(layer) for layer in named_layers(model).values()}
        with without_distribution():
            copy = keras.saving.deserialize_keras_object(config, custom_objects=classes)
            if not all(layer.built for layer in named_layers(copy).values()):
                copy(keras.tree.map_structure(keras.ops.convert_to_tensor, inputs), training=False)
    except Exception as error:  # layers may raise anything
        raise PlanError(
            f"model {model.name!r} cannot be copied by its configuration ({in_one_line(error)}); "
            f"register its classes with keras.saving, or give reference=False"
        ) from None
    _name_variables_alike(copy, model)
    losses = model._compile_loss
    copy.compile(loss=losses and losses._user_loss, loss_weights=losses and losses._user_loss_weights)
    return [copy]


def _name_variables_alike(copy: keras.Model, model: keras.Model) -> None:
    """Give the copy's variables the paths of the model's: a path says in whose build a variable was made."""
    layers = named_layers(copy)
    for name, layer in named_layers(model).items():
        own, others = own_variables(layer), own_variables(layers[name]) if name in layers else []
        if [tuple(each.shape) for each in own] != [tuple(each.shape) for each in others]:
            raise PlanError(
                f"model {model.name!r} cannot be copied by its configuration, by which layer {name!r} has other "
                f"variables; give reference=False"
            )
        for variable, other in zip(own, others, strict=True):
            other._path = variable.path


def _mean(loss: float) -> float:
    """Return the mean of the losses of replicas, whose shares are equal."""
    losses = [float(text) for text in exchange("the loss in tp_planner.verify_step", repr(loss))]
    return sum(losses) / len(losses)


def _gathered(value: Any) -> list[Any]:
    """Return what all ranks brought."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=host_group())
    return found
