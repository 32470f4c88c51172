"""Gradients: the work that autograd does beyond the gradients of ops, seen from the tensors between them.

Where several steps read a tensor, their gradients are added up. What is measured together is one reader: sums inside of
it are measured with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tp_planner.dryrun.op_work import NO_WORK, OpWork, is_in_place, is_view
from tp_planner.ir.graph import REPEAT, ModelGraph, Op, TensorInfo
from tp_planner.ir.placement import WHOLE, Placement, local_shape
from tp_planner.search.steps import Again, Step


class Gradients:
    """What becomes of the gradients of a graph's tensors, on shards of a model axis of size ``parts``."""

    def __init__(self, graph: ModelGraph, parts: int, steps: Sequence[Step | Again]) -> None:
        self._tensors, self._parts = graph.tensors, parts
        together = (step for step in steps if isinstance(step, Step) and step.together)
        reader = {op: step.ops[0] for step in together for op in range(*step.ops)}
        self._readers: dict[int, set[int]] = {}
        for op in _read_on(graph):
            if self.returns_gradients(op):
                for tensor in op.inputs:
                    self._readers.setdefault(tensor, set()).add(reader.get(op.id, op.id))

    def returns_gradients(self, op: Op) -> bool:
        """Whether an op has gradients of what it reads, where that has some."""
        return any(self._tensors[made].has_gradient for made in op.outputs)

    def added(self, tensor: TensorInfo, placement: Placement) -> OpWork:
        """Return the work of adding up the gradients of a tensor, placed so."""
        return self._added(tensor, placement, len(self._readers.get(tensor.id, ())))

    def added_of_cut(self, tensor: TensorInfo, reads: int) -> OpWork:
        """Return the work of adding up whole gradients of a tensor that one step reads in several ways."""
        return self._added(tensor, WHOLE, reads)

    def _added(self, tensor: TensorInfo, placement: Placement, gradients: int) -> OpWork:
        times = gradients - 1
        if times < 1 or not tensor.has_gradient:
            return NO_WORK
        return OpWork((), 3 * self._bytes(tensor, placement) * times, times)

    def is_of_one(self, tensor: int) -> bool:
        """Whether a tensor's gradient is what one reader leaves."""
        return len(self._readers.get(tensor, ())) == 1

    def _bytes(self, tensor: TensorInfo, placement: Placement) -> int:
        return math.prod(local_shape(tensor.shape, placement, self._parts)) * tensor.itemsize


def only_towards_losses(graph: ModelGraph) -> ModelGraph:
    """Return a graph in which only that has gradients of which outputs, or a number that may be a loss, come."""
    whole = _viewed(graph)
    read = {*graph.outputs, *(number for number, tensor in graph.tensors.items() if not tensor.shape)}
    written = {whole.get(tensor, tensor) for tensor in read}  # what is written into in place is read through others
    for op in reversed(graph.ops):
        writes = op.name != REPEAT and is_in_place(op.name) and whole.get(op.inputs[0], op.inputs[0]) in written
        if not writes and not any(tensor in read and graph.tensors[tensor].has_gradient for tensor in op.outputs):
            continue
        given = {*op.inputs}
        if op.name == REPEAT:
            given |= {twin for twin, own in graph.repeats[op.call].outputs if own in read}
        read |= given
        written |= {whole.get(tensor, tensor) for tensor in given}
    ended = {
        number: replace(tensor, has_gradient=False)
        for number, tensor in graph.tensors.items()
        if tensor.has_gradient and tensor.variable is None and number not in read
    }
    return replace(graph, tensors={**graph.tensors, **ended})


def _viewed(graph: ModelGraph) -> dict[int, int]:
    """Return the tensors of which others are views, or which they were before they were written into."""
    whole: dict[int, int] = {}
    for op in graph.ops:
        if op.name != REPEAT and op.inputs and (is_view(op.name) or is_in_place(op.name)):
            whole.update(dict.fromkeys(op.outputs, whole.get(op.inputs[0], op.inputs[0])))
    return whole


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
