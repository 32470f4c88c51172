"""Placements of a tensor on one mesh axis, and the collectives that change them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import groupby

from tp_planner.ir.step import CollectiveKind

Shape = tuple[int, ...]

LISTED = 8  # chunks of which each is named


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank of the axis holds the whole tensor."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank r of the axis holds the r-th chunk of dim ``dim`` (as ``torch.chunk`` cuts it)."""

    dim: int

    def __str__(self) -> str:
        return f"S({self.dim})"


@dataclass(frozen=True, slots=True)
class SequenceShard(Shard):
    """A shard of the residual stream: it need not be one, for all that is computed on it is right on the whole too.

    So a call in which the dim does not divide keeps the stream whole (``where_stream_is_whole``).
    """

    def __str__(self) -> str:
        return f"Seq({self.dim})"


@dataclass(frozen=True, slots=True)
class PackedShard(Shard):
    """Dim ``dim`` is ``parts`` side by side, as q, k and v in one kernel: rank r holds the r-th chunk of each."""

    parts: tuple[int, ...]

    def __str__(self) -> str:
        return f"S({self.dim}:{'+'.join(map(str, self.parts))})"


@dataclass(frozen=True, slots=True)
class StridedShard:
    """Dim ``dim`` came from flattening dims of which an inner one is sharded: ``split`` runs of equal chunks.

    Only tensors inside a region are placed so, between a flatten and the matching unflatten.
    """

    dim: int
    split: int

    def __str__(self) -> str:
        return f"S({self.dim},{self.split})"


@dataclass(frozen=True, slots=True)
class Partial:
    """Every rank of the axis holds a summand; the tensor is their sum."""

    def __str__(self) -> str:
        return "P"


@dataclass(frozen=True, slots=True)
class SequencePartial(Partial):
    """A summand because it comes from a shard of the residual stream; where that is whole, so is this."""

    def __str__(self) -> str:
        return "SeqP"


Placement = Replicate | Shard | StridedShard | Partial
WHOLE = Replicate()


def parse_placement(text: str) -> Placement:
    """Return the placement that ``str`` wrote: "R", "P", "S(dim)", "S(dim:parts)"; on the stream "Seq(dim)"."""
    plain: dict[str, Placement] = {"R": Replicate(), "P": Partial(), "SeqP": SequencePartial()}
    if text in plain:
        return plain[text]
    if match := re.fullmatch(r"Seq\((\d+)\)", text):
        return SequenceShard(int(match[1]))
    if match := re.fullmatch(r"S\((\d+)\)", text):
        return Shard(int(match[1]))
    if match := re.fullmatch(r"S\((\d+):(\d+(?:\+\d+)+)\)", text):
        return PackedShard(int(match[1]), tuple(map(int, match[2].split("+"))))
    if match := re.fullmatch(r"S\((\d+),(\d+)\)", text):
        return StridedShard(int(match[1]), int(match[2]))
    raise ValueError(f"{text!r} is no placement; expected 'R', 'P' or 'S(dim)'")


def in_parts(placement: Placement, parts: tuple[int, ...]) -> Placement:
    """Return a shard as one of a dim that is these parts side by side; any other placement, and of no parts, itself.

    >>> str(in_parts(Shard(1), (64, 32, 32)))
    'S(1:64+32+32)'
    """
    return PackedShard(placement.dim, parts) if isinstance(placement, Shard) and len(parts) > 1 else placement


def parts_of(placement: Placement | None) -> tuple[int, ...]:
    """Return the parts of a dim that is several side by side; nothing of any other."""
    return placement.parts if isinstance(placement, PackedShard) else ()


def without_parts(placement: Placement) -> Placement:
    """Return a shard of parts side by side as one of the dim; any other placement itself."""
    return Shard(placement.dim) if isinstance(placement, PackedShard) else placement


def where_stream_is_whole(placement: Placement) -> Placement:
    """Return the placement in a call that keeps the residual stream whole on every rank."""
    return Replicate() if isinstance(placement, SequenceShard | SequencePartial) else placement


def chunk_sizes(length: int, parts: int) -> tuple[int, ...]:
    """Return the sizes of the ``parts`` chunks of a dim of ``length``, as ``torch.chunk`` cuts it.

    >>> chunk_sizes(10, 4)
    (3, 3, 3, 1)
    """
    return tuple(_chunk_size(length, parts, rank) for rank in range(parts))


def chunk_sizes_text(length: int, parts: int) -> str:
    """Return the sizes of the chunks to be read, equal ones of many parts counted.

    >>> chunk_sizes_text(10, 4), chunk_sizes_text(10, 16)
    ('3, 3, 3, 1', '10 x 1, 6 x 0')
    """
    sizes = chunk_sizes(length, parts)
    if parts <= LISTED:
        return ", ".join(map(str, sizes))
    return ", ".join(f"{len(list(equal))} x {size}" for size, equal in groupby(sizes))


def _chunk_size(length: int, parts: int, rank: int) -> int:
    full = -(-length // parts)
    return max(0, min(full, length - rank * full))


def divides(shape: Shape, placement: Placement, parts: int) -> bool:
    """Whether every rank gets an equal shard."""
    if isinstance(placement, PackedShard):
        return all(part % parts == 0 for part in placement.parts)
    return not isinstance(placement, Shard | StridedShard) or shape[placement.dim] % parts == 0


def smallest_parts(shape: Shape, parts: int, but: int | None = None) -> Placement:
    """Return the cut that leaves the largest part smallest, of the first dim that does; whole if no dim is so long.

    Dim ``but`` is not cut.

    >>> str(smallest_parts((6, 8), 4)), str(smallest_parts((8, 8), 4)), str(smallest_parts((3, 2), 4))
    ('S(1)', 'S(0)', 'R')
    """
    cuts = [Shard(dim) for dim, length in enumerate(shape) if length >= parts and dim != but]
    return min(cuts, key=lambda cut: math.prod(local_shape(shape, cut, parts)), default=WHOLE)


def local_shape(shape: Shape, placement: Placement, parts: int, rank: int = 0) -> Shape:
    """Return the shape of what rank ``rank`` of ``parts`` holds of a tensor of ``shape``."""
    if not isinstance(placement, Shard | StridedShard):
        return shape
    local = _chunk_size(shape[placement.dim], parts, rank)
    return (*shape[: placement.dim], local, *shape[placement.dim + 1 :])


def whole_shape(shape: Shape, placement: Placement, parts: int) -> Shape:
    """Return the shape of the tensor that ``parts`` ranks hold in equal parts of ``shape``."""
    if not isinstance(placement, Shard):
        return shape
    return (*shape[: placement.dim], shape[placement.dim] * parts, *shape[placement.dim + 1 :])


def collective_between(source: Placement, target: Placement) -> CollectiveKind | None:
    """Return the collective that turns ``source`` into ``target``; None where no rank needs another.

    One sharded dim becomes another by way of the whole tensor: only small variables ever change so.

    Raises ValueError for Shard to Partial, which only the residual stream needs: there it is zeros around the shard.
    """
    match source, target:
        case Partial(), Replicate():
            return "all_reduce"
        case Partial(), Shard():
            return "reduce_scatter"
        case Shard(), Replicate():
            return "all_gather"
        case Shard(dim=a), Shard(dim=b) if a != b:
            return "all_gather"
        case SequenceShard(), SequencePartial():
            return None
        case Shard(), Partial():
            raise ValueError(f"no collective turns {source} into {target}")
    return None
