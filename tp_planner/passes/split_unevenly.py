"""Split unevenly: vocabularies that do not divide are computed in unequal parts where nothing else has to know.

A lookup of unequal parts leaves a sum, and logits in unequal parts go into the loss, or are gathered at once. Inside
regions shards are equal, so all other layers gather at use what does not divide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tp_planner.ir.graph import LayerInfo, ModelGraph, VariableInfo
from tp_planner.ir.placement import Placement, Shard, chunk_sizes, divides
from tp_planner.passes.choose_styles import StyleChoice, style_of_contraction
from tp_planner.passes.walk.facts import Closings, LayerMode

Styles = dict[LayerMode, StyleChoice]


def split_unevenly(
    styles: Styles,
    closings: Closings,
    layers: Mapping[str, LayerInfo],
    variables: Mapping[str, VariableInfo],
    stored: Mapping[str, Placement],
    graphs: Sequence[ModelGraph],
    parts: int,
) -> tuple[Styles, Closings]:
    """Return the styles, those of lookups and heads being computed in unequal parts, and the closings that it takes.

    Args:
        styles: the style of each (layer, mode) that has a sharded variable, gathered where that does not divide.
        closings: where sharding ends.
        layers, variables: what they are, by name and by key.
        stored: the placement of each variable by key.
        graphs: the traces of the model.
        parts: number of ranks.
    """
    found = dict(styles)
    for key, choice in styles.items():
        contraction = dict(layers[key[0]].contractions).get(key[1])
        if choice.style != "gathered" or contraction is None:
            continue
        names = [name for name, _ in contraction.weights]
        is_sharded = isinstance(stored[contraction.main_weight], Shard)  # and not its bias alone
        if not is_sharded or not _is_uneven(names, variables, stored, parts):
            continue
        split = style_of_contraction(contraction, stored)
        sizes = chunk_sizes(_length(contraction.main_weight, variables, stored), parts)
        reason = f"ranks have {', '.join(map(str, sizes))} of {sum(sizes)}"
        if split.style == "vocabulary":
            found[key] = replace(split, reason=f"{split.reason}; {reason}")
        elif split.style == "column" and _returns_outputs(key, graphs):
            found[key] = split
            closings = closings.closing(("layer", key), reason)
    return found, closings


def _is_uneven(
    names: Sequence[str], variables: Mapping[str, VariableInfo], stored: Mapping[str, Placement], parts: int
) -> bool:
    """Whether the sharded weights are all cut alike, into unequal parts, and no rank has nothing."""
    sharded = [name for name in names if isinstance(stored[name], Shard)]
    lengths = {_length(name, variables, stored) for name in sharded}
    uneven = all(not divides(variables[name].shape, stored[name], parts) for name in sharded)
    return uneven and len(lengths) == 1 and all(chunk_sizes(lengths.pop(), parts))


def _length(name: str, variables: Mapping[str, VariableInfo], stored: Mapping[str, Placement]) -> int:
    placement = stored[name]
    assert isinstance(placement, Shard)
    return variables[name].shape[placement.dim]


def _returns_outputs(key: LayerMode, graphs: Sequence[ModelGraph]) -> bool:
    """Whether all that a layer's calls return is what the model returns."""
    calls = [(graph, call) for graph in graphs for call in graph.calls.values() if (call.layer, call.mode) == key]
    return bool(calls) and all(tensor in graph.outputs for graph, call in calls for tensor in call.outputs)
