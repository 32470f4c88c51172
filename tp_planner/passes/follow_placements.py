"""Follow placements: from the sharded weights through the ops of the model, as far as tensors stay sharded.

One walk over the traced ops in order of execution. A contraction layer turns a whole tensor into a sharded one
(column-parallel) or a sharded one back into a whole one (row-parallel); every op between is asked for its
sharding rule. Where torch functions were recorded, tensors can change at their ends too. Where a tensor cannot stay
sharded the walk reports a conflict, with the layers and variable uses the sharding came from. Every tensor is whole
or sharded; sums over ranks exist only inside a boundary.

The parts of the walk lie in ``walk/``: what it knows (``known``), what it asks (``layers``, ``code``), what it places
and checks at the end (``entering``, ``agreement``), what it writes down (``notes``), what it hands on (``facts``).
"""

from __future__ import annotations

from collections.abc import Mapping

from tp_planner.ir.graph import Call, ModelGraph
from tp_planner.ir.placement import WHOLE, Placement
from tp_planner.passes.choose_styles import StyleChoice
from tp_planner.passes.follow_ops import ShardingRules
from tp_planner.passes.walk.agreement import (
    note_regions_that_cross_blocks,
    require_one_plan_a_layer,
    require_whole_outputs,
)
from tp_planner.passes.walk.code import follow_op, follow_torch_function
from tp_planner.passes.walk.entering import enter_tensors_read_with_shards
from tp_planner.passes.walk.facts import CallRecord, Closings, LayerMode, Walk
from tp_planner.passes.walk.known import Known
from tp_planner.passes.walk.layers import follow_contraction, follow_dropout
from tp_planner.passes.walk.notes import Notes
from tp_planner.passes.walk.packing import stored_in_parts
from tp_planner.passes.walk.stream import (
    NO_STREAM,
    Stream,
    change_stream,
    cross_at_layers,
    follow_layer_on_stream,
    share_gathers,
    takes_stream,
)


def follow_placements(
    graph: ModelGraph,
    stored: Mapping[str, Placement],
    styles: Mapping[LayerMode, StyleChoice],
    closings: Closings,
    rules: ShardingRules,
    parts: int,
    stream: Stream = NO_STREAM,
) -> Walk:
    """Return the placement of every tensor of ``graph`` and the boundaries between them.

    Args:
        graph: the traced model.
        stored: placement of each variable by key.
        styles: style of each (layer, mode) that has a sharded variable.
        closings: where sharding must end at once, from earlier walks.
        rules: answers how an op acts on shards.
        parts: size of the model axis.
        stream: what becomes of tensors between regions.
    """
    stored = stored_in_parts(stored, styles, closings, graph)
    known = Known(graph, stored, styles, closings, rules, parts, stream.is_sharded, stream.layers)
    notes = Notes(known)
    _follow_all(known, notes)
    _record_sharded_arguments(known, notes)
    enter_tensors_read_with_shards(known, notes)
    cross_at_layers(known, notes)
    share_gathers(known, notes, stream.gathers_again)
    require_whole_outputs(known, notes)
    require_one_plan_a_layer(known, notes)
    note_regions_that_cross_blocks(known, notes)
    return notes.walk()


def _follow_all(known: Known, notes: Notes) -> None:
    """Follow in order of execution what is one step: calls of some layers, torch functions, all other ops."""
    graph = known.graph
    with_ops = [call for call in graph.calls.values() if call.ops[0] < call.ops[1]]
    layers = {call.ops[0]: call for call in with_ops if known.is_one_step(call)}
    leaves = {call.ops[0]: call for call in with_ops if call.id not in known.parents | graph.repeats.keys()}
    functions = {function.ops[0]: function for function in graph.functions or ()}
    returns: dict[int, Call] = {call.ops[1]: call for call in with_ops if known.changes_stream(call)}
    after = 0  # the last step
    for op in graph.ops:
        if op.id < after:
            continue
        if op.id in returns:
            change_stream(returns[op.id], known, notes)
        leaf = leaves.get(op.id)
        if op.id in layers:
            after = layers[op.id].ops[1]
            _follow_layer(layers[op.id], known, notes)
        elif leaf is not None and takes_stream(leaf, known) and follow_layer_on_stream(leaf, known, notes):
            after = leaf.ops[1]
        elif op.id in functions:
            after = functions[op.id].ops[1]
            follow_torch_function(functions[op.id], known, notes)
        else:
            after = op.id + 1
            follow_op(op, known, notes)
    if len(graph.ops) in returns:
        change_stream(returns[len(graph.ops)], known, notes)


def _follow_layer(call: Call, known: Known, notes: Notes) -> None:
    notes.skipped_ops.update(range(*call.ops))
    choice = known.contraction(call)
    if choice is not None:
        follow_contraction(call, choice, known, notes)
    else:
        follow_dropout(call, known, notes)


def _record_sharded_arguments(known: Known, notes: Notes) -> None:
    """Note which layers with variables, or that see whole tensors, planned from their ops, take sharded tensors."""
    for call in known.graph.calls.values():
        sees_whole = (call.layer, call.mode) in known.closings.sees
        has_variables = bool(known.graph.layers[call.layer].variables)
        if call.id in notes.records or call.id in known.parents or not (has_variables or sees_whole):
            continue
        placed = [(position, known.placement(tensor, call.id)) for position, tensor in call.inputs]
        sharded = tuple((position, placement) for position, placement in placed if placement != WHOLE)
        if has_variables or sharded:
            notes.record(CallRecord(call.id, sharded, sees_whole=sees_whole and bool(sharded)))
