"""Shard into the loss: logits that only the loss and the metrics read need not be gathered in a training step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tp_planner.ir.graph import ModelGraph
from tp_planner.ir.placement import Replicate, Shard
from tp_planner.ir.plan import Boundary, LayerPlan

WORTH_A_NOTE = 2**20  # bytes


def shard_into_loss(layers: Sequence[LayerPlan], graphs: Sequence[ModelGraph], parts: int) -> tuple[LayerPlan, ...]:
    """Return the layers' plans, that of the model's head saying whether its output stays in shards into the loss.

    It does if it is all that the model returns, sharded over its last dim, and nothing in the model reads it.

    Args:
        layers: the plans of all layers.
        graphs: the traces that they were made from.
        parts: number of ranks.
    """
    returned = {only_output(graph) for graph in graphs}
    heads = set.intersection(*map(_makers_of_outputs, graphs))  # an embedding may be called in another mode, too

    def is_head(layer: LayerPlan) -> bool:
        return (layer.layer, layer.mode) in heads and returned == {_gathered_at_the_end(layer)}

    return tuple(replace(layer, into_loss=parts > 1 and is_head(layer)) for layer in layers)


def note_whole_logits(layers: Sequence[LayerPlan], loss: str) -> tuple[str, ...]:
    """Return the note that a loss reads outputs whole which could stay in shards; none if they are small.

    Args:
        layers: the layers' plans, as ``shard_into_loss`` returns them.
        loss: the name of the loss.
    """
    head = next(layer for layer in layers if layer.into_loss)
    assert head.output is not None
    size = math.prod(head.output.shape) * head.output.itemsize
    if size < WORTH_A_NOTE:
        return ()
    gathers = f"{head.layer!r} gathers {size / 2**20:,.1f} MiB a step on every rank"
    return (f"loss {loss} reads whole outputs: {gathers}; a cross-entropy of Keras on logits reads them in shards",)


def only_output(graph: ModelGraph) -> str:
    """Return the name of the tensor that the model returns, if it returns one that nothing in the model reads."""
    if len(graph.outputs) != 1:
        return ""
    (output,) = graph.outputs
    read = any(output in op.inputs for op in graph.ops)
    return "" if read else graph.tensor_name(output)


def _makers_of_outputs(graph: ModelGraph) -> set[tuple[str, str]]:
    """Return the layers whose calls return what the model returns, with how they were called."""
    return {(call.layer, call.mode) for call in graph.calls.values() if set(call.outputs) & set(graph.outputs)}


def _gathered_at_the_end(layer: LayerPlan) -> str | None:
    """Return the name of the layer's output if each rank has a part of its last dim, and then all of it."""
    boundary = layer.output
    if boundary is None or layer.calls != 1 or layer.epilogue_after_output:
        return None
    return boundary.tensor if gathers_last_dim(boundary) else None


def gathers_last_dim(boundary: Boundary) -> bool:
    """Whether each rank has a part of the last dim, and then all of it; a gradient comes back as that part."""
    last = Shard(len(boundary.shape) - 1)
    gathers = (boundary.forward.source, boundary.forward.target) == (last, Replicate())
    return gathers and boundary.backward.target == last
