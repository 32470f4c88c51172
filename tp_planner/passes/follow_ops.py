"""Follow ops: what one op, or one call of a torch function, makes of sharded tensors.

Torch functions are the smallest steps of a layer's code at whose ends a boundary can stand. An einsum, say, is several
ops; what it takes can be cut to shards before it, and what it returns can be summed after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tp_planner.ir.graph import FunctionCall, ModelGraph, Op, TensorInfo
from tp_planner.ir.placement import Partial, Placement, Replicate, Shard, divides, in_parts, local_shape, parts_of

WHOLE = Replicate()
MOST_CUTS = 64  # ways of cutting the inputs of one function that are tried
# Where ops take the tensor that they add to what they compute of the others.
ADDED = {"aten.add.Tensor": 1, "aten.add_.Tensor": 1, "aten.addmm.default": 0, "aten.convolution.default": 2}


@dataclass(frozen=True, slots=True)
class Followed:
    """An op that runs on shards without communication: its outputs' placements, its arguments on rank 0.

    ``numbers`` are settings that are others on shards: (for whole tensors, for shards). ``sizes`` are the lengths at
    which it takes a dim apart, in the order in which code writes them, in the same way.
    """

    outputs: tuple[Placement, ...]
    arguments: tuple[Any, ...]
    numbers: tuple[tuple[int, int], ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """An op that cannot run on these shards without communication, and why.

    It could where the sharded dim of ``tensor``, one of those that ``op`` takes, were ``parts`` side by side.
    """

    reason: str
    parts: tuple[int, ...] = ()
    op: Op | None = None
    tensor: int = -1


class ShardingRules(Protocol):
    """Knows how ops act on sharded tensors."""

    def follow(self, op: Op, tensors: Mapping[int, TensorInfo], inputs: Mapping[int, Placement]) -> Followed | Refused:
        """Return what ``op`` makes of inputs placed so; ``inputs`` has an entry for every tensor of the op.

        An output is Partial where every rank has a summand of it.
        """
        ...


@dataclass
class FunctionFollowed:
    """A call of a torch function that runs on shards, with boundaries at its ends only.

    ``placements`` has the tensors that its ops make; ``cuts`` the whole tensors it takes that are cut to shards before
    it, or become the first rank's part of a sum; ``entering`` those that its ops read whole together with shards;
    ``summed`` the outputs that are summands.
    """

    placements: dict[int, Placement] = field(default_factory=dict)
    followed: dict[int, Followed] = field(default_factory=dict)
    cuts: Mapping[int, Shard | Partial] = field(default_factory=dict)
    entering: set[int] = field(default_factory=set)
    summed: set[int] = field(default_factory=set)


def follow_function(
    function: FunctionCall,
    graph: ModelGraph,
    inputs: Mapping[int, Placement],
    weights: Set[int],
    rules: ShardingRules,
    parts: int,
) -> FunctionFollowed | Refused:
    """Return how ``function`` runs on shards; where it does not with whole tensors as they are, with some of them cut.

    Args:
        function: a call of a torch function.
        graph: the traced model.
        inputs: placement of every tensor that its ops take from outside.
        weights: tensors that are never cut: how a weight is stored and used is for the layout to say.
        rules: answers how an op acts on shards.
        parts: size of the model axis.
    """
    refused: Refused | None = None
    for cuts in itertools.islice(_cuts(function, graph, inputs, weights, parts), MOST_CUTS):
        found = _attempt(function, graph, inputs, cuts, weights, rules)
        if isinstance(found, FunctionFollowed):
            return found
        refused = refused or found
    assert refused is not None
    return refused


def _cuts(
    function: FunctionCall, graph: ModelGraph, inputs: Mapping[int, Placement], weights: Set[int], parts: int
) -> Iterator[dict[int, Shard | Partial]]:
    """Yield ways to cut whole tensors that the function takes, the fewest cuts first.

    A dim is cut only if it is as long as a dim that is sharded in another input. What is added to a sum, as the bias of
    a linear function, can be added by one rank.
    """
    lengths = {
        graph.tensors[tensor].shape[placement.dim]: parts_of(placement)
        for tensor, placement in inputs.items()
        if isinstance(placement, Shard)
    }
    assigned, added = _assigned_tensors(function, graph), _added_tensors(function, graph)
    choices: list[list[tuple[int, Shard | Partial] | None]] = []
    for tensor in dict.fromkeys(tensor for _, tensor in function.inputs):
        shape = graph.tensors[tensor].shape
        if inputs.get(tensor, WHOLE) == WHOLE and tensor not in assigned:
            shards = [in_parts(Shard(dim), lengths[length]) for dim, length in enumerate(shape) if length in lengths]
            cuts: list[Shard | Partial] = []
            if tensor not in weights:
                cuts += [shard for shard in shards if isinstance(shard, Shard) and divides(shape, shard, parts)]
            cuts += [Partial()] if tensor in added else []
            choices.append([None, *((tensor, cut) for cut in cuts)])
    ways = [[cut for cut in way if cut is not None] for way in itertools.product(*choices)]
    yield from (dict(way) for way in sorted(ways, key=len))


def _assigned_tensors(function: FunctionCall, graph: ModelGraph) -> set[int]:
    """Return the tensors that an op of the function writes into: a cut one would be a copy."""
    ops = graph.ops[function.ops[0] : function.ops[1]]
    return {op.inputs[0] for op in ops if op.inputs and op.name.split(".")[1].endswith("_")}


def _added_tensors(function: FunctionCall, graph: ModelGraph) -> set[int]:
    """Return the tensors that an op of the function adds to something else."""
    ops = [op for op in graph.ops[function.ops[0] : function.ops[1]] if op.name in ADDED]
    return {op.inputs[ADDED[op.name]] for op in ops if len(op.inputs) > ADDED[op.name]}


def _attempt(
    function: FunctionCall,
    graph: ModelGraph,
    inputs: Mapping[int, Placement],
    cuts: Mapping[int, Shard | Partial],
    weights: Set[int],
    rules: ShardingRules,
) -> FunctionFollowed | Refused:
    found, outside = FunctionFollowed(cuts=cuts), {**inputs, **cuts}
    # Of tensors that are whole: those from outside that they are made from.
    sources: dict[int, frozenset[int]] = {tensor: frozenset({tensor}) for tensor in inputs}
    for op in graph.ops[function.ops[0] : function.ops[1]]:
        given = {tensor: found.placements.get(tensor, outside.get(tensor, WHOLE)) for tensor in op.inputs}
        whole = frozenset[int]().union(
            *(sources.get(tensor, frozenset()) for tensor, placed in given.items() if placed == WHOLE)
        )
        if all(placement == WHOLE for placement in given.values()):
            sources.update(dict.fromkeys(op.outputs, whole))
            continue
        where = f"{op.name} in {graph.calls[op.call].layer!r}"
        followed = rules.follow(op, graph.tensors, given)
        if isinstance(followed, Refused):
            return replace(followed, reason=f"{where} {followed.reason}")
        found.entering |= whole
        found.followed[op.id] = followed
        found.placements.update(zip(op.outputs, followed.outputs, strict=True))
    return _with_sums(found, function, graph, inputs, weights)


def _with_sums(
    found: FunctionFollowed,
    function: FunctionCall,
    graph: ModelGraph,
    inputs: Mapping[int, Placement],
    weights: Set[int],
) -> FunctionFollowed | Refused:
    """Return it with its sums at its ends, if its boundaries move no more than to gather the shards it takes.

    A sharded weight among them is a wish to compute on its shards, whatever that moves.
    """
    where = f"{function.name} in {graph.calls[function.call].layer!r}"
    found.summed = {tensor for tensor in function.outputs if isinstance(found.placements.get(tensor), Partial)}
    moved = sum(2 * graph.tensors[tensor].bytes for tensor in found.summed)
    cut = [tensor for tensor, placement in found.cuts.items() if isinstance(placement, Shard)]
    moved += sum(graph.tensors[tensor].bytes for tensor in cut if graph.tensors[tensor].requires_grad)
    gathered = sum(graph.tensors[tensor].bytes for tensor, placement in inputs.items() if placement != WHOLE)
    if moved > gathered and not any(inputs[tensor] != WHOLE for tensor in weights & inputs.keys()):
        return Refused(f"{where} would communicate more than it takes to gather its inputs")
    ends = [found.placements.get(tensor, WHOLE) for tensor in function.outputs]
    inner = {tensor: placement for tensor, placement in found.placements.items() if tensor not in function.outputs}
    if not function.outputs and any(isinstance(placement, Partial) for placement in inner.values()):
        return Refused(f"{where} leaves a sum over the shards that it does not return")
    if WHOLE in ends and found.entering:
        return Refused(f"{where} returns a tensor that is whole beside shards")
    return found


def sizes_in_arguments(
    function: FunctionCall, graph: ModelGraph, found: FunctionFollowed, parts: int
) -> tuple[tuple[int, int, int], ...]:
    """Return which arguments of a function its code writes for whole tensors, and would have to write for shards.

    They are sizes of a sharded tensor that it returns, or a number that its op takes, as the groups of a convolution.
    Each is (position among the flattened arguments, number for whole tensors, number for shards).
    """
    numbers = {position: value for position, value in function.constants if type(value) is int}
    if taken := [followed.sizes for followed in found.followed.values() if followed.sizes]:
        return _written_in_a_row(numbers, taken[0]) if len(taken) == 1 else ()
    if len(function.outputs) != 1:
        return ()
    tensor = function.outputs[0]
    shape = graph.tensors[tensor].shape
    local = local_shape(shape, found.placements.get(tensor, WHOLE), parts)
    for first in numbers:
        written = [numbers.get(first + dim) for dim in range(len(shape))]
        if local != shape and all(number in (size, -1) for number, size in zip(written, shape, strict=True)):
            return tuple(
                (first + dim, shape[dim], local[dim])
                for dim in range(len(shape))
                if local[dim] != shape[dim] and written[dim] != -1
            )
    last = {value: position for position, value in numbers.items()}
    changed = (pair for followed in found.followed.values() for pair in followed.numbers)
    return tuple((last[whole], whole, local) for whole, local in changed if whole in last)


def _written_in_a_row(
    numbers: Mapping[int, int], sizes: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int, int], ...]:
    """Return where code writes these sizes one after the other, if that is one place."""
    found = [
        first
        for first in numbers
        if all(numbers.get(first + offset) == whole for offset, (whole, _) in enumerate(sizes))
    ]
    if len(found) != 1:
        return ()
    return tuple((found[0] + offset, whole, local) for offset, (whole, local) in enumerate(sizes))
