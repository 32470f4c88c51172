"""Packed ops: what ops make of a dim that is several parts side by side, such as q, k and v of one kernel.

Ops that take a dim apart run on shards where every rank has its own chunk of each part. Of all other ops the sharding
rule for plain shards holds: an op that works on each rank's chunk alone does not ask which chunk that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from tp_planner.ir.graph import Op, TensorInfo
from tp_planner.ir.placement import (
    PackedShard,
    Partial,
    Placement,
    Replicate,
    Shape,
    Shard,
    in_parts,
    local_shape,
    parts_of,
)
from tp_planner.passes.follow_ops import Followed, Refused
from tp_planner.passes.view_ops import VIEWS

Ask = Callable[[Mapping[int, Placement]], Followed | Refused]

CONCATENATION = "aten.cat.default"
ORDER = "combines parts of a dim with what is in another order"


@dataclass(frozen=True, slots=True)
class TakenApart:
    """An op that takes a dim of its first input apart: the span of each output, first index and the one after the last.

    ``numbers`` are those among its arguments that say where, as the code writes them.
    """

    dim: int
    spans: tuple[tuple[int, int], ...]
    numbers: tuple[int, ...]


def taken_apart(op: Op, tensors: Mapping[int, TensorInfo]) -> TakenApart | None:
    """Return how an op takes a dim of its first input apart, if it does."""
    reader = _READERS.get(op.name)
    if reader is None:
        return None
    args, kwargs = op.arguments
    found = reader(tensors[op.inputs[0]].shape, [*args[1:], *kwargs.values()])
    return found if found is None or found.spans != ((0, tensors[op.inputs[0]].shape[found.dim]),) else None


def _of_sizes(shape: Shape, args: list[Any]) -> TakenApart:
    sizes, dim = args[0] or 1, args[1] if len(args) > 1 else 0
    dim %= len(shape)
    if isinstance(sizes, int):
        numbers: tuple[int, ...] = (sizes,)
        ends = [min(end, shape[dim]) for end in range(sizes, shape[dim] + sizes, sizes)]
    else:
        numbers, ends = tuple(sizes), list(accumulate(sizes))
    return TakenApart(dim, tuple(zip([0, *ends[:-1]], ends, strict=True)), numbers)


def _of_slice(shape: Shape, args: list[Any]) -> TakenApart | None:
    given: list[Any] = [*args, *[0, None, None, 1][len(args) :]]
    dim, start, end, step = given
    if step != 1:
        return None
    dim %= len(shape)
    length = shape[dim]
    first, after = (_from_front(length, each) for each in (start or 0, length if end is None else end))
    return TakenApart(dim, ((first, after),), tuple(each for each in (start, end) if each and abs(each) < length))


def _from_front(length: int, index: int) -> int:
    return max(0, min(length, index + length if index < 0 else index))


def _of_index(shape: Shape, args: list[Any]) -> TakenApart:
    dim, index = args[0] % len(shape), args[1] % shape[args[0] % len(shape)]
    return TakenApart(dim, ((index, index + 1),), ())


def _of_all(shape: Shape, args: list[Any]) -> TakenApart:
    dim = (args[0] if args else 0) % len(shape)
    return TakenApart(dim, tuple((index, index + 1) for index in range(shape[dim])), ())


_READERS: Mapping[str, Callable[[Shape, list[Any]], TakenApart | None]] = {
    "aten.split_with_sizes.default": _of_sizes,
    "aten.split.Tensor": _of_sizes,
    "aten.slice.Tensor": _of_slice,
    "aten.select.int": _of_index,
    "aten.unbind.int": _of_all,
}


def parts_wanted(op: Op, tensors: Mapping[int, TensorInfo], placement: Placement) -> tuple[int, ...]:
    """Return the parts of which the first input's sharded dim would have to be, for the op to run on shards of each."""
    if not isinstance(placement, Shard):
        return ()
    shape = tensors[op.inputs[0]].shape
    if op.name in VIEWS:
        return _parts_of_view(shape, tensors[op.outputs[0]].shape, placement)
    found = taken_apart(op, tensors)
    if found is None or found.dim != placement.dim:
        return ()
    ends = sorted({0, *(end for span in found.spans for end in span), *_ends(placement), shape[found.dim]})
    return tuple(after - before for before, after in pairwise(ends))


def moved_dim(op: Op, dim: int, ndim: int) -> int | None:
    """Return where an op that reorders ``ndim`` dims puts one; None for any other op."""
    args, _ = op.arguments
    if op.name == "aten.permute.default":
        return [each % ndim for each in args[1]].index(dim)
    if op.name == "aten.transpose.int":
        first, second = args[1] % ndim, args[2] % ndim
        return second if dim == first else first if dim == second else dim
    return None


def first_viewed_dim(op: Op, tensors: Mapping[int, TensorInfo], dim: int) -> int | None:
    """Return the first of the dims into which a view takes ``dim`` of its input; None if it folds it into others."""
    return _same_place(tensors[op.inputs[0]].shape, tensors[op.outputs[0]].shape, dim)


def _ends(placement: Placement) -> list[int]:
    return list(accumulate(parts_of(placement)))


def _parts_of_view(shape: Shape, viewed: Shape, placement: Shard) -> tuple[int, ...]:
    """Return equal parts, one for each index of the first of the dims into which a view takes the sharded one."""
    at = _same_place(shape, viewed, placement.dim)
    length = shape[placement.dim]
    if at is None or viewed[at] >= length or length % viewed[at] or at + 1 == len(viewed):
        return ()
    return (length // viewed[at],) * viewed[at]


def _same_place(shape: Shape, viewed: Shape, dim: int) -> int | None:
    """Return the dim of ``viewed`` that begins where ``dim`` of ``shape`` does."""
    before = math.prod(shape[:dim])
    starts = (at for at in range(len(viewed)) if math.prod(viewed[:at]) == before and viewed[at] != 1)
    return next(starts, None)


def follow_packed(
    op: Op, tensors: Mapping[int, TensorInfo], inputs: Mapping[int, Placement], ranks: int, ask: Ask
) -> Followed | Refused:
    """Return what an op makes of inputs of which some are shards of parts; ``ask`` knows how it acts on plain ones."""
    first = inputs[op.inputs[0]]
    if op.name in VIEWS:
        return _follow_view(op, tensors, first, ranks)
    apart = taken_apart(op, tensors)
    if isinstance(first, PackedShard) and apart is not None and apart.dim == first.dim and len(inputs) == 1:
        return _follow_apart(op, apart, first, ranks)
    parts = next(parts for placement in inputs.values() if (parts := parts_of(placement)))
    for tensor, placement in inputs.items():
        if isinstance(placement, Shard) and parts_of(placement) != parts:
            alike = tensors[tensor].shape[placement.dim] == sum(parts) and not parts_of(placement)
            return Refused(ORDER, parts if alike else (), op, tensor)
    found = ask({tensor: Shard(each.dim) if isinstance(each, PackedShard) else each for tensor, each in inputs.items()})
    return found if isinstance(found, Refused) else _as_packed(op, tensors, found, parts)


def _as_packed(
    op: Op, tensors: Mapping[int, TensorInfo], found: Followed, parts: tuple[int, ...]
) -> Followed | Refused:
    outputs = []
    for tensor, placement in zip(op.outputs, found.outputs, strict=True):
        if isinstance(placement, Shard):
            if tensors[tensor].shape[placement.dim] != sum(parts):
                return Refused("changes the length of a dim that is several parts side by side")
        elif placement not in (Partial(), Replicate()):
            return Refused("mixes parts that lie side by side")
        outputs.append(in_parts(placement, parts))
    return replace(found, outputs=tuple(outputs))


def _follow_apart(op: Op, apart: TakenApart, placement: PackedShard, ranks: int) -> Followed | Refused:
    ends = [0, *accumulate(placement.parts)]
    if any(end not in ends for span in apart.spans for end in span):
        return Refused("takes a dim apart within a part of it")
    outputs: list[Placement] = []
    for first, after in apart.spans:
        parts = placement.parts[ends.index(first) : ends.index(after)]
        outputs.append(in_parts(Shard(placement.dim), parts))
    local = {number: number // ranks if number > 0 else -(-number // ranks) for number in apart.numbers}
    args, kwargs = op.arguments
    where = 1 if op.name.startswith("aten.split") else 2
    return Followed(
        tuple(outputs),
        tuple(_local_arguments(args, where, local)) + tuple(kwargs.values()),
        sizes=tuple((number, local[number]) for number in apart.numbers),
    )


def _local_arguments(args: Any, where: int, local: Mapping[int, int]) -> list[Any]:
    """Return the numbers among an op's arguments as they are on shards; from ``where`` on they are lengths."""
    flat: list[Any] = []
    for position, argument in enumerate(args[1:], 1):
        numbers = argument if isinstance(argument, list | tuple) else [argument]
        lengths = position >= where and not (where == 1 and position > 1)
        flat += [local.get(number, number) if lengths else number for number in numbers]
    return flat


def _follow_view(op: Op, tensors: Mapping[int, TensorInfo], placement: Placement, ranks: int) -> Followed | Refused:
    assert isinstance(placement, PackedShard)
    viewed = _viewed_as_packed(op, tensors, placement)
    if isinstance(viewed, Refused):
        return viewed
    return Followed((viewed,), local_shape(tensors[op.outputs[0]].shape, viewed, ranks))


def _viewed_as_packed(op: Op, tensors: Mapping[int, TensorInfo], placement: PackedShard) -> Placement | Refused:
    shape, viewed = tensors[op.inputs[0]].shape, tensors[op.outputs[0]].shape
    at, parts, length = _same_place(shape, viewed, placement.dim), placement.parts, shape[placement.dim]
    if at is None:
        return Refused("folds a dim that is several parts side by side into others")
    if viewed[at] % length == 0:
        scaled = tuple(part * (viewed[at] // length) for part in parts)
        return PackedShard(at, scaled)
    if len(set(parts)) == 1 and viewed[at] == len(parts) and at + 1 < len(viewed):
        return Shard(at + 1)
    inner = length // viewed[at]
    if length % viewed[at] or any(part % inner for part in parts):
        return Refused("takes a dim apart across parts of it", parts_wanted(op, tensors, placement), op, op.inputs[0])
    return PackedShard(at, tuple(part // inner for part in parts))


def follow_concatenation(op: Op, tensors: Mapping[int, TensorInfo], inputs: Mapping[int, Placement]) -> Followed | None:
    """Return shards of parts where shards are put side by side."""
    args, kwargs = op.arguments
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    dim %= len(tensors[op.outputs[0]].shape)
    placed = [each for tensor in op.inputs if isinstance(each := inputs[tensor], Shard) and each.dim == dim]
    if len(placed) < len(op.inputs):
        return None
    lengths = [tensors[tensor].shape[dim] for tensor in op.inputs]
    parts = [parts_of(each) or (length,) for each, length in zip(placed, lengths, strict=True)]
    return Followed(
        (in_parts(Shard(dim), tuple(part for each in parts for part in each)),), (*args[1:], *kwargs.values())
    )
