"""Reduce behind: which gradients of inputs are summed while the gradients of weights are computed.

A column-parallel layer needs its input's gradient to be summed over the ranks, and nothing that it still has to do in
the backward pass needs that sum: the gradient of its weight hides it, as in Megatron-LM (Narayanan et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from tp_planner.ir.placement import Partial
from tp_planner.ir.plan import Boundary, LayerPlan

# Below this a sum takes less time than Python does to have it behind others: two nodes of autograd more.
LEAST_BYTES = 2**20


def reduce_behind(layers: Sequence[LayerPlan], trained: Collection[str]) -> tuple[LayerPlan, ...]:
    """Return the layers' plans with the boundaries at which the gradient comes back behind those of weights.

    What layers read that lie apart is left as it is: the first gradients of weights would wait for the last sum.

    Args:
        layers: the plans of all layers.
        trained: the variables that have gradients, by key.
    """
    behind = {
        boundary.tensor
        for plan in layers
        if plan.style == "column" and any(use.variable in trained for use in plan.uses)
        for boundary in _entering(plan)
        if math.prod(boundary.shape) * boundary.itemsize >= LEAST_BYTES
    }
    around: dict[str, set[str]] = {}
    for plan in layers:
        for boundary in _entering(plan):
            around.setdefault(boundary.tensor, set()).add(plan.layer.rpartition("/")[0])
    behind = {tensor for tensor in behind if len(around[tensor]) == 1}
    return tuple(_with_behind(plan, behind) for plan in layers)


def _entering(plan: LayerPlan) -> Iterator[Boundary]:
    """Yield the boundaries at which the gradient of what a layer reads is summed."""
    for _, boundary in plan.inputs:
        if boundary.has_gradient and isinstance(boundary.backward.source, Partial) and boundary.backward.collective:
            yield boundary


def _with_behind(plan: LayerPlan, tensors: Collection[str]) -> LayerPlan:
    entering = set(_entering(plan))
    inputs = tuple(
        (position, replace(each, behind=True) if each.tensor in tensors and each in entering else each)
        for position, each in plan.inputs
    )
    return plan if inputs == plan.inputs else replace(plan, inputs=inputs)
