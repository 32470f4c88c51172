"""Refusals: regions that a program thought possible and planning has ended, or ended and planning has not.

The walk over the whole model, and the proof, see what no step alone does: code that writes a number of heads, say. Then
the planner lets layers of the region return whole tensors, or gathers variables. What the region was is forbidden from
then on, in every layout; if a layer that it runs through is called in ways for which it cannot have one plan, all that
would have them differ by sizes in its code. What the planner made of it is in the program already, as other ways. The
planner ends one where it has to, and nowhere else: one that a program ends to save time is forbidden to end there in
that layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import networkx as nx

from tp_planner.ir.graph import ModelGraph
from tp_planner.ir.placement import WHOLE
from tp_planner.ir.plan import Plan
from tp_planner.passes.walk.agreement import called_in_ways
from tp_planner.search.steps import Step
from tp_planner.search.ways import Way

Chosen = Mapping[int, tuple[Step, Way]]  # by column
End = tuple[str, str, str]  # of a region: layer, mode, and "output" or the variable


def refused_regions(graph: ModelGraph, chosen: Chosen, plan: Plan) -> Iterator[frozenset[int]]:
    """Yield the columns of each region of the chosen ways that ends in the plan where it does not in the program.

    With them those of contractions beside it that gather what they make: their shards may be what it met.
    """
    ended = frozenset(_ends_of_plan(plan))
    for columns in regions(chosen):
        of_region = {end for column in columns for end in _ends_of_way(graph, *chosen[column])}
        calls = [graph.calls[chosen[column][0].call] for column in columns]
        layers = {(call.layer, call.mode) for call in calls}
        if any(end[:2] in layers and end not in of_region for end in ended):
            yield columns.union(_gathered_beside(graph, chosen, columns))


def needless_ends(graph: ModelGraph, chosen: Chosen, plan: Plan) -> Iterator[int]:
    """Yield the columns of chosen ways in which a layer gathers what it makes, and does not in the plan."""
    ended = frozenset(_ends_of_plan(plan))
    for column, (step, way) in chosen.items():
        call = graph.calls[step.call]
        gathers = step.layer_call is not None and way.gathers_output
        if gathers and (call.layer, call.mode, "output") not in ended:
            yield column


def is_called_in_ways_that_differ(graph: ModelGraph, plan: Plan) -> bool:
    """Whether regions ended in a plan because a layer cannot have one plan for all its calls."""
    reasons = [layer.reason for layer in plan.layers]
    return any(called_in_ways(name) in reason for name in graph.layers for reason in reasons)


def _gathered_beside(graph: ModelGraph, chosen: Chosen, region: frozenset[int]) -> Iterator[int]:
    """Yield the columns of ways that gather what they make, and of which the region takes something that comes of it.

    They are in calls in which the region has layers or code.
    """
    around = {_call_around(graph, chosen[column][0]) for column in region}
    taken = {tensor for column in region for tensor in chosen[column][0].takes}
    for column, (step, way) in chosen.items():
        if _call_around(graph, step) in around and way.gathers_output and not taken.isdisjoint(_after(graph, step)):
            yield column


def _after(graph: ModelGraph, step: Step) -> set[int]:
    """Return what comes of what a step makes."""
    found = set(step.makes)
    for op in graph.ops[step.ops[1] :]:
        if not found.isdisjoint(op.inputs):
            found.update(op.outputs)
    return found


def _call_around(graph: ModelGraph, step: Step) -> int | None:
    return step.call if step.layer_call is None else graph.calls[step.call].parent


def regions(chosen: Chosen) -> Iterator[frozenset[int]]:
    """Yield the columns of steps that are connected through sharded tensors, or have sharded variables alone."""
    graph: nx.Graph = nx.Graph()
    for column, (_, way) in chosen.items():
        sharded = [slot for slot, placement in (*way.given, *way.made) if placement != WHOLE]
        if sharded:
            graph.add_node(column)
        graph.add_edges_from((column, slot) for slot in sharded if slot.kind == "tensor")
    for component in nx.connected_components(graph):
        yield frozenset(node for node in component if isinstance(node, int))


def _ends_of_plan(plan: Plan) -> Iterator[End]:
    for layer in plan.layers:
        if layer.output is not None and layer.output.forward.collective == "all_gather":
            yield layer.layer, layer.mode, "output"
        for use in layer.uses:
            if use.boundary.forward.collective == "all_gather":
                yield layer.layer, layer.mode, use.variable


def _ends_of_way(graph: ModelGraph, step: Step, way: Way) -> Iterator[End]:
    call = graph.calls[step.call]
    for crossing in way.crossings:
        if crossing.boundary.forward.collective == "all_gather":
            yield call.layer, call.mode, crossing.variable or "output"
