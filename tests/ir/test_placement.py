"""Laws of placements: shards cover a tensor, text goes there and back, transitions name their collective."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tp_planner.ir.placement import (
    Partial,
    Placement,
    Replicate,
    Shard,
    StridedShard,
    chunk_sizes,
    collective_between,
    divides,
    local_shape,
    parse_placement,
)

PLACEMENTS = st.one_of(
    st.just(Replicate()),
    st.just(Partial()),
    st.builds(Shard, st.integers(0, 5)),
    st.builds(StridedShard, st.integers(0, 5), st.integers(2, 8)),
)


@given(st.integers(0, 200), st.integers(1, 16))
def test_chunks_are_torchs(length: int, parts: int) -> None:
    """A dim is cut as torch.chunk cuts it, with empty chunks for ranks that get none."""
    chunks = [chunk.numel() for chunk in torch.arange(length).chunk(parts)]
    assert list(chunk_sizes(length, parts)) == (chunks + [0] * parts)[:parts]
    assert sum(chunk_sizes(length, parts)) == length


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 8), st.data())
def test_shards_cover_the_tensor(sizes: list[int], parts: int, data: st.DataObject) -> None:
    """Local shapes differ from the whole in one dim only, and add up to it there."""
    dim = data.draw(st.integers(0, len(sizes) - 1))
    shapes = [local_shape(tuple(sizes), Shard(dim), parts, rank) for rank in range(parts)]
    assert sum(shape[dim] for shape in shapes) == sizes[dim]
    assert all(shape[:dim] + shape[dim + 1 :] == (*sizes[:dim], *sizes[dim + 1 :]) for shape in shapes)
    assert divides(tuple(sizes), Shard(dim), parts) == (len({shape[dim] for shape in shapes}) == 1)


@given(PLACEMENTS)
def test_text_there_and_back(placement: Placement) -> None:
    assert parse_placement(str(placement)) == placement


@pytest.mark.parametrize(
    ("source", "target", "collective"),
    [
        (Partial(), Replicate(), "all_reduce"),
        (Partial(), Shard(1), "reduce_scatter"),
        (Shard(0), Replicate(), "all_gather"),
        (Shard(0), Shard(1), "all_gather"),
        (Shard(0), Shard(0), None),
        (Replicate(), Shard(0), None),
        (Replicate(), Replicate(), None),
    ],
)
def test_collective(source: Placement, target: Placement, collective: str | None) -> None:
    assert collective_between(source, target) == collective


def test_no_collective_makes_sums_of_shards() -> None:
    with pytest.raises(ValueError, match=r"no collective turns S\(0\) into P"):
        collective_between(Shard(0), Partial())
