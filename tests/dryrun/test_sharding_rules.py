"""Sharding rules of our own: an op on each rank's shard makes that rank's shard of what it makes of the whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tp_planner.dryrun.sharding_rules import OWN_RULES
from tp_planner.ir.graph import Op, TensorInfo, TensorRef
from tp_planner.ir.placement import Placement, Shard, StridedShard, local_shape
from tp_planner.passes.follow_ops import Followed
from tp_planner.passes.view_ops import viewed_placement

PARTS = 2


def shard(whole: torch.Tensor, placement: Placement, rank: int) -> torch.Tensor:
    """Return a rank's elements: of a StridedShard its chunk of each of the runs."""
    assert isinstance(placement, Shard | StridedShard)
    runs = placement.split if isinstance(placement, StridedShard) else 1
    dim, length = placement.dim, whole.shape[placement.dim]
    split = whole.unflatten(dim, (runs, PARTS, length // runs // PARTS))
    return split.select(dim + 1, rank).flatten(dim, dim + 1)


def placements(shape: tuple[int, ...]) -> list[Placement]:
    """Return all placements whose shards are even."""
    found: list[Placement] = [Shard(dim) for dim, length in enumerate(shape) if length % PARTS == 0]
    for dim, length in enumerate(shape):
        found += [StridedShard(dim, runs) for runs in range(2, length + 1) if length % (runs * PARTS) == 0]
    return found


def shapes_of(size: int, dims: int) -> list[tuple[int, ...]]:
    lengths = [length for length in range(1, size + 1) if size % length == 0]
    return [shape for shape in itertools.product(lengths, repeat=dims) if math.prod(shape) == size]


def test_views_of_shards_are_shards_of_views() -> None:
    """Of every shape of 24 elements in every other, and where none is named, no placement would do."""
    shapes = [shape for dims in (1, 2, 3) for shape in shapes_of(24, dims)]
    named = 0
    for shape, viewed in itertools.product(shapes, repeat=2):
        whole = torch.arange(24).view(shape)
        for placement in placements(shape):
            local = [shard(whole, placement, rank) for rank in range(PARTS)]
            made = viewed_placement(shape, viewed, placement, PARTS)
            if made is None:
                assert not any(is_made_of(local, whole.view(viewed), each) for each in placements(viewed))
            else:
                assert is_made_of(local, whole.view(viewed), made)
                named += 1
    assert named > 1000


def is_made_of(local: list[torch.Tensor], viewed: torch.Tensor, placement: Placement) -> bool:
    shape = local_shape(tuple(viewed.shape), placement, PARTS)
    return all(torch.equal(each.reshape(shape), shard(viewed, placement, rank)) for rank, each in enumerate(local))


OPS: list[tuple[Callable[..., Any], tuple[Any, ...], list[tuple[int, ...]]]] = [
    *((torch.ops.aten.stack.default, (dim,), [(4, 2, 6)] * 3) for dim in (0, 1, 2, 3, -1, -2)),
    (torch.ops.aten.stack.default, (), [(4, 2)] * 2),
    *((torch.ops.aten.squeeze.dims, (dims,), [(1, 4, 1, 6)]) for dims in ([0], [2], [0, 2], [-2, 0], [1, 2])),
    *((torch.ops.aten.squeeze.dim, (dim,), [(1, 4, 1, 6)]) for dim in (0, 1, -2)),
    (torch.ops.aten.max_pool2d_with_indices.default, ([2, 2],), [(2, 4, 8, 6)]),
    (torch.ops.aten.max_pool2d_with_indices.default, ([2, 2],), [(4, 8, 6)]),
]


@pytest.mark.parametrize(("function", "constants", "shapes"), OPS, ids=str)
def test_ops_on_shards_make_shards(function: Any, constants: tuple[Any, ...], shapes: list[tuple[int, ...]]) -> None:
    wholes = [torch.randn(shape) for shape in shapes]

    def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        first = tensors if function is torch.ops.aten.stack.default else tensors[0]
        made = function(first, *constants)
        return list(made) if isinstance(made, tuple) else [made]

    expected = run(wholes)
    infos = {
        number: TensorInfo(
            number, tuple(each.shape), each.stride(), str(each.dtype).removeprefix("torch."), each.itemsize, True, True
        )
        for number, each in enumerate([*wholes, *expected])
    }
    references = [TensorRef(number) for number in range(len(wholes))]
    first = references if function is torch.ops.aten.stack.default else references[0]
    numbers = tuple(range(len(wholes)))
    op = Op(
        id=0,
        name=str(function),
        call=0,
        random=False,
        inputs=numbers,
        outputs=tuple(range(len(wholes), len(infos))),
        arguments=((first, *constants), {}),
    )
    followed = 0
    for placement in (Shard(dim) for dim, length in enumerate(shapes[0]) if length % PARTS == 0):
        answer = OWN_RULES[op.name](op, infos, dict.fromkeys(numbers, placement), PARTS)
        if not isinstance(answer, Followed):
            continue
        followed += 1
        for rank in range(PARTS):
            found = run([shard(whole, placement, rank) for whole in wholes])
            for each, whole, made in zip(found, expected, answer.outputs, strict=True):
                assert torch.equal(each, shard(whole, made, rank))
    assert followed > 0
