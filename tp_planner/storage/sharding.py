"""How a variable is cut: over the model axis, then each piece over the batch axis; and a rank's part of it.

Instead of parts, replicas may have summands: of a sum that they put off.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as TorchShard

from tp_planner.ir.placement import (
    WHOLE,
    PackedShard,
    Partial,
    Placement,
    Shape,
    Shard,
    chunk_sizes,
    local_shape,
    parts_of,
)
from tp_planner.job.axes import Axes, Axis
from tp_planner.regions.boundaries import gather
from tp_planner.regions.collectives import all_reduce
from tp_planner.regions.parts_side_by_side import own_parts

Span = tuple[int, int]  # the first index, and the one after the last


@dataclass(frozen=True)
class Piece:
    """A block that lies in one piece both in a whole tensor and in a rank's part of it; a span for each dim."""

    of_whole: tuple[Span, ...]
    of_part: tuple[Span, ...]


@dataclass(frozen=True)
class Sharding:
    """How a variable is cut: over the model axis, then each piece over the batch axis, or summands of it there."""

    axes: Axes
    placement: Placement
    batch_placement: Placement = WHOLE

    @property
    def cuts(self) -> tuple[tuple[Shard, Axis], ...]:
        """The cuts that are made, in order."""
        placed = zip((self.placement, self.batch_placement), self.axes.all, strict=False)
        return tuple((placement, axis) for placement, axis in placed if isinstance(placement, Shard))

    @property
    def is_summed(self) -> bool:
        """Whether replicas have summands: what is stored is the sum over the batch axis."""
        return isinstance(self.batch_placement, Partial)

    def local_shape(self, shape: Shape) -> Shape:
        """Return the shape of what this rank stores of a tensor of ``shape``."""
        for placement, axis in self.cuts:
            shape = local_shape(shape, placement, axis.size, axis.rank)
        return shape

    def own(self, value: Any) -> Any:
        """Return what this rank stores of a whole tensor or array; of summands the first replica has all."""
        for placement, axis in self.cuts:
            value = own_shard(value, placement, axis)
        if self.is_first_summand:
            return value
        return torch.zeros_like(value) if isinstance(value, torch.Tensor) else np.zeros_like(value)

    @property
    def is_first_summand(self) -> bool:
        """Whether this replica has all of a sum that is stored anew; it has where there are no summands."""
        return not self.is_summed or self.axes.all[1].rank == 0

    def added(self, part: torch.Tensor) -> torch.Tensor:
        """Return what this rank stores, with the summands of all replicas added; no gradient flows through it."""
        return all_reduce(part.contiguous(), self.axes.all[1]) if self.is_summed else part

    def pieces(self, shape: Shape) -> tuple[Piece, ...]:
        """Return the blocks of a tensor of ``shape`` of which this rank's part is made, as ``own`` cuts them."""
        by_dim = [_runs(self._indices(dim, shape)) for dim in range(len(shape))]
        return tuple(
            Piece(tuple(whole for whole, _ in runs), tuple(part for _, part in runs))
            for runs in itertools.product(*by_dim)
        )

    def _indices(self, dim: int, shape: Shape) -> torch.Tensor:
        """Return which indices of a dim this rank stores, in the order in which it does."""
        indices = torch.arange(shape[dim]).reshape([-1 if each == dim else 1 for each in range(len(shape))])
        for placement, axis in self.cuts:
            if placement.dim == dim:
                indices = own_shard(indices, placement, axis)
        return indices.flatten()

    def whole(self, part: torch.Tensor, shape: Shape) -> torch.Tensor:
        """Return the whole tensor of ``shape``, gathered from all ranks; no gradient flows through it."""
        part, lengths = self.added(part), []
        for placement, axis in self.cuts:
            lengths.append((placement, shape[placement.dim], axis))
            shape = local_shape(shape, placement, axis.size, axis.rank)
        for placement, length, axis in reversed(lengths):
            part = gather(part, placement, length, axis)
        return part

    def at(self, places: Sequence[int]) -> Sharding:
        """Return the sharding as the rank at these places on the axes has it."""
        moved = [replace(axis, rank=rank) for axis, rank in zip(self.axes.all, places, strict=True)]
        return replace(self, axes=Axes(self.axes.mesh, *moved))


def _runs(indices: torch.Tensor) -> list[tuple[Span, Span]]:
    """Return (indices of the whole, places in the part) for each run of consecutive indices."""
    if not indices.numel():
        return []
    breaks = torch.nonzero(indices.diff() != 1).flatten() + 1
    starts = [0, *breaks.tolist()]
    ends = [*starts[1:], indices.numel()]
    first = indices[starts].tolist()
    return [((whole, whole + b - a), (a, b)) for whole, a, b in zip(first, starts, ends, strict=True)]


def part_of_shards(value: DTensor, sharding: Sharding) -> torch.Tensor:
    """Return this rank's part of a value that is stored in shards; nothing moves where it lies in this rank's shard."""
    wanted = {axis.name: placement.dim for placement, axis in sharding.cuts}
    names = value.device_mesh.mesh_dim_names or ()
    stored = {
        name: placement.dim
        for name, size, placement in zip(names, value.device_mesh.shape, value.placements, strict=True)
        if size > 1 and isinstance(placement, TorchShard)
    }
    # Of a dim that both axes cut, the order of the cuts may be another; what is stored is never in parts yet.
    in_order = len(set(wanted.values())) == len(wanted) or set(stored) == {sharding.axes.model.name}
    packed = any(parts_of(placement) for placement, _ in sharding.cuts)
    with torch.no_grad():
        if stored and not packed and in_order and stored.items() <= wanted.items():
            part = value._local_tensor
            for placement, axis in sharding.cuts:
                part = part if axis.name in stored else own_shard(part, placement, axis).clone()
            return part
        whole: torch.Tensor = sharding.own(value.full_tensor())
        return whole.clone()


def own_shard(value: Any, placement: Placement, axis: Axis) -> Any:
    """Return this rank's part of a whole tensor or array."""
    if not isinstance(placement, Shard):
        return value
    if isinstance(placement, PackedShard):
        chunks = own_parts(value, placement, axis.size, axis.rank)
        if isinstance(value, torch.Tensor):
            return torch.cat(chunks, placement.dim)
        return np.concatenate([np.asarray(chunk) for chunk in chunks], placement.dim)
    sizes = chunk_sizes(value.shape[placement.dim], axis.size)
    start = sum(sizes[: axis.rank])
    index = (slice(None),) * placement.dim + (slice(start, start + sizes[axis.rank]),)
    return value[index]
