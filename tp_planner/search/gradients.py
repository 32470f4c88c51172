"""Gradients: the work that autograd does beyond the gradients of ops, seen from the tensors between them.

Where several ops read a tensor, their gradients are added up. Where a reshape's result is turned, and read turned, its
gradient comes in the order of the turned one, and may have to be copied to be reshaped back; with one head left on a
rank, say, it need not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tp_planner.dryrun.op_work import NO_WORK, OpWork, has_view, is_view
from tp_planner.ir.graph import REPEAT, ModelGraph, Op, TensorInfo
from tp_planner.ir.placement import Placement, local_shape

_RESHAPES = ("aten.view.default", "aten._unsafe_view.default")
_TURNS = ("aten.permute.default", "aten.transpose.int", "aten.unsqueeze.default")
_ADDED = -1  # a dim of length 1 that a tensor has not


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

    def reshaped(self, op: Op, taken: Placement, made: Placement) -> OpWork:
        """Return the work of giving the gradient of what an op makes the shape of what it takes, placed so."""
        if op.name not in _RESHAPES or not self._tensors[op.outputs[0]].has_gradient:
            return NO_WORK
        before, after = self._tensors[op.inputs[0]], self._tensors[op.outputs[0]]
        order = self._order(after)
        shapes = [local_shape(each.shape, placed, self._parts) for each, placed in ((after, made), (before, taken))]
        if has_view(shapes[0], order, shapes[1]):
            return NO_WORK
        return OpWork((), 2 * self._bytes(before, taken), 1)

    def _order(self, tensor: TensorInfo) -> tuple[int, ...]:
        """Return the order of a tensor's dims, outermost first, in which its gradient comes."""
        order = list(range(len(tensor.shape)))
        readers = self._readers.get(tensor.id, ())
        while len(readers) == 1 and (turned := _turned(readers[0], order)) is not None:
            order = turned
            readers = self._readers.get(readers[0].outputs[0], ())
        return tuple(dim for dim in order if dim != _ADDED)

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


def _turned(op: Op, order: Sequence[int]) -> list[int] | None:
    """Return what an op makes of dims in this order, if it only turns them, or adds one of length 1."""
    if op.name not in _TURNS:
        return None
    args, kwargs = op.arguments
    given = [*args[1:], *kwargs.values()]
    if op.name == "aten.unsqueeze.default":
        at = given[0] % (len(order) + 1)
        return [*order[:at], _ADDED, *order[at:]]
    if op.name == "aten.permute.default":
        return [order[dim] for dim in given[0]]
    first, second = given
    turned = list(order)
    turned[first], turned[second] = order[second], order[first]
    return turned
