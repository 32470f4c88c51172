"""Spread conflicts: what the proof found in one layer it would find in all layers of its class that are called alike.

The proof ends where it finds the first difference. Of a model with many such layers each would take a proof of its
own, if what is found in one of them were not said of the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from tp_planner.ir.graph import ModelGraph
from tp_planner.passes.walk.facts import Conflict, LayerMode, NumberedFunction, Walk

Alike = Mapping[str, Sequence[Sequence[str]]]  # for each layer: names of each that is, and of all below it
_QUOTED = re.compile(r"'([^']*)'")


def spread_conflicts(
    conflicts: Sequence[Conflict],
    alike: Alike,
    of_one_class: Alike,
    graphs: Sequence[ModelGraph],
    walks: Sequence[Walk],
) -> list[Conflict]:
    """Return the conflicts, and those that layers alike have.

    Only a layer whose code writes or reads sizes is the cause of its own conflict, and can be judged by its class and
    its call: by the functions for which it writes them, or by how the tensors are placed of which it reads them.

    Args:
        conflicts: what a proof found.
        alike: for each layer those of the same code and variables, itself included.
        of_one_class: for each layer those of the same code.
        graphs: the traces of the model.
        walks: the placements found on them.
    """
    found = list(conflicts)
    for conflict in conflicts:
        for kind, key in conflict.origins:
            if kind in ("sizes", "sees") and len(conflict.origins) == 1:
                layer = key[0], key[1]
                found += _where_called_alike(conflict, kind, layer, alike[layer[0]], graphs, walks)
                known = {each for other in found for each in other.origins}
                if kind == "sizes":
                    others = _where_sizes_are_written(layer, of_one_class[layer[0]], walks)
                else:
                    others = _where_sizes_are_read(layer, of_one_class[layer[0]], graphs, walks)
                found += [
                    Conflict(other[0], frozenset({(kind, other)}), conflict.reason, conflict.in_code)
                    for other in others
                    if (kind, other) not in known
                ]
    return found


def _where_called_alike(
    conflict: Conflict,
    kind: Literal["sizes", "sees"],
    key: LayerMode,
    alike: Sequence[Sequence[str]],
    graphs: Sequence[ModelGraph],
    walks: Sequence[Walk],
) -> Iterator[Conflict]:
    """Yield the conflict as it is in the other layers that are called with equal tensors."""
    own = next(names for names in alike if names[0] == key[0])
    called = _calls(key, graphs, walks)
    for names in alike:
        other = names[0], key[1]
        has_sizes = kind == "sees" or any(other in walk.writes_sizes for walk in walks)
        if other != key and has_sizes and _calls(other, graphs, walks) == called:
            renamed = dict(zip(own, names, strict=True))
            reason = _QUOTED.sub(lambda quoted, new=renamed: repr(new.get(quoted[1], quoted[1])), conflict.reason)  # type: ignore[misc]
            yield Conflict(names[0], frozenset({(kind, other)}), reason, conflict.in_code)


def _where_sizes_are_written(
    key: LayerMode, of_one_class: Sequence[Sequence[str]], walks: Sequence[Walk]
) -> Iterator[LayerMode]:
    """Yield the other layers whose code writes sizes for a function for which that of this one does."""
    for names in of_one_class:
        other = names[0], key[1]
        if other != key and any(_functions(other, walk) & _functions(key, walk) for walk in walks):
            yield other


def _where_sizes_are_read(
    key: LayerMode, of_one_class: Sequence[Sequence[str]], graphs: Sequence[ModelGraph], walks: Sequence[Walk]
) -> Iterator[LayerMode]:
    """Yield the other layers that are called with shards as this one is, whatever their lengths."""
    called = _ranks(_calls(key, graphs, walks))
    for names in of_one_class:
        other = names[0], key[1]
        if other != key and _ranks(_calls(other, graphs, walks)) == called:
            yield other


def _ranks(calls: list[set[Any]]) -> list[set[Any]]:
    """Return with which tensors a layer is called, but for the lengths of their dims."""
    return [
        {tuple((position, len(shape), *others) for position, shape, *others in call) for call in in_graph}
        for in_graph in calls
    ]


def _functions(key: LayerMode, walk: Walk) -> frozenset[NumberedFunction]:
    return walk.writes_sizes.get(key, frozenset())


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
