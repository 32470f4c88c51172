"""Accumulation: replicas add up the gradients of several micro-steps on their own, and average once, for the update.

Keras adds up the gradients of ``gradient_accumulation_steps`` training steps, here micro-steps, in slots of the
optimizer, and updates in the last of them. Each replica adds up its own, weighed by its samples, and in the last
micro-step what it has added up travels with the gradients of that one, as after torch's ``no_sync``. Until then the
slots are summands: their sum over the batch axis is what one process has, and what is read, saved and restored.

Where replicas have parts of gradients alone they reduce them in each micro-step, for they have no room for the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import torch

from tp_planner.ir.placement import Partial, Replicate, Shard
from tp_planner.job.axes import Axes
from tp_planner.regions.calls import Site
from tp_planner.regions.replicas import add_together
from tp_planner.storage.sharding import Sharding
from tp_planner.storage.variables import BackendVariable, local_tensor
from tp_planner.training.shares import share_of, slot_sharding

PUT_OFF = Site("", "gradients put off")
ACCUMULATOR = "gradient_accumulator"  # what Keras calls the slot


def micro_steps_of(optimizer: Any) -> int:
    """Return how many training steps an update of an optimizer of Keras has; 1 without an optimizer."""
    inner = getattr(optimizer, "inner_optimizer", None) or optimizer
    return int(getattr(inner, "gradient_accumulation_steps", None) or 1)


def why_in_each(model: keras.Model, optimizer: Any) -> str:
    """Return why replicas average gradients in each micro-step of a model; "" if once an update is enough."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return "loss scaling asks in each of them whether they are finite"
    if type(model).train_step is not keras.Model.train_step:
        return f"{type(model).__name__} has a train_step of its own, which may read them"
    return ""


def is_put_off(variable: Any) -> bool:
    """Whether replicas can add up the gradients of a variable on their own: they have all of it."""
    if getattr(variable, "overwrite_with_gradient", False) or share_of(variable) is not None:
        return False
    sharding = slot_sharding(variable)
    return sharding is None or not isinstance(sharding.batch_placement, Shard)


def sharding_of_sums(variable: Any, axes: Axes) -> Sharding:
    """Return how sums of gradients are stored that replicas put off: as the variable, with summands over the batch."""
    stored = slot_sharding(variable)
    return replace(stored, batch_placement=Partial()) if stored else Sharding(axes, Replicate(), Partial())


def count_of(optimizer: Any) -> int:
    """Return how many micro-steps an optimizer has made; the device is asked only where others have set it."""
    optimizer = getattr(optimizer, "inner_optimizer", None) or optimizer
    iterations = optimizer._iterations
    if isinstance(iterations, _BeforeLast):
        return iterations.micro_steps - 1
    tensor = iterations._value
    known: tuple[torch.Tensor, int, int] | None = optimizer.__dict__.get("_counted")
    if known is None or known[0] is not tensor or known[1] != tensor._version:
        known = optimizer.__dict__["_counted"] = tensor, tensor._version, int(tensor)
    return known[2]


def count_on(optimizer: Any) -> None:
    """Note that an optimizer whose micro-steps were counted has made another one."""
    known: tuple[torch.Tensor, int, int] | None = optimizer.__dict__.get("_counted")
    if known is not None and known[1] != known[0]._version:
        optimizer.__dict__["_counted"] = known[0], known[0]._version, known[2] + 1


def is_last(optimizer: Any) -> bool:
    """Whether the micro-step that an optimizer makes next is one that updates."""
    return (count_of(optimizer) + 1) % micro_steps_of(optimizer) == 0


class MicroStep:
    """One training step of Keras's own whose optimizer puts averaging off.

    ``own`` are variables whose gradients are this replica's alone, by id; in those of ``complete`` the sum of the
    micro-steps before has travelled with them.
    """

    def __init__(self, optimizer: Any) -> None:
        self.is_last = is_last(optimizer)
        self.own: dict[int, Any] = {}
        self.complete: set[int] = set()
        self._optimizer = optimizer

    def puts_off(self, variables: Sequence[Any]) -> bool:
        """Whether a bucket of these variables is not to be sent; if so their gradients are this replica's alone."""
        if self.is_last or not all(map(is_put_off, variables)):
            return False
        self.own |= {id(variable): variable for variable in variables}
        return True

    def sums_of(self, variables: Sequence[Any]) -> dict[int, torch.Tensor]:
        """Return what has been added up for variables of a bucket that is sent now, as gradients are scaled."""
        if not (self.is_last and self._optimizer.built):
            return {}
        scale, sums = self._optimizer.loss_scale_factor, {}
        for position, variable in enumerate(variables):
            accumulated = _sum_of(self._optimizer, variable)
            if accumulated is not None:
                sums[position] = accumulated if scale is None else accumulated * scale
                self.complete.add(id(variable))
        return sums


def _sum_of(optimizer: Any, variable: Any) -> torch.Tensor | None:
    """Return this replica's summand of what an optimizer has added up for a variable, if it has put that off."""
    index = optimizer._trainable_variables_indices.get(optimizer._var_key(variable))
    return None if index is None or not is_put_off(variable) else local_tensor(optimizer._accumulated_gradients[index])


def add_up(
    optimizer: Any, gradients: Sequence[torch.Tensor], variables: Sequence[Any], batch: Any
) -> Sequence[torch.Tensor]:
    """Return the gradients as an optimizer adds them to its sums, which are summands over the axis ``batch``.

    Those of a step that is not Keras's own are averaged already, and one replica adds them. In the last micro-step what
    has not travelled with them is added up here, and all sums are 0 afterwards.
    """
    micro_step: MicroStep | None = optimizer.__dict__.get("_micro_step")
    own: Mapping[int, Any] = {} if micro_step is None else micro_step.own
    complete: set[int] = set() if micro_step is None else micro_step.complete
    result, last = list(gradients), is_last(optimizer)
    waiting: dict[int, torch.Tensor] = {}
    for position, (gradient, variable) in enumerate(zip(gradients, variables, strict=True)):
        accumulated = _sum_of(optimizer, variable)
        if accumulated is None:
            continue
        averaged = id(variable) not in own
        if not last and averaged and batch.rank:
            result[position] = torch.zeros_like(gradient)
        elif last and id(variable) in complete:
            accumulated.zero_()
        elif last:
            waiting[position] = accumulated.clone() if averaged and batch.rank else accumulated + gradient
            accumulated.zero_()
    for position, total in zip(waiting, add_together(list(waiting.values()), batch, PUT_OFF), strict=True):
        result[position] = total
    return result


class _BeforeLast(BackendVariable):
    """A count of micro-steps whose next one updates, though it has no value."""

    micro_steps: int

    def __add__(self, other: Any) -> Any:
        return self.micro_steps - 1 + other


def be_before_last(optimizer: Any, variables: Sequence[Any]) -> None:
    """Let an optimizer be where it is before its last micro-step, for a simulation of that, without other replicas.

    Args:
        optimizer: one that adds up gradients, built and adopted.
        variables: those whose gradients have come, as from the other replicas, with what these have added up.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return
    iterations = optimizer._iterations
    iterations.__class__, iterations.micro_steps = _BeforeLast, micro_steps_of(optimizer)
    micro_step = optimizer.__dict__["_micro_step"] = MicroStep(optimizer)
    micro_step.complete |= set(map(id, variables))
