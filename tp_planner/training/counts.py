"""Counts: what metrics have counted since an epoch began, taken out, and given back to the same or other replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import torch
import torch.distributed as dist

from tp_planner.training.model import applied_to


def counts_of(model: keras.Model) -> list[Any]:
    """Return what the metrics of this replica have counted since they were reset, as JSON can hold it."""
    return [variable.value.detach().tolist() for variable in _counters(model)]


def count_on(model: keras.Model, counts: Sequence[list[Any]]) -> bool:
    """Let metrics go on from the ``counts_of`` each replica of then; False if the model has other ones.

    As many replicas have their own again; otherwise the first has what all had counted.
    """
    variables, (size, place) = _counters(model), place_among_replicas(model)
    shapes = [tuple(variable.shape) for variable in variables]
    if not counts or any([tuple(torch.tensor(count).shape) for count in each] != shapes for each in counts):
        return False
    for variable, *had in zip(variables, *counts, strict=True):
        own = _own_again(torch.tensor(had, dtype=torch.float64), size, place, variable.aggregation)
        variable.assign(own.to(variable.value.dtype))
    return True


def place_among_replicas(model: keras.Model) -> tuple[int, int]:
    """Return how many replicas of a model there are, and which is here; under a distribution before it is planned, too.

    One that is not parallel, and will not be, has one.
    """
    applied, distribution = applied_to(model), keras.distribution.distribution()
    if applied is not None:
        return (1, 0) if applied.replicas is None else (applied.replicas.axis.size, applied.replicas.axis.rank)
    if distribution is None or not dist.is_initialized():
        return 1, 0
    mesh = distribution.device_mesh
    axis = mesh.axis_names.index(distribution.batch_dim_name)
    return mesh.shape[axis], int(torch.unravel_index(torch.tensor(dist.get_rank()), tuple(mesh.shape))[axis])


def _counters(model: keras.Model) -> list[Any]:
    return [variable for metric in model.metrics for variable in metric.variables]


def _own_again(had: torch.Tensor, size: int, place: int, aggregation: str) -> torch.Tensor:
    """Return what one of ``size`` replicas has of what those of then had."""
    if len(had) == size:
        return had[place]
    if aggregation == "sum":
        return had.sum(0) if place == 0 else torch.zeros_like(had[0])
    return had.mean(0) if aggregation == "mean" else had[0]
