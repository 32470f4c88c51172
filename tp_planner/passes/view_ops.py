"""View ops: which elements of a viewed tensor a rank has, worked out from sizes alone.

DTensor folds a sharded dim into those before it, and takes it out again, with torch 2.13; with 2.11, it refuses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from tp_planner.ir.graph import Op, TensorInfo
from tp_planner.ir.placement import Placement, Shape, Shard, StridedShard, local_shape
from tp_planner.passes.follow_ops import Followed

VIEWS = {"aten.view.default", "aten._unsafe_view.default", "aten.reshape.default"}


def follow_view(
    op: Op, tensors: Mapping[int, TensorInfo], inputs: Mapping[int, Placement], parts: int
) -> Followed | None:
    """Return what a view makes of even shards; None if no placement describes it, or the op is no view."""
    if op.name not in VIEWS:
        return None
    shape, viewed = tensors[op.inputs[0]].shape, tensors[op.outputs[0]].shape
    made = viewed_placement(shape, viewed, inputs[op.inputs[0]], parts)
    return None if made is None else Followed((made,), local_shape(viewed, made, parts))


def viewed_placement(shape: Shape, viewed: Shape, placement: Placement, parts: int) -> Placement | None:
    """Return how a tensor is sharded whose view is of shape ``viewed``.

    In the order of elements, a shard is its part of each of so many equal stretches. A dim of the view is sharded if
    every stretch lies inside of one index of the dims before it, and ends with one of its own.
    """
    if not isinstance(placement, Shard | StridedShard):
        return None
    inside = placement.split if isinstance(placement, StridedShard) else 1
    stretches = math.prod(shape[: placement.dim]) * inside
    if shape[placement.dim] % (inside * parts):
        return None
    for dim, length in enumerate(viewed):
        before = math.prod(viewed[:dim])
        if length > 1 and stretches % before == 0 and length % (stretches // before * parts) == 0:
            split = stretches // before
            return Shard(dim) if split == 1 else StridedShard(dim, split)
    return None
