"""Cutting: whole tensors that a function in a layer's code takes as shards.

They are cut at the function; but where the layer's code gets numbers for it from their sizes, as that of convolutions
counts groups, they are cut before that code has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tp_planner.ir.graph import FunctionCall, Op
from tp_planner.ir.placement import WHOLE, Partial, Placement, Shard, divides, in_parts, parts_of
from tp_planner.passes.follow_ops import Followed
from tp_planner.passes.walk.crossings import cut
from tp_planner.passes.walk.facts import Origins
from tp_planner.passes.walk.known import CONVOLUTION, Known
from tp_planner.passes.walk.notes import Notes


@dataclass(frozen=True, slots=True)
class _Before:
    """How an argument is cut, and what the ops make of it that come between it and a function."""

    shard: Placement
    followed: list[Followed]


def cut_arguments(
    function: FunctionCall, cuts: Mapping[int, Shard | Partial], origins: Origins, known: Known, notes: Notes
) -> frozenset[int]:
    """Cut what a function takes as shards where its layer is called, if that is wanted and can be; return what is."""
    graph, call = known.graph, known.graph.calls[function.call]
    if call.id in known.parents or all(op.name != CONVOLUTION for op in graph.ops[slice(*function.ops)]):
        return frozenset()
    found = set()
    for tensor, shard in cuts.items():
        ops = _layouts_of_argument(tensor, call.id, known)
        if not isinstance(shard, Shard) or ops is None or (before := _cut_before(ops, tensor, shard, known)) is None:
            continue
        source = ops[0].inputs[0] if ops else tensor
        for position, given in call.inputs:
            if given == source:
                notes.cross(call.id, "input", position, source, cut(WHOLE, before.shard))
        for reader in graph.ops[slice(*call.ops)]:
            if source in reader.inputs:
                notes.reads_as(reader, source, before.shard)
        for op, followed in zip(ops, before.followed, strict=True):
            notes.followed[op.id] = followed
            known.place(op.outputs[0], followed.outputs[0], origins)
        found.add(tensor)
    return frozenset(found)


def _layouts_of_argument(tensor: int, call: int, known: Known) -> list[Op] | None:
    """Return the ops, first to last, that make a tensor of one argument of a call, for which alone that is read."""
    given = {each for _, each in known.graph.calls[call].inputs}
    inside = known.graph.ops[slice(*known.graph.calls[call].ops)]
    ops: list[Op] = []
    while True:
        if sum(each == tensor for op in inside for each in op.inputs) != 1:
            return None
        if tensor in given:
            return ops[::-1]
        op = known.makers.get(tensor)
        if op is None or op.call != call or len(op.inputs) != 1 or len(op.outputs) != 1:
            return None
        ops.append(op)
        tensor = op.inputs[0]


def _cut_before(ops: list[Op], tensor: int, shard: Shard, known: Known) -> _Before | None:
    """Return how to cut what the first op takes, so that the last makes ``shard`` of it; None if that cannot be."""
    source = ops[0].inputs[0] if ops else tensor
    shape = known.graph.tensors[source].shape
    for dim in range(len(shape)):
        first = in_parts(Shard(dim), parts_of(shard))
        if divides(shape, first, known.parts):
            made = _followed(ops, first, known)
            if len(made) == len(ops) and (made[-1].outputs[0] if made else first) == shard:
                return _Before(first, made)
    return None


def _followed(ops: list[Op], placed: Placement, known: Known) -> list[Followed]:
    """Return what ops, each of which takes what the one before it made, make of shards, as far as they can."""
    made: list[Followed] = []
    for op in ops:
        followed = known.follow(op, {op.inputs[0]: placed})
        if not isinstance(followed, Followed):
            break
        made.append(followed)
        placed = followed.outputs[0]
    return made
