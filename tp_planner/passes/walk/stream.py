"""The residual stream: tensors between regions, sharded over the sequence (Korthikanti et al. 2022, section 4.2).

A sum over the ranks leaves its region as shards of the sequence, and enters the next one gathered. What is between runs
on the shards, where its ops allow it. Where they do not, the stream is gathered: for a layer that is one step at its
inputs, else at a torch function, else where the shards come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from tp_planner.ir.graph import Call, FunctionCall, ModelGraph, Repeat
from tp_planner.ir.placement import WHOLE, Placement, SequenceShard, Shard
from tp_planner.ir.plan import Boundary
from tp_planner.passes.follow_ops import FunctionFollowed, Refused, follow_function
from tp_planner.passes.walk.crossings import cut, gathered
from tp_planner.passes.walk.facts import CallRecord, Origins, Walk
from tp_planner.passes.walk.known import SEQUENCE, Known, as_shards, as_stream, in_other_order
from tp_planner.passes.walk.notes import Notes


@dataclass(frozen=True, slots=True)
class Stream:
    """What becomes of the residual stream: whether all of it is sharded, or else what these layers return of it.

    ``gathers_again``: what layers gather of it is not kept for the backward pass but gathered again there.
    """

    is_sharded: bool
    gathers_again: bool = True
    layers: frozenset[str] = frozenset()

    @property
    def is_anywhere(self) -> bool:
        return self.is_sharded or bool(self.layers)


NO_STREAM = Stream(False)


def takes_stream(call: Call, known: Known) -> bool:
    """Whether a layer takes shards of the stream and no others, and its code is given the sizes that it reads."""
    if any(argument[:2] == (call.layer, call.mode) for argument in known.closings.scales):
        return False
    placed = {known.placement(tensor, call.id) for _, tensor in call.inputs} - {WHOLE}
    return bool(placed) and all(isinstance(placement, SequenceShard) for placement in placed)


def follow_layer_on_stream(call: Call, known: Known, notes: Notes) -> bool:
    """Follow all ops of a layer that takes shards of the stream; return whether that is decided.

    It is not where torch functions are known, at which the layer's code may change what the layer as one cannot.
    """
    graph = known.graph
    ops = graph.ops[slice(*call.ops)]
    made = {tensor for op in ops for tensor in op.outputs}
    taken = {tensor: known.placement(tensor, call.id) for op in ops for tensor in op.inputs if tensor not in made}
    whole_weights = {tensor for tensor in taken if (key := graph.tensors[tensor].variable) and _is_cuttable(key, known)}
    arguments = (*call.inputs, *((-1, tensor) for tensor in sorted(whole_weights)))
    step = FunctionCall(call.layer, call.id, 1, arguments, call.outputs, (), call.ops)
    found: FunctionFollowed | Refused = Refused("")
    if graph.own_gradients.isdisjoint(range(*call.ops)):
        weights = known.weights - whole_weights
        found = follow_function(step, graph, as_shards(taken), weights, known.rules, known.parts)
    if isinstance(found, FunctionFollowed) and not _stays_on_stream(call, found):
        found = Refused(f"layer {call.layer!r} does not return shards of the sequence")
    if isinstance(found, FunctionFollowed):
        _write_down(call, taken, found, known, notes)
        return True
    if graph.functions is not None:
        return False
    notes.conflict(call.id, gather_at(call), found.reason or f"layer {call.layer!r} says what its gradient is")
    return True


def _is_cuttable(variable: str, known: Known) -> bool:
    return known.stored[variable] == WHOLE and variable not in known.passed_on


def _stays_on_stream(call: Call, found: FunctionFollowed) -> bool:
    placed = [found.placements.get(tensor, WHOLE) for tensor in call.outputs]
    return (
        not found.summed
        and not in_other_order(found.placements.values())
        and all(placement == WHOLE or isinstance(placement, Shard) for placement in placed)
    )


def _write_down(
    call: Call, taken: Mapping[int, Placement], found: FunctionFollowed, known: Known, notes: Notes
) -> None:
    origins = known.origins_of(taken, call.id)
    for tensor, placement in found.placements.items():
        known.place(tensor, as_stream(placement), origins)
    notes.followed.update(found.followed)
    for tensor, shard in found.cuts.items():
        assert isinstance(shard, Shard)
        inside, variable = SequenceShard(shard.dim), known.graph.tensors[tensor].variable
        for op in known.graph.ops[slice(*call.ops)]:
            notes.reads_as(op, tensor, inside)
        if variable is not None:
            notes.use_shard_of_stream(call.id, variable, inside)
        for position, given in call.inputs:
            if given == tensor and variable is None:
                notes.cross(call.id, "input", position, tensor, cut(WHOLE, inside))
    for tensor, placement in taken.items():
        if tensor in found.entering and tensor not in found.cuts:
            notes.meets_shards(call.id, tensor, origins, None)
        elif placement == WHOLE:
            notes.reads_whole(call.id, [tensor])
    if known.graph.layers[call.layer].variables:
        sharded = tuple(
            (position, taken[tensor]) for position, tensor in call.inputs if taken.get(tensor, WHOLE) != WHOLE
        )
        placed = found.placements.get(call.outputs[0], WHOLE) if len(call.outputs) == 1 else None
        notes.record(CallRecord(call.id, sharded, placed and as_stream(placed)))


def gather_at(call: Call) -> Origins:
    """Return what a conflict closes that ends where a call takes the stream."""
    return frozenset({("gather", (call.layer, call.mode))})


def gather_around(call: int, origins: Origins, known: Known) -> Origins:
    """Return where sharding ends for an op in the code of ``call`` that cannot follow the stream.

    The innermost layer around it that takes the stream takes it gathered. Where that is a block or the model, in which
    other layers follow it, sharding ends where the shards come from.
    """
    blocks = {outer.id for repeat in known.graph.repeats.values() for outer in known.graph.enclosing(repeat.twin)}
    if not any(kind == "stream" for kind, _ in origins):
        return origins
    for layer in known.graph.enclosing(call):
        if layer.id in blocks or layer.parent is None:
            return origins
        if any(isinstance(known.placement(tensor, layer.id), SequenceShard) for _, tensor in layer.inputs):
            return gather_at(layer)
    return origins


def or_gathered(origins: Origins, graph: ModelGraph, walk: Walk, start: int) -> Origins:
    """Return where shards come from; of the residual stream first, which the innermost call is to gather if it can."""
    of_stream = frozenset(origin for origin in origins if origin[0] == "stream")
    if not of_stream:
        return origins
    gathering = {placed.call for placed in walk.boundaries if isinstance(placed.boundary.forward.source, SequenceShard)}
    for call in graph.enclosing(start):
        takes = {tensor for _, tensor in call.inputs if isinstance(walk.placements.get(tensor), SequenceShard)}
        around = (outer for outer in graph.enclosing(call.id) if outer.id in gathering)
        if takes - {tensor for outer in around for _, tensor in outer.inputs}:
            return frozenset({("gather", (call.layer, call.mode))})
    return of_stream


def change_stream(call: Call, known: Known, notes: Notes) -> None:
    """Let the stream begin or end at what a layer returns."""
    if (call.layer, call.mode) in known.closings.ends:
        _end(call, known, notes)
    else:
        _begin(call, known, notes)


def _end(call: Call, known: Known, notes: Notes) -> None:
    tensor = call.outputs[0]
    placement = known.placements.get(tensor, WHOLE)
    if not isinstance(placement, SequenceShard):
        return
    notes.cross(call.id, "output", 0, tensor, gathered(placement, WHOLE))
    for op in known.graph.ops[slice(*call.ops)]:
        if tensor in op.outputs or tensor in op.inputs:
            notes.reads_as(op, tensor, placement)
    known.forget(tensor)


def _begin(call: Call, known: Known, notes: Notes) -> None:
    tensor, inside = call.outputs[0], SequenceShard(SEQUENCE)
    if (call.layer, call.mode) in known.closings.streams:
        return
    if len(call.outputs) > 1 or tensor in known.placements or not known.can_be_on_stream(tensor):
        return
    notes.cross(call.id, "output", 0, tensor, cut(WHOLE, inside))
    for op in known.graph.ops[slice(*call.ops)]:
        if tensor in op.outputs or tensor in op.inputs:
            notes.reads_as(op, tensor, WHOLE)
    known.place(tensor, inside, frozenset({("stream", (call.layer, call.mode))}))


def _begin_at(tensor: int, known: Known) -> Origins:
    """Return that the stream begins at the layer that returns a tensor, if it can."""
    can = known.can_be_on_stream(tensor)
    for call in known.graph.calls.values():
        inside = known.parents | known.graph.repeats.keys()
        key = (call.layer, call.mode)
        if key in known.closings.ends or key in known.closings.streams:
            continue
        has_ops = call.ops[0] < call.ops[1] and call.id not in inside
        if can and has_ops and call.outputs == (tensor,) and known.contraction(call) is None:
            return frozenset({("begin", (call.layer, call.mode))})
    return frozenset()


def _arriving(tensor: int, call: Call, known: Known) -> Placement:
    return known.placement(tensor, call.id if call.parent is None else call.parent)


def end_of_stream(tensor: int, known: Known) -> Origins:
    """Return that the stream ends at the layer that returns a tensor, or where its shards come from."""
    origins = known.origins[tensor]
    for call in known.graph.calls.values():
        key = (call.layer, call.mode)
        is_leaf = call.id not in known.parents | known.graph.repeats.keys() and call.ops[0] < call.ops[1]
        if call.outputs == (tensor,) and is_leaf and ("stream", key) not in origins and key not in known.closings.ends:
            return frozenset({("end", key)})
    return origins


def mismatch_of_stream(repeat: Repeat, known: Known) -> Origins:
    """Return what is to be changed where of two equal blocks only one takes the stream; nothing where both do."""
    twin, call = known.graph.calls[repeat.twin], known.graph.calls[repeat.call]
    for other, tensor in repeat.inputs:
        given, before = _arriving(tensor, call, known), _arriving(other, twin, known)
        if isinstance(given, SequenceShard) and before == WHOLE:
            return _begin_at(other, known) or end_of_stream(tensor, known)
        if isinstance(before, SequenceShard) and given == WHOLE:
            return _begin_at(tensor, known) or end_of_stream(other, known)
    return Origins()


def cross_at_layers(known: Known, notes: Notes) -> None:
    """Place the boundaries of layers that take the stream gathered."""
    found = Notes(known)
    for call in known.graph.calls.values():
        for position, tensor in call.inputs:
            outside = WHOLE if call.parent is None else known.placement(tensor, call.parent)
            if outside != known.placements.get(tensor, WHOLE):
                notes.taken[call.id, tensor] = outside
            if known.entered_as(call, outside) != outside:
                found.cross(call.id, "input", position, tensor, gathered(outside, WHOLE))
    notes.boundaries[:0] = found.boundaries
    for op in known.graph.ops:
        for tensor in op.inputs:
            placed = known.placements.get(tensor)
            if placed is not None and (placement := known.placement(tensor, op.call)) != placed:
                notes.cut_for.setdefault((op.id, tensor), placement)


def gather_for_function(function: FunctionCall, taken: Mapping[int, Placement]) -> dict[int, Placement] | None:
    """Return what a function takes with the stream gathered; None if it does not take that as arguments."""
    streams = {tensor for tensor, placement in taken.items() if isinstance(placement, SequenceShard)}
    if not streams or not streams <= {tensor for _, tensor in function.inputs}:
        return None
    return {tensor: WHOLE if tensor in streams else placement for tensor, placement in taken.items()}


def share_gathers(known: Known, notes: Notes, again: bool) -> None:
    """Say of each gathering how many inputs share it, and whether it is done again in the backward pass, if ``again``.

    It is where one call makes all that share it. What several blocks read is kept: it is one tensor for all of them.
    """
    graph = known.graph
    readers: dict[tuple[int, Boundary], list[int | None]] = {}
    gathers: list[tuple[int, tuple[int, Boundary]]] = []
    for number, placed in enumerate(notes.boundaries):
        if placed.place == "input" and isinstance(placed.boundary.forward.source, SequenceShard):
            call = graph.calls[placed.call]
            tensor = dict(call.inputs)[placed.position]
            gathers.append((number, (tensor, placed.boundary)))
            readers.setdefault((tensor, placed.boundary), []).append(call.parent)
            for repeat, again_read in _reads_of_repeats(graph, call, tensor):
                readers.setdefault((again_read, placed.boundary), []).append(repeat)
    for number, key in gathers:
        placed, parents = notes.boundaries[number], readers[key]
        made_again = again and placed.boundary.has_gradient and len(set(parents)) == 1
        boundary = replace(placed.boundary, readers=len(parents), again=made_again)
        notes.boundaries[number] = replace(placed, boundary=boundary)


def _reads_of_repeats(graph: ModelGraph, call: Call, tensor: int) -> Iterator[tuple[int, int]]:
    """Yield the calls of blocks that do not run, and the tensors that they read where ``call`` reads ``tensor``."""
    for outer in graph.enclosing(call.id):
        positions = [position for position, given in outer.inputs if given == tensor]
        for repeat in graph.repeats.values():
            if repeat.twin == outer.id and positions:
                yield repeat.call, dict(repeat.inputs).get(tensor, tensor)
