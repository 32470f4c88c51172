"""Unequal parts: vocabularies that do not divide, and are computed in parts all the same."""

from __future__ import annotations

from tp_planner.ir.graph import LayerInfo, ModelGraph
from tp_planner.ir.placement import WHOLE, Placement, Shard
from tp_planner.passes.choose_styles import choose_styles
from tp_planner.passes.split_unevenly import split_unevenly
from tp_planner.passes.walk.facts import Closings


def unequal_parts(graph: ModelGraph, parts: int) -> dict[str, Placement]:
    """Return the placements of matrices, by key, of which lookups and heads can be computed in unequal parts."""
    owners: dict[str, dict[str, LayerInfo]] = {}
    for name, layer in graph.layers.items():
        for key in dict.fromkeys(each.main_weight for _, each in layer.contractions):
            owners.setdefault(key, {})[name] = layer
    found: dict[str, Placement] = {}
    for key, layers in owners.items():
        shape = graph.variables[key].shape
        shards = [Shard(dim) for dim, length in enumerate(shape) if length % parts and length > parts]
        if len(shape) > 1:
            found.update((key, shard) for shard in shards if _are_computed_so(graph, key, shard, layers, parts))
    return found


def _are_computed_so(graph: ModelGraph, key: str, shard: Placement, layers: dict[str, LayerInfo], parts: int) -> bool:
    """Whether all layers with a weight compute it in its unequal parts."""
    stored = dict.fromkeys(graph.variables, WHOLE) | {key: shard}
    styles = choose_styles(layers, graph.variables, stored, parts)
    split, _ = split_unevenly(styles, Closings(), layers, graph.variables, stored, [graph], parts)
    return bool(split) and all(choice.style != "gathered" for choice in split.values())
