"""Regularizers and constraints of sharded variables: functions of the whole value, on shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tp_planner.frontend.penalties import penalty_kind
from tp_planner.ir.placement import Partial, Placement, Replicate, Shard
from tp_planner.ir.plan import Boundary, Transition
from tp_planner.job.axes import Axis
from tp_planner.regions.boundaries import cross
from tp_planner.regions.calls import Site
from tp_planner.storage.variables import read_shard, read_whole, whole_tensor


def parallel_regularizer(
    regularizer: Callable[[Any], Any], placement: Placement, axis: Axis, site: Site
) -> Callable[[Any], Any]:
    """Return the regularizer of a sharded variable: ranks' sums added where it is additive, else of the whole.

    ``placement`` is that on the model axis, ``axis``.
    """
    if penalty_kind(regularizer) != "additive" or not isinstance(placement, Shard):
        return lambda variable: regularizer(read_whole(variable, site))

    def additive(variable: Any) -> torch.Tensor:
        part = regularizer(read_shard(variable, site))
        whole, summed = Transition(Replicate(), Replicate()), Transition(Partial(), Replicate())
        penalty = Boundary(site.place, (), str(part.dtype), part.element_size(), summed, whole, has_gradient=True)
        return cross(part, penalty, axis, site)

    return additive


def parallel_constraint(constraint: Callable[[Any], Any], site: Site) -> Callable[[Any], Any]:
    """Return the constraint of a sharded variable: of its whole value, this rank's shard of it."""

    def constrained(variable: Any) -> torch.Tensor:
        whole = constraint(whole_tensor(variable, site))
        shard: torch.Tensor = variable._stored.sharding.own(whole)
        return shard

    return constrained
