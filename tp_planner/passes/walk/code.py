"""The code between: ops one by one, and torch functions, at whose ends tensors can change."""

from __future__ import annotations

from collections.abc import Mapping

from tp_planner.ir.graph import REPEAT, FunctionCall, Op, Repeat
from tp_planner.ir.placement import WHOLE, Partial, Placement, SequencePartial, SequenceShard
from tp_planner.passes.follow_ops import Followed, FunctionFollowed, Refused, follow_function, sizes_in_arguments
from tp_planner.passes.walk.crossings import cut, entering, gathered, summed
from tp_planner.passes.walk.cutting import cut_arguments
from tp_planner.passes.walk.facts import Origins, is_mixed, on_stream
from tp_planner.passes.walk.known import JOINED, OWN_GRADIENT, Known, as_shards, as_stream, in_other_order
from tp_planner.passes.walk.notes import Notes
from tp_planner.passes.walk.packing import note_refusal
from tp_planner.passes.walk.stream import gather_for_function, mismatch_of_stream

MIXED = "would combine shards of the sequence with other ones"


def follow_op(op: Op, known: Known, notes: Notes) -> None:
    """Follow an op: where it reads shards, its sharding rule says what it makes of them."""
    call = op.call
    if op.name == REPEAT:
        notes.reads_whole(call, op.inputs)
        _follow_block(known.graph.repeats[call], known, notes)
        return
    inputs = {tensor: known.placement(tensor, call) for tensor in op.inputs}
    if all(placement == WHOLE for placement in inputs.values()):
        notes.reads_whole(call, op.inputs)
        return
    origins = known.origins_of(op.inputs, call)
    followed = Refused(MIXED) if is_mixed(origins) else known.follow(op, inputs)
    if isinstance(followed, Followed) and on_stream(origins) and in_other_order(followed.outputs):
        followed = Refused(JOINED)
    if isinstance(followed, Refused):
        reason = f"{op.name} in {known.graph.calls[call].layer!r} {followed.reason}"
        note_refusal(followed, call, origins, reason, known, notes, in_code=op.id not in known.graph.own_gradients)
        return
    notes.followed[op.id] = followed
    for tensor, placement in zip(op.outputs, followed.outputs, strict=True):
        known.place(tensor, as_stream(placement) if on_stream(origins) else placement, origins)
    for tensor, placement in inputs.items():
        if placement == WHOLE:
            notes.meets_shards(call, tensor, origins, None)


def _follow_block(repeat: Repeat, known: Known, notes: Notes) -> None:
    """Let a block that does what another did make the same shards, if it is given the same."""
    given = [(known.placement(twin, repeat.twin), known.placement(own, repeat.call)) for twin, own in repeat.inputs]
    if origins := mismatch_of_stream(repeat, known):
        reason = f"the block {repeat.block!r}, and one that it is like, take it in different ways"
        notes.conflict(0, origins, reason)
    elif any(twin != own for twin, own in given):
        notes.blocks_differ = True
    for twin, own in repeat.outputs:
        if twin in known.placements:
            known.place(own, known.placements[twin], _origins_again(twin, repeat, known))


def _origins_again(output: int, repeat: Repeat, known: Known) -> Origins:
    """Return where the shards come from in what a repeating block made: from inside of it, or from before it.

    Where they come from before it, they do so by the inputs that brought those of the other block.
    """
    names = dict(repeat.layers) | dict(repeat.variables)
    origins = known.origins[output]
    inside = {(kind, (names[key[0]], names.get(key[1], key[1]))) for kind, key in origins if key[0] in names}
    before = (
        known.origins_of([own], repeat.call)
        for twin, own in repeat.inputs
        if known.origins_of([twin], repeat.twin) & origins
    )
    return Origins().union(inside, *before)  # type: ignore[arg-type]


def follow_torch_function(function: FunctionCall, known: Known, notes: Notes) -> None:
    """Follow the ops of a torch function together: tensors can change before it and after it."""
    graph, call = known.graph, function.call
    if scales := known.scales_of(function):
        notes.scale(function, scales)
    ops = graph.ops[slice(*function.ops)]
    made = {tensor for op in ops for tensor in op.outputs}
    taken = {tensor: known.placement(tensor, call) for op in ops for tensor in op.inputs if tensor not in made}
    if all(placement == WHOLE for placement in taken.values()):
        for op in ops:
            follow_op(op, known, notes)
        return
    origins = known.origins_of(taken, call)
    if not graph.own_gradients.isdisjoint(range(*function.ops)):
        notes.conflict(call, origins, f"{function.name} in {graph.calls[call].layer!r} {OWN_GRADIENT}")
        return
    found = _follow(function, taken, origins, known)
    if isinstance(found, Refused) and (without := gather_for_function(function, taken)) is not None:
        origins = frozenset(origin for origin in origins if not on_stream(frozenset({origin})))
        found = _follow(function, without, origins, known)
        if isinstance(found, FunctionFollowed):
            _gather_ends(function, taken, found, known, notes)
            taken = without
    if isinstance(found, Refused):
        note_refusal(found, call, origins or known.origins_of(taken, call), found.reason, known, notes)
        return
    for tensor, placement in found.placements.items():
        if tensor not in found.summed:
            known.place(tensor, as_stream(placement) if on_stream(origins) else placement, origins)
    notes.followed.update(found.followed)
    notes.function_origins[call] = notes.function_origins.get(call, frozenset()) | origins
    _change_ends(function, found, origins, known, notes)
    _change_sizes(function, found, known, notes)
    for tensor, placement in taken.items():
        if tensor in found.entering:
            is_argument = any(given == tensor for _, given in function.inputs)
            notes.meets_shards(call, tensor, origins, function if is_argument else None)
        elif placement == WHOLE:
            notes.reads_whole(call, [tensor])


def _follow(
    function: FunctionCall, taken: Mapping[int, Placement], origins: Origins, known: Known
) -> FunctionFollowed | Refused:
    if is_mixed(origins):
        return Refused(f"{function.name} in {known.graph.calls[function.call].layer!r} {MIXED}")
    if all(placement == WHOLE for placement in taken.values()):
        return FunctionFollowed()
    found = follow_function(function, known.graph, as_shards(taken), known.weights, known.rules, known.parts)
    if isinstance(found, Refused) or not on_stream(origins):
        return found
    if any("float" not in known.graph.tensors[tensor].dtype for tensor in found.summed):
        return Refused(f"{function.name} in {known.graph.calls[function.call].layer!r} leaves a sum that is no number")
    if in_other_order(found.placements.values()):
        return Refused(f"{function.name} in {known.graph.calls[function.call].layer!r} {JOINED}")
    # In a call that keeps the stream whole, sizes are those that the code writes.
    if sizes_in_arguments(function, known.graph, found, known.parts):
        return Refused(f"{function.name} in {known.graph.calls[function.call].layer!r} is given sizes of the whole")
    return found


def _gather_ends(
    function: FunctionCall, taken: Mapping[int, Placement], found: FunctionFollowed, known: Known, notes: Notes
) -> None:
    """Write down the inputs of a function that are gathered from the stream."""
    for position, tensor in function.inputs:
        outside = taken.get(tensor, WHOLE)
        if isinstance(outside, SequenceShard):
            enters = tensor in found.entering
            notes.cross_into(function, position, tensor, entering(outside) if enters else gathered(outside, WHOLE))
            found.entering.discard(tensor)
            for op in known.graph.ops[slice(*function.ops)]:
                notes.reads_as(op, tensor, WHOLE)


def _change_ends(function: FunctionCall, found: FunctionFollowed, origins: Origins, known: Known, notes: Notes) -> None:
    """Write down the inputs that are cut and the outputs that are summed."""
    early = frozenset[int]() if on_stream(origins) else cut_arguments(function, found.cuts, origins, known, notes)
    late = {tensor: shard for tensor, shard in found.cuts.items() if tensor not in early}
    cuts = {tensor: as_stream(shard) if on_stream(origins) else shard for tensor, shard in late.items()}
    for position, tensor in function.inputs:
        if tensor in cuts:
            notes.cross_into(function, position, tensor, cut(WHOLE, cuts[tensor]))
    for op in range(*function.ops):
        notes.cut_for.update({(op, tensor): shard for tensor, shard in cuts.items()})
    layer = known.graph.calls[function.call]
    for tensor in found.summed:
        outside = WHOLE if on_stream(origins) else known.outside_of_sum(tensor, layer)
        notes.cross_out_of(function, tensor, summed(outside, SequencePartial() if on_stream(origins) else Partial()))
        if outside != WHOLE:
            known.place(tensor, outside, frozenset({("stream", (layer.layer, layer.mode))}))


def _change_sizes(function: FunctionCall, found: FunctionFollowed, known: Known, notes: Notes) -> None:
    """Write down the sizes of shards, if the layer is given them; else that it could be."""
    sizes, layer = sizes_in_arguments(function, known.graph, found, known.parts), known.graph.calls[function.call]
    key = layer.layer, layer.mode
    if sizes and (key in known.closings.sizes or key in known.closings.sees):
        notes.resize(function, sizes)
    elif sizes:
        notes.writes_sizes.setdefault(key, set()).add((function.name, function.number))
