"""The residual stream: what lets a layout found without it have the stream in shards of the sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tp_planner.ir.graph import ModelGraph
from tp_planner.ir.placement import Placement, Shard
from tp_planner.ir.plan import LayerPlan
from tp_planner.readable_plan import Plan


def as_sums(plan: Plan, graph: ModelGraph, options: Mapping[str, Sequence[Placement]]) -> dict[str, Placement] | None:
    """Return the weights, by key, that are to be cut along another dim for the stream to begin in shards.

    A lookup in columns returns shards of features, and gathers them; in rows it returns a sum, which a reduce-scatter
    turns into shards of the sequence. None if a layer gathers what no other dim makes a sum.

    Args:
        plan: a plan with the stream whole.
        graph: its model's.
        options: where weights can be cut, by key.
    """
    returned = {graph.tensor_name(tensor) for tensor in graph.outputs}
    stored = {each.key: each.placement for each in plan.variables}
    found: dict[str, Placement] = {}
    for layer in plan.layers:
        if not _gathers(layer) or (layer.output and layer.output.tensor in returned):
            continue
        own = graph.layers[layer.layer].variables
        cut = [key for key in own if len(graph.variables[key].shape) > 1 and isinstance(stored[key], Shard)]
        others = [[each for each in options[key] if each != stored[key] and isinstance(each, Shard)] for key in cut]
        if not others or not all(others):
            return None
        found.update((key, shards[0]) for key, shards in zip(cut, others, strict=True))
    return found


def _gathers(layer: LayerPlan) -> bool:
    return layer.output is not None and layer.output.forward.collective == "all_gather"
