"""Spread conflicts: what the proof found in one layer it would find in all layers of its class that are called alike.

The proof ends where it finds the first difference. Of a model with many such layers each would take a proof of its
own, if what is found in one of them were not said of the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tp_planner.ir.graph import ModelGraph
from tp_planner.passes.walk.facts import Conflict, LayerMode, Walk

_QUOTED = re.compile(r"'([^']*)'")


def spread_conflicts(
    conflicts: Sequence[Conflict],
    alike: Mapping[str, Sequence[Sequence[str]]],
    graphs: Sequence[ModelGraph],
    walks: Sequence[Walk],
) -> list[Conflict]:
    """Return the conflicts, and those that layers alike have.

    Only a layer whose code writes or reads sizes is the cause of its own conflict, and can be judged by its class and
    its call.

    Args:
        conflicts: what a proof found.
        alike: for each layer those of the same code and variables: names of each and of all below it, itself included.
        graphs: the traces of the model.
        walks: the placements found on them.
    """
    found = list(conflicts)
    for conflict in conflicts:
        for kind, key in conflict.origins:
            if (kind == "sizes" or kind == "sees") and len(conflict.origins) == 1:
                found += _in_layers_alike(conflict, kind, (key[0], key[1]), alike[key[0]], graphs, walks)
    return found


def _in_layers_alike(
    conflict: Conflict,
    kind: Literal["sizes", "sees"],
    key: LayerMode,
    alike: Sequence[Sequence[str]],
    graphs: Sequence[ModelGraph],
    walks: Sequence[Walk],
) -> list[Conflict]:
    (layer, mode), found = key, []
    own = next(names for names in alike if names[0] == layer)
    called = _calls(key, graphs, walks)
    for names in alike:
        other = names[0], mode
        has_sizes = kind == "sees" or any(other in walk.writes_sizes for walk in walks)
        if other != key and has_sizes and _calls(other, graphs, walks) == called:
            renamed = dict(zip(own, names, strict=True))
            reason = _QUOTED.sub(lambda quoted, new=renamed: repr(new.get(quoted[1], quoted[1])), conflict.reason)  # type: ignore[misc]
            found.append(Conflict(names[0], frozenset({(kind, other)}), reason, conflict.in_code))
    return found


def _calls(key: LayerMode, graphs: Sequence[ModelGraph], walks: Sequence[Walk]) -> list[set[Any]]:
    """Return in each graph with which tensors a layer is called: shapes, dtypes and placements."""
    return [
        {
            tuple(
                (position, graph.tensors[tensor].shape, graph.tensors[tensor].dtype, walk.placements.get(tensor))
                for position, tensor in call.inputs
            )
            for call in graph.calls.values()
            if (call.layer, call.mode) == key
        }
        for graph, walk in zip(graphs, walks, strict=True)
    ]
