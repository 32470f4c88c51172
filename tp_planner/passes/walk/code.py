"""The code between: ops one by one, and torch functions, at whose ends tensors can change."""

from __future__ import annotations

from tp_planner.ir.graph import REPEAT, FunctionCall, Op, Repeat
from tp_planner.ir.placement import WHOLE
from tp_planner.passes.follow_ops import FunctionFollowed, Refused, follow_function, sizes_in_arguments
from tp_planner.passes.walk.crossings import cut, summed
from tp_planner.passes.walk.facts import Origins
from tp_planner.passes.walk.known import OWN_GRADIENT, Known
from tp_planner.passes.walk.notes import Notes


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
    origins, followed = known.origins_of(op.inputs, call), known.follow(op, inputs)
    if isinstance(followed, Refused):
        reason = f"{op.name} in {known.graph.calls[call].layer!r} {followed.reason}"
        notes.conflict(call, origins, reason, in_code=op.id not in known.graph.own_gradients)
        return
    notes.followed[op.id] = followed
    for tensor, placement in zip(op.outputs, followed.outputs, strict=True):
        known.place(tensor, placement, origins)
    for tensor, placement in inputs.items():
        if placement == WHOLE:
            notes.meets_shards(call, tensor, origins, None)


def _follow_block(repeat: Repeat, known: Known, notes: Notes) -> None:
    """Let a block that does what another did make the same shards, if it is given the same."""
    given = [(known.placement(twin, repeat.twin), known.placement(own, repeat.call)) for twin, own in repeat.inputs]
    if any(twin != own for twin, own in given):
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
    inside = {(kind, (names[layer], names.get(other, other))) for kind, (layer, other) in origins if layer in names}
    before = (
        known.origins_of([own], repeat.call)
        for twin, own in repeat.inputs
        if known.origins_of([twin], repeat.twin) & origins
    )
    return Origins().union(inside, *before)  # type: ignore[arg-type]


def follow_torch_function(function: FunctionCall, known: Known, notes: Notes) -> None:
    """Follow the ops of a torch function together: tensors can change before it and after it."""
    graph, call = known.graph, function.call
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
    found = follow_function(function, graph, taken, known.weights, known.rules, known.parts)
    if isinstance(found, Refused):
        notes.conflict(call, origins, found.reason, in_code=True)
        return
    for tensor, placement in found.placements.items():
        if tensor not in found.summed:
            known.place(tensor, placement, origins)
    notes.followed.update(found.followed)
    notes.function_origins[call] = notes.function_origins.get(call, frozenset()) | origins
    _change_ends(function, found, known, notes)
    _change_sizes(function, found, known, notes)
    for tensor, placement in taken.items():
        if tensor in found.entering:
            is_argument = any(given == tensor for _, given in function.inputs)
            notes.meets_shards(call, tensor, origins, function if is_argument else None)
        elif placement == WHOLE:
            notes.reads_whole(call, [tensor])


def _change_ends(function: FunctionCall, found: FunctionFollowed, known: Known, notes: Notes) -> None:
    """Write down the inputs that are cut and the outputs that are summed."""
    for position, tensor in function.inputs:
        if tensor in found.cuts:
            notes.cross_into(function, position, tensor, cut(known.outside(tensor), found.cuts[tensor]))
    for op in range(*function.ops):
        notes.cut_for.update({(op, tensor): shard for tensor, shard in found.cuts.items()})
    for tensor in found.summed:
        notes.cross_out_of(function, tensor, summed(known.outside(tensor)))


def _change_sizes(function: FunctionCall, found: FunctionFollowed, known: Known, notes: Notes) -> None:
    """Write down the sizes of shards, if the layer is given them; else that it could be."""
    sizes, layer = sizes_in_arguments(function, known.graph, found, known.parts), known.graph.calls[function.call]
    if sizes and (layer.layer, layer.mode) in known.closings.sizes:
        notes.resize(function, sizes)
    elif sizes:
        notes.writes_sizes.add((layer.layer, layer.mode))
