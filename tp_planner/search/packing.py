"""Packing: the parts in which planning stores a weight, where later code takes apart what a layer makes with it.

No step alone shows them: the layer makes shards in one step, and in another its code takes them apart. So the walk over
the whole model is asked once for each dim of each matrix that comes before such code, with nothing else in shards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from tp_planner.ir.contraction import Contraction
from tp_planner.ir.errors import PlanError
from tp_planner.ir.graph import REPEAT, LayerInfo, ModelGraph
from tp_planner.ir.placement import WHOLE, Placement, Shard
from tp_planner.passes.choose_styles import choose_styles
from tp_planner.passes.follow_ops import ShardingRules
from tp_planner.passes.packed_ops import CONCATENATION, taken_apart
from tp_planner.passes.place_boundaries import place_boundaries
from tp_planner.passes.walk.facts import Closings

Parts = tuple[int, ...]
StoredAs = tuple[str, Placement]  # key of a variable, and its plain placement
Options = Mapping[str, Sequence[Placement]]


def parts_of_matrices(graph: ModelGraph, options: Options, rules: ShardingRules, parts: int) -> dict[StoredAs, Parts]:
    """Return the parts in which planning stores matrices that are placed so, where it does."""
    found: dict[StoredAs, Parts] = {}
    for layer in _layers_before(graph):
        for stored in _with_one_matrix(layer, graph, options):
            placed = dict.fromkeys(graph.variables, WHOLE) | stored
            styles = choose_styles({layer.name: layer}, graph.variables, placed, parts)
            with contextlib.suppress(PlanError):
                placing = place_boundaries([graph], placed, styles, Closings(), rules, parts)
                found.update(((key, placed[key]), each) for (_, key), each in placing.closings.packed.items())
    return found


def _layers_before(graph: ModelGraph) -> list[LayerInfo]:
    """Return the layers of which ops take apart what they make, or put it side by side with something else."""
    makers = {tensor: op for op in graph.ops if op.name != REPEAT for tensor in op.outputs}
    ahead = [op for op in graph.ops if op.name == CONCATENATION or (op.inputs and taken_apart(op, graph.tensors))]
    seen, found = {op.id for op in ahead}, set()
    for op in ahead:  # which grows
        for tensor in op.inputs:
            maker = makers.get(tensor)
            if graph.tensors[tensor].variable is not None:
                found.add(graph.calls[op.call].layer)
            elif maker is not None and graph.layers[graph.calls[maker.call].layer].contractions:
                found.add(graph.calls[maker.call].layer)
            elif maker is not None and maker.id not in seen:
                seen.add(maker.id)
                ahead.append(maker)
    return [layer for name, layer in graph.layers.items() if name in found]


def _with_one_matrix(layer: LayerInfo, graph: ModelGraph, options: Options) -> Iterator[dict[str, Placement]]:
    """Yield what is sharded with one matrix of a layer: where that is a contraction's, all that has its output dim."""
    contractions = [each for _, each in layer.contractions]
    contracted = {key for each in contractions for key, _ in each.weights}
    for contraction in contractions:
        main = contraction.main_weight
        sharded = [contraction.labels(main)[shard.dim] for shard in options[main] if isinstance(shard, Shard)]
        yield from (_with_label(contraction, label, options) for label in sharded if label in contraction.output)
    for key in layer.variables:
        if key not in contracted and len(graph.variables[key].shape) > 1:
            yield from ({key: shard} for shard in options[key] if shard != WHOLE)


def _with_label(contraction: Contraction, label: str, options: Options) -> dict[str, Placement]:
    shards = ((key, Shard(labels.find(label))) for key, labels in contraction.weights if label in labels)
    return {key: shard for key, shard in shards if shard in options[key]}
