"""Agreement: what must hold of all calls together, once each is followed."""

from __future__ import annotations

from typing import Any

from tp_planner.ir.graph import Call
from tp_planner.ir.placement import WHOLE, SequenceShard
from tp_planner.passes.walk.facts import LayerMode, Origins, changes_of, on_stream
from tp_planner.passes.walk.known import Known
from tp_planner.passes.walk.notes import Notes
from tp_planner.passes.walk.stream import end_of_stream


def require_whole_outputs(known: Known, notes: Notes) -> None:
    """Every rank holds the outputs of the model whole."""
    for tensor in known.graph.outputs:
        if known.placements.get(tensor, WHOLE) != WHOLE:
            origins = known.origins[tensor]
            origins = end_of_stream(tensor, known) if on_stream(origins) else origins
            notes.conflict(0, origins, "it is an output of the model, which every rank holds whole")


def _on_stream(call: Call, known: Known) -> dict[int, int]:
    """Return the tensors that arrive at a call as shards of the stream, by position."""
    parent = call.id if call.parent is None else call.parent
    return {
        position: tensor
        for position, tensor in call.inputs
        if isinstance(known.placement(tensor, parent), SequenceShard)
    }


def require_one_plan_a_layer(known: Known, notes: Notes) -> None:
    """A layer has one plan; where its calls would need different ones, it computes on whole tensors."""
    boundaries: dict[int, list[Any]] = {}
    for p in notes.boundaries:
        boundaries.setdefault(p.call, []).append(
            (p.place, p.position, p.variable, p.boundary.forward, p.boundary.backward)
        )
    functions = notes.functions
    first: dict[LayerMode, tuple[Call, Any]] = {}
    for call in known.graph.calls.values():
        record = notes.records.get(call.id)
        done = (
            record and (record.sharded_inputs, record.output_placement, record.epilogue, record.sees_whole),
            boundaries.get(call.id, []),
            changes_of(functions.get(call.id, ())),
        )
        other, before = first.setdefault((call.layer, call.mode), (call, done))
        if before != done:
            notes.conflict(call.id, _origins_at(other, call, known, notes), called_in_ways(call.layer))


def called_in_ways(layer: str) -> str:
    """Return why regions end at a layer that cannot have one plan for all its calls."""
    return f"layer {layer!r} is called in ways that need different boundaries"


def _origins_at(one: Call, other: Call, known: Known, notes: Notes) -> Origins:
    """Return where all shards come from that two calls of one layer meet; the layer itself, if it is a sharded one."""
    calls, key = (one, other), (one.layer, one.mode)
    ids = {call.id for call in calls}
    streams = [_on_stream(call, known) for call in calls]
    if streams[0].keys() == streams[1].keys() != set() and key not in known.closings.gathers:
        return Origins({("gather", key)})
    if streams[0] or streams[1]:
        tensors = {*streams[0].values(), *streams[1].values()}
        return Origins().union(*(end_of_stream(tensor, known) for tensor in tensors))
    given = (known.origins_of([tensor for _, tensor in call.inputs], call.id) for call in calls)
    met = (meeting.origins for (call, _), meeting in notes.meetings.items() if call in ids)
    in_functions = (origins for call, origins in notes.function_origins.items() if call in ids)
    choice, itself = known.styles.get(key), Origins()
    if choice is not None and key not in known.closings.whole:
        itself = Origins({("whole", key)})
    return itself.union(*given, *met, *in_functions)


def note_regions_that_cross_blocks(known: Known, notes: Notes) -> None:
    """A block through whose ends shards go can stand for others only where nothing has to change on their way."""
    for repeat in known.graph.repeats.values():
        given = (known.placement(twin, repeat.twin) for twin, _ in repeat.inputs)
        made = (known.placement(twin, repeat.twin) for twin, _ in repeat.outputs)
        if any(placement != WHOLE for placement in (*given, *made)):
            notes.regions_cross_blocks = True
