"""Place boundaries: keep tensors sharded as far as they can be, close regions where they cannot, say why.

Starts from every column-parallel output staying sharded and every weight used as stored; where the walk
meets a conflict, the sharding ends at its origin, and the walk starts again. Each round ends at least one
sharding, so it terminates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx

from tp_planner.ir.errors import PlanError
from tp_planner.ir.graph import Call, ModelGraph, Repeat
from tp_planner.ir.placement import Placement, Replicate, SequenceShard
from tp_planner.ir.plan import Boundary, FunctionPlan, LayerPlan, Style, VariableUse
from tp_planner.passes.choose_styles import StyleChoice
from tp_planner.passes.follow_ops import ShardingRules
from tp_planner.passes.follow_placements import follow_placements
from tp_planner.passes.walk.facts import (
    CallRecord,
    Closings,
    Conflict,
    LayerMode,
    Origins,
    Placed,
    Walk,
    changes_of,
    on_stream,
)
from tp_planner.passes.walk.stream import NO_STREAM, Stream, or_gathered

_QUOTED = re.compile(r"'([^']*)'")


@dataclass(frozen=True, slots=True)
class Placing:
    """Walks over all graphs that agree and have no conflict, the closings that it took, and the conflicts met.

    ``blocks_differ``: the walks ended early, or do not hold, because blocks that repeat others have to be walked, too.
    """

    walks: tuple[Walk, ...]
    closings: Closings
    conflicts: tuple[Conflict, ...]
    blocks_differ: bool


def place_boundaries(
    graphs: Sequence[ModelGraph],
    stored: Mapping[str, Placement],
    styles: Mapping[LayerMode, StyleChoice],
    closings: Closings,
    rules: ShardingRules,
    parts: int,
    stream: Stream = NO_STREAM,
) -> Placing:
    """Return where tensors change their placement.

    Args:
        graphs: the same model traced in its different ways of running (training, inference).
        stored: placement of each variable by key.
        styles: style of each (layer, mode) that has a sharded variable.
        closings: where sharding must end from the start.
        rules: answers how an op acts on shards.
        parts: size of the model axis.
        stream: what becomes of tensors between regions.
    """
    met: list[Conflict] = []
    while True:
        walks = tuple(follow_placements(graph, stored, styles, closings, rules, parts, stream) for graph in graphs)
        conflicts = [conflict for walk in walks for conflict in walk.conflicts]
        conflicts = _of_packing(conflicts) or conflicts or _disagreements(graphs, walks)
        met += conflicts
        differ = any(walk.blocks_differ for walk in walks)
        if differ and not all(conflict.origins for conflict in conflicts):  # of shards that only the other block made
            apart = True
        else:
            apart = must_walk_all_blocks(conflicts, graphs, walks) if conflicts else differ
        if apart or not conflicts:
            return Placing(walks, closings, tuple(met), apart)
        closings = close(closings, conflicts)


def _of_packing(conflicts: Sequence[Conflict]) -> list[Conflict]:
    """Return those that end where a weight is stored in parts: what came after them met whole tensors for shards."""
    return [conflict for conflict in conflicts if any(kind == "packed" for kind, _ in conflict.origins)]


def must_walk_all_blocks(conflicts: Sequence[Conflict], graphs: Sequence[ModelGraph], walks: Sequence[Walk]) -> bool:
    """Whether a conflict ends sharding in one of several equal blocks and not in the others.

    Where its origins lie in the block that it is in, it is the same for equal blocks. Where they lie outside of all
    blocks, sharding ends there, whichever block it was that met it.
    """
    if not any(walk.regions_cross_blocks for walk in walks):
        return False
    repeats = [repeat for graph in graphs for repeat in graph.repeats.values()]
    blocks = {frozenset(names) for repeat in repeats for names in zip(*repeat.layers, strict=True)}
    return any(
        key[0] in block and conflict.layer not in block
        for conflict in conflicts
        for _, key in conflict.origins
        for block in blocks
    )


def _disagreements(graphs: Sequence[ModelGraph], walks: Sequence[Walk]) -> list[Conflict]:
    """Return conflicts for layers of whose code other functions change in training than in inference."""
    first: dict[LayerMode, tuple[list[Any], Origins]] = {}
    conflicts = []
    for graph, walk in zip(graphs, walks, strict=True):
        for call in graph.calls.values():
            if graph.functions is None or call.id in graph.repeats:
                continue
            done = changes_of(walk.functions.get(call.id, ())), walk.function_origins.get(call.id, frozenset())
            known, origins = first.setdefault((call.layer, call.mode), done)
            if known != done[0]:
                reason = f"the code of layer {call.layer!r} runs other functions in training than in inference"
                met = or_gathered(origins | done[1], graph, walk, call.id)
                conflicts.append(Conflict(call.layer, met, reason))
    return conflicts


def close(closings: Closings, conflicts: Sequence[Conflict]) -> Closings:
    """Return the closings with the origins of every conflict added; the first reason of each stays."""
    before = closings
    for conflict in conflicts:
        for origin in sorted(conflict.origins):
            closings = closings.closing(origin, conflict.reason)
    if closings == before:
        raise PlanError(f"the model cannot be planned: {conflicts[0].reason}; take the layout rules of that layer out")
    return closings


def write_layer_plans(
    graphs: Sequence[ModelGraph],
    walks: Sequence[Walk],
    styles: Mapping[LayerMode, StyleChoice],
    closings: Closings,
    again: Set[LayerMode] = frozenset(),
) -> tuple[LayerPlan, ...]:
    """Return one LayerPlan for each (layer, mode) with boundaries or variables, its own or read, in order of execution.

    So has one that is in ``again``: it makes again what its code has made element by element.
    """
    plans: dict[LayerMode, LayerPlan] = {}
    for graph, walk in zip(graphs, walks, strict=True):
        new = _plans_of_graph(graph, walk, styles, closings, again)
        plans.update({key: plan for key, plan in new.items() if key not in plans})
    return tuple(plans.values())


def _plans_of_graph(
    graph: ModelGraph,
    walk: Walk,
    styles: Mapping[LayerMode, StyleChoice],
    closings: Closings,
    again: Set[LayerMode],
) -> dict[LayerMode, LayerPlan]:
    by_call: dict[int, list[Placed]] = {}
    for placed in walk.boundaries:
        by_call.setdefault(placed.call, []).append(placed)
    scopes = _scope_of_layers(graph, region_scopes(graph, walk))
    plans: dict[LayerMode, LayerPlan] = {}
    inside: dict[int, list[LayerPlan]] = {repeat.twin: [] for repeat in graph.repeats.values()}
    reading = {op.call for op in graph.ops if any(graph.tensors[tensor].variable for tensor in op.inputs)}
    for call in graph.calls.values():
        new = []
        if call.id in graph.repeats:
            new = _plans_again(inside[graph.repeats[call.id].twin], graph.repeats[call.id], graph)
        else:
            boundaries, record = by_call.get(call.id, []), walk.records.get(call.id)
            functions = walk.functions.get(call.id, ())
            key = call.layer, call.mode
            has_variables = graph.layers[call.layer].variables or call.id in reading
            if boundaries or record or functions or has_variables or key in again:
                plan = _layer_plan(graph, call, boundaries, record, styles.get(key), closings, scopes.get(key, ""))
                plan = replace(plan, makes_again=True) if key in again else plan
                new = [_with_functions(plan, functions, closings) if functions else plan]
        for plan in new:
            known = plans.get((plan.layer, plan.mode))
            plans[plan.layer, plan.mode] = plan if known is None else replace(known, calls=known.calls + plan.calls)
            for outer in graph.enclosing(call.id):
                if outer.id in inside:
                    inside[outer.id].append(plan)
    return plans


def _with_functions(plan: LayerPlan, functions: tuple[FunctionPlan, ...], closings: Closings) -> LayerPlan:
    """Return the plan of a layer in whose own code something changes."""
    sizes = closings.sizes.get((plan.layer, plan.mode))
    reason = "its ops act on each shard alone" if plan.style == "replicated" else plan.reason
    if any(function.inputs or function.output for function in functions):
        reason = f"{reason}, with boundaries at functions inside"
    if sizes is not None and any(function.sizes for function in functions):
        reason = f"{reason}; its code is given the sizes of shards: {sizes}"
    scaled = [why for argument, why in closings.scales.items() if argument[:2] == (plan.layer, plan.mode)]
    if scaled:
        reason = f"{reason}; {scaled[0]}"
    style: Style = "elementwise" if plan.style == "replicated" else plan.style
    return replace(plan, style=style, reason=reason, functions=functions)


def _plans_again(plans: Sequence[LayerPlan], repeat: Repeat, graph: ModelGraph) -> list[LayerPlan]:
    """Return the plans of the layers in a block that repeats another, from those of their counterparts there."""
    names = dict(repeat.layers) | dict(repeat.variables)
    tensors = tensor_names_again(repeat, graph)
    return [_plan_again(plan, names, tensors, graph) for plan in plans]


def _plan_again(plan: LayerPlan, names: Mapping[str, str], tensors: Mapping[str, str], graph: ModelGraph) -> LayerPlan:
    """Return the plan of a layer in a block that repeats another, by the names that things have in it."""

    def named(text: str) -> str:
        return _QUOTED.sub(lambda quoted: repr(names.get(quoted[1], quoted[1])), text)

    def renamed(boundary: Boundary) -> Boundary:
        tensor = tensors.get(boundary.tensor, boundary.tensor)
        return boundary if tensor == boundary.tensor else replace(boundary, tensor=tensor)

    layer = names[plan.layer]
    return replace(
        plan,
        layer=layer,
        path=graph.layers[layer].path,
        reason=named(plan.reason),
        inputs=tuple((position, renamed(boundary)) for position, boundary in plan.inputs),
        uses=tuple(VariableUse(names[use.variable], renamed(use.boundary)) for use in plan.uses),
        output=plan.output and renamed(plan.output),
        functions=tuple(
            replace(
                function,
                inputs=tuple((position, renamed(boundary)) for position, boundary in function.inputs),
                output=function.output and renamed(function.output),
            )
            for function in plan.functions
        ),
        scope=names.get(plan.scope, plan.scope),
    )


def tensor_names_again(repeat: Repeat, graph: ModelGraph) -> dict[str, str]:
    """Return what the tensors and variables of a block are called that repeats another, by their names there."""
    outside = {graph.tensor_name(twin): graph.tensor_name(tensor) for twin, tensor in repeat.inputs}
    inside = {f"{twin} output": f"{layer} output" for twin, layer in repeat.layers}
    # A layer that is called on its own output has one name for both: what it takes comes from outside.
    return inside | dict(repeat.variables) | outside


def _layer_plan(
    graph: ModelGraph,
    call: Call,
    boundaries: list[Placed],
    record: CallRecord | None,
    choice: StyleChoice | None,
    closings: Closings,
    scope: str,
) -> LayerPlan:
    info = graph.layers[call.layer]
    uses = tuple(VariableUse(p.variable or "", p.boundary) for p in boundaries if p.place == "variable")
    style, reason = _style_and_reason(call, uses, record, choice, closings)
    return LayerPlan(
        layer=info.name,
        path=info.path,
        class_name=info.class_name,
        mode=call.mode,
        style=style,
        reason=reason,
        inputs=tuple((p.position, p.boundary) for p in boundaries if p.place == "input"),
        uses=uses,
        output=next((p.boundary for p in boundaries if p.place == "output"), None),
        output_placement=record.output_placement if record else None,
        epilogue_after_output=record.epilogue if record else "",
        sharded_inputs=record.sharded_inputs if record else (),
        scope=scope if record and (record.sharded_inputs or record.output_placement not in (None, Replicate())) else "",
        dropout_order=record.dropout_order if record else (),
        sees_whole=record is not None and record.sees_whole,
    )


def region_scopes(graph: ModelGraph, walk: Walk) -> dict[int, str]:
    """Return, for each call that takes or returns sharded tensors, the innermost layer whose call holds the region.

    A region is all that is connected through sharded tensors; calls of one layer share their scope.
    """
    regions: nx.Graph = nx.Graph()
    touched: dict[int, set[int]] = {}
    producers = {tensor: op.call for op in graph.ops for tensor in op.outputs}
    for call in graph.calls.values():
        producers.update({tensor: call.id for tensor in call.outputs if call.id in walk.records})
    for tensor, origins in walk.origins.items():
        if on_stream(origins):
            continue
        nx.add_path(regions, sorted(origins))
        for origin in origins:
            regions.add_node(origin)
            touched.setdefault(tensor, set()).add(producers[tensor])
    for op in graph.ops:
        for tensor in op.inputs:
            if tensor in touched:
                touched[tensor].add(op.call)
    for call in graph.calls.values():
        for _, tensor in call.inputs:
            if tensor in touched and call.id in walk.records:
                touched[tensor].add(call.id)
    region_of = {
        origin: number for number, component in enumerate(nx.connected_components(regions)) for origin in component
    }
    calls_of: dict[int, set[int]] = {}
    for tensor, calls in touched.items():
        calls_of.setdefault(region_of[next(iter(walk.origins[tensor]))], set()).update(calls)
    parents = {call.parent for call in graph.calls.values()}
    scopes: dict[int, str] = {}
    for calls in calls_of.values():
        scopes.update(dict.fromkeys(calls, _common_scope(graph, calls, parents)))
    return scopes


def _scope_of_layers(graph: ModelGraph, scopes: Mapping[int, str]) -> dict[LayerMode, str]:
    """Return one scope for each layer: where its calls lie in different ones, the whole model."""
    of_layer: dict[LayerMode, str] = {}
    for call, scope in scopes.items():
        key = (graph.calls[call].layer, graph.calls[call].mode)
        if of_layer.setdefault(key, scope) != scope:
            of_layer[key] = graph.calls[0].layer
    return of_layer


def _common_scope(graph: ModelGraph, calls: set[int], parents: set[int | None]) -> str:
    """Return the layer of the innermost call around all of ``calls``; a call with calls inside is around itself."""
    starts = [call if call in parents else graph.calls[call].parent for call in sorted(calls)]
    chains = [[outer.id for outer in graph.enclosing(start)] for start in starts]
    common = set(chains[0]).intersection(*chains[1:])
    return next(call.layer for call in graph.enclosing(max(common)) if not graph.layers[call.layer].is_stretch)


def _style_and_reason(
    call: Call,
    uses: tuple[VariableUse, ...],
    record: CallRecord | None,
    choice: StyleChoice | None,
    closings: Closings,
) -> tuple[Style, str]:
    if choice is not None and choice.is_contraction and record is not None and record.reason:
        return choice.style, record.reason
    gathered = [use for use in uses if use.boundary.forward.collective == "all_gather"]
    if gathered:
        variable = gathered[0].variable
        reason = closings.reads.get((call.layer, variable)) or (choice.reason if choice else "read outside its layer")
        return "gathered", f"stored sharded, gathered at use: {reason}"
    if record is not None and any(isinstance(each, SequenceShard) for _, each in record.sharded_inputs):
        return "sequence", record.reason or "its ops act on each part of the sequence alone"
    if record is not None and record.sharded_inputs:
        return "elementwise", record.reason or "its ops act on each shard alone"
    if any(not use.boundary.is_identity or use.boundary.forward.source != Replicate() for use in uses):
        return "elementwise", "its ops act on each shard alone"
    return "replicated", "no sharded variable and no sharded input"
