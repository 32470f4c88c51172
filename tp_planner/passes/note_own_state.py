"""Note own state: what layers of each replica remember of its own share of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Set

from tp_planner.ir.graph import ModelGraph


def note_own_state(graph: ModelGraph, shared: Set[str]) -> Iterator[str]:
    """Yield a note for each float variable that a training call sets to what depends on the batch.

    Args:
        graph: the trace of a training call.
        shared: layers that set the same on all replicas all the same, by name.
    """
    seen, of_batch = set(), set(graph.inputs)
    for op in graph.ops:
        depends = not of_batch.isdisjoint(op.inputs)
        of_batch.update(op.outputs if depends else ())
        variable = graph.tensors[op.inputs[0]].variable if op.name == "aten.copy_.default" else None
        layer = graph.calls[op.call].layer
        if (
            not depends
            or variable is None
            or layer in shared
            or variable in seen
            or "float" not in graph.variables[variable].dtype
        ):
            continue
        seen.add(variable)
        yield (
            f"layer {layer!r} sets {variable!r} in training: each replica sets its own, from its share of the batch, "
            f"and that of rank 0 is saved; let the layer combine them if they have to agree"
        )
