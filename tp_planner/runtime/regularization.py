"""Regularizers and constraints of sharded variables: functions of the whole value, on shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tp_planner.frontend.penalties import penalty_kind
from tp_planner.ir.placement import Partial, Replicate
from tp_planner.ir.plan import Boundary, Transition
from tp_planner.runtime.boundaries import Axis, cross
from tp_planner.runtime.variables import own_shard, read_shard, read_whole, whole_tensor


def parallel_regularizer(regularizer: Callable[[Any], Any], axis: Axis) -> Callable[[Any], Any]:
    """Return the regularizer of a sharded variable: ranks' sums added where it is additive, else of the whole."""
    if penalty_kind(regularizer) != "additive":
        return lambda variable: regularizer(read_whole(variable))

    def additive(variable: Any) -> torch.Tensor:
        part = regularizer(read_shard(variable))
        whole, summed = Transition(Replicate(), Replicate()), Transition(Partial(), Replicate())
        name = f"penalty of {variable.path}"
        return cross(
            part, Boundary(name, (), str(part.dtype), part.element_size(), summed, whole, has_gradient=True), axis
        )

    return additive


def parallel_constraint(constraint: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the constraint of a sharded variable: of its whole value, this rank's shard of it."""

    def constrained(variable: Any) -> torch.Tensor:
        whole = constraint(whole_tensor(variable))
        shard: torch.Tensor = own_shard(whole, variable._stored.placement, variable._stored.axis)
        return shard

    return constrained
