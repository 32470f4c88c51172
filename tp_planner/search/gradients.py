"""Gradients: the work that autograd does beyond the gradients of ops, seen from the tensors between them.

Where several ops read a tensor, their gradients are added up.
"""

from __future__ import annotations

import math

from tp_planner.dryrun.op_work import NO_WORK, OpWork, is_view
from tp_planner.ir.graph import REPEAT, ModelGraph, Op, TensorInfo
from tp_planner.ir.placement import Placement, local_shape


class Gradients:
    """What becomes of the gradients of a graph's tensors, on shards of a model axis of size ``parts``."""

    def __init__(self, graph: ModelGraph, parts: int) -> None:
        self._tensors, self._parts = graph.tensors, parts
        self._readers: dict[int, list[Op]] = {}
        for op in _read_on(graph):
            if any(self._tensors[made].has_gradient for made in op.outputs):
                for tensor in dict.fromkeys(op.inputs):
                    self._readers.setdefault(tensor, []).append(op)

    def added(self, tensor: TensorInfo, placement: Placement) -> OpWork:
        """Return the work of adding up the gradients of a tensor, placed so."""
        times = len(self._readers.get(tensor.id, ())) - 1
        if times < 1 or not tensor.has_gradient:
            return NO_WORK
        return OpWork((), 3 * self._bytes(tensor, placement) * times, times)

    def is_of_one_op(self, tensor: int) -> bool:
        """Whether a tensor's gradient is what one op leaves."""
        return len(self._readers.get(tensor, ())) == 1

    def _bytes(self, tensor: TensorInfo, placement: Placement) -> int:
        return math.prod(local_shape(tensor.shape, placement, self._parts)) * tensor.itemsize


def _read_on(graph: ModelGraph) -> list[Op]:
    """Return the ops but for views that nothing reads: autograd makes such of what is written into through another."""
    ends = [*graph.outputs, *(tensor for call in graph.calls.values() for tensor in call.outputs)]
    read = {*ends, *(twin for repeat in graph.repeats.values() for twin, _ in (*repeat.inputs, *repeat.outputs))}
    found = []
    for op in reversed(graph.ops):
        if op.name == REPEAT or not is_view(op.name) or any(tensor in read for tensor in op.outputs):
            found.append(op)
            read.update(op.inputs)
    return found[::-1]
