"""Buffers: what ranks of an axis store in parts travels in one collective, however many tensors it is of.

Chunks may be unequal: short ones travel padded. Tensors of several dtypes travel as bytes, those of the largest
elements first, so that each lies where its elements may; their gradients are summed dtype by dtype.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tp_planner.ir.placement import Shape, Shard, chunk_sizes
from tp_planner.job.axes import Axis
from tp_planner.regions.collectives import arrived, begin_all_gather, begin_reduce_scatter
from tp_planner.regions.parts_side_by_side import in_stored_order, in_whole_order


@dataclass(frozen=True, slots=True)
class Cut:
    """How a tensor of ``shape`` is cut over an axis."""

    shape: Shape
    placement: Shard

    def chunk(self, ranks: int) -> Shape:
        """Return the shape of the largest chunk, as which each of them travels."""
        dim = self.placement.dim
        return (*self.shape[:dim], chunk_sizes(self.shape[dim], ranks)[0], *self.shape[dim + 1 :])

    def length(self, ranks: int, rank: int) -> int:
        """Return how long a rank's chunk is in the dim that is cut."""
        return chunk_sizes(self.shape[self.placement.dim], ranks)[rank]


class Gathered:
    """The parts of all ranks of some tensors: sent when it is made, waited for when the first whole is taken.

    Args:
        parts: this rank's, in the dtypes in which they travel.
        cuts: how each tensor is cut.
        axis: the axis.
    """

    def __init__(self, parts: Sequence[torch.Tensor], cuts: Sequence[Cut], axis: Axis) -> None:
        self._cuts, self._axis = cuts, axis
        self._dtypes = [part.dtype for part in parts]
        padded = [_padded(part, cut, axis).reshape(-1) for part, cut in zip(parts, cuts, strict=True)]
        order = sorted(range(len(parts)), key=lambda number: -self._dtypes[number].itemsize)
        if len(set(self._dtypes)) > 1:
            padded = [part.view(torch.uint8) for part in padded]
        ends = list(itertools.accumulate((padded[number].numel() for number in order), initial=0))
        self._spans = {number: (ends[place], ends[place + 1]) for place, number in enumerate(order)}
        alignment = max(dtype.itemsize for dtype in self._dtypes) if len(set(self._dtypes)) > 1 else 1
        missing = -ends[-1] % alignment
        if missing:
            padded.append(padded[0].new_zeros(missing))
            order.append(len(padded) - 1)
        self._row = ends[-1] + missing
        sent = padded[0] if len(padded) == 1 else torch.cat([padded[number] for number in order])
        self._sent: torch.Tensor | None = sent  # which has to stay as long as it travels
        self._buffer = begin_all_gather(sent, axis)
        self._arrived = False

    def wait(self) -> None:
        """Wait for the parts of the others; on a GPU its stream does, and not the host."""
        if not self._arrived:
            self._buffer = arrived(self._buffer)
            self._arrived, self._sent = True, None

    def write(self, number: int, whole: torch.Tensor) -> None:
        """Write a whole tensor, whose parts are not packed, to where it belongs."""
        chunks, cut, ranks = self._chunks(number), self._cuts[number], self._axis.size
        dim = cut.placement.dim
        if cut.shape[dim] % ranks == 0:
            whole.unflatten(dim, (ranks, cut.shape[dim] // ranks)).movedim(dim, 0).copy_(chunks)
            return
        start = 0
        for rank, chunk in enumerate(chunks):
            length = cut.length(ranks, rank)
            whole.narrow(dim, start, length).copy_(chunk.narrow(dim, 0, length))
            start += length

    def _chunks(self, number: int) -> torch.Tensor:
        """Return the chunks of a tensor, one for each rank, all as long as the longest."""
        self.wait()
        ranks, (start, end) = self._axis.size, self._spans[number]
        rows: torch.Tensor = self._buffer.view(ranks, self._row)[:, start:end]
        return rows.view(self._dtypes[number]).view(ranks, *self._cuts[number].chunk(ranks))

    def whole(self, number: int) -> torch.Tensor:
        """Return a whole tensor: of several a copy, so that each of them goes alone."""
        chunks, cut, ranks = self._chunks(number), self._cuts[number], self._axis.size
        dim = cut.placement.dim
        if len(self._cuts) == 1 and dim == 0 and cut.shape[0] % ranks == 0:
            whole = chunks.view(cut.shape)
        else:
            own = [chunk.narrow(dim, 0, cut.length(ranks, rank)) for rank, chunk in enumerate(chunks)]
            whole = torch.cat(own, dim)
        return in_whole_order(whole, cut.placement, ranks)


class Reduced:
    """This rank's parts of the sums of all ranks' whole tensors, each times the rank's ``weight``.

    They are sent when it is made, and waited for when the parts are asked for. Without a weight, a rank's summands
    count for nothing, whatever they are.
    """

    def __init__(
        self, summands: Sequence[torch.Tensor], cuts: Sequence[Cut], axis: Axis, weight: torch.Tensor | None
    ) -> None:
        self._cuts, self._axis = cuts, axis
        # By dtype: whose parts, what is sent, which has to stay as long as it travels, and what arrives.
        self._travelling: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []
        for dtype in dict.fromkeys(summand.dtype for summand in summands):
            same = [number for number, summand in enumerate(summands) if summand.dtype == dtype]
            sent = _side_by_side([summands[number] for number in same], [cuts[number] for number in same], axis.size)
            if weight is None:
                sent.zero_()
            else:
                sent.mul_(weight)
            self._travelling.append((same, sent, begin_reduce_scatter(sent.view(-1), axis)))

    def parts(self) -> list[torch.Tensor]:
        """Return the parts, once; on a GPU its stream waits for them, and not the host."""
        parts: dict[int, torch.Tensor] = {}
        while self._travelling:
            same, sent, arriving = self._travelling.pop(0)
            summed = arrived(arriving)
            del sent
            sizes = [math.prod(self._cuts[number].chunk(self._axis.size)) for number in same]
            for number, own in zip(same, summed.split(sizes), strict=True):
                parts[number] = self._without_padding(number, own)
        return [parts[number] for number in sorted(parts)]

    def _without_padding(self, number: int, chunk: torch.Tensor) -> torch.Tensor:
        cut, dim = self._cuts[number], self._cuts[number].placement.dim
        full, length = chunk.view(cut.chunk(self._axis.size)), cut.length(self._axis.size, self._axis.rank)
        return full if full.shape[dim] == length else full.narrow(dim, 0, length).contiguous()


def _side_by_side(summands: Sequence[torch.Tensor], cuts: Sequence[Cut], ranks: int) -> torch.Tensor:
    """Return a row for each rank: its chunks of all the tensors, one after the other."""
    chunks = [cut.chunk(ranks) for cut in cuts]
    sizes = [math.prod(chunk) for chunk in chunks]
    rows = summands[0].new_empty(ranks, sum(sizes))
    for summand, cut, chunk, own in zip(summands, cuts, chunks, rows.split(sizes, 1), strict=True):
        dim = cut.placement.dim
        whole = _lengthened(in_stored_order(summand, cut.placement, ranks), dim, chunk[dim] * ranks)
        own.view(ranks, *chunk).copy_(whole.unflatten(dim, (ranks, chunk[dim])).movedim(dim, 0))
    return rows


def _padded(part: torch.Tensor, cut: Cut, axis: Axis) -> torch.Tensor:
    dim = cut.placement.dim
    return _lengthened(part, dim, cut.chunk(axis.size)[dim]).contiguous()


def _lengthened(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    missing = length - tensor.shape[dim]
    return torch.nn.functional.pad(tensor, [0, 0] * (tensor.ndim - 1 - dim) + [0, missing]) if missing else tensor
