"""Steps: the traced model cut into what the walk over it decides at once.

A step is the call of a layer that calls no other, or else one torch function or op in a layer's own code. Equal blocks
are there once; how often each of their steps runs is its number of ``times``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tp_planner.ir.contraction import Contraction
from tp_planner.ir.graph import REPEAT, Call, FunctionCall, ModelGraph, Op, Repeat

Piece = FunctionCall | Op
MOST_CHOICES = 4096  # of the weights of one layer call that is one step


@dataclass(frozen=True, slots=True)
class Step:
    """Ops that are followed together.

    ``pieces`` are the functions and ops that the walk follows one by one, ``layer_call`` the call that they all are.
    ``takes`` are tensors from outside, ``variables`` those that are read, ``makes`` what others read of it. The ops of
    a layer that trains matrices are measured ``together``, for the gradients of these are laid out as they are.
    """

    call: int
    ops: tuple[int, int]
    pieces: tuple[Piece, ...]
    layer_call: Call | None
    takes: tuple[int, ...]
    variables: tuple[str, ...]
    makes: tuple[int, ...]
    times: int
    together: bool

    def name(self, graph: ModelGraph) -> str:
        """Return what people call it."""
        layer = graph.calls[self.call].layer
        piece = self.pieces[0]
        return layer if self.layer_call is not None else f"{piece.name} in {layer!r}"


@dataclass(frozen=True, slots=True)
class Again:
    """A block that does what an equal one does: it takes what that takes, and makes what that makes."""

    repeat: Repeat


def steps_of(graph: ModelGraph, options: Mapping[str, int]) -> tuple[Step | Again, ...]:
    """Return the steps of a graph, traced with its functions, in order of execution.

    ``options`` says in how many ways each variable can be stored.
    """
    cutting = _Cutting(graph, options)
    return tuple(cutting.steps())


class _Cutting:
    def __init__(self, graph: ModelGraph, options: Mapping[str, int]) -> None:
        self.graph, self.options = graph, options
        parents = {call.parent for call in graph.calls.values()}
        self.leaves = {
            call.ops[0]: call
            for call in graph.calls.values()
            if call.id not in parents and call.id not in graph.repeats and call.ops[0] < call.ops[1]
        }
        self.functions = {function.ops[0]: function for function in graph.functions or ()}
        self.last_read = self._last_reads()
        self.times = Times(graph)

    def _last_reads(self) -> dict[int, int]:
        last = {tensor: op.id for op in self.graph.ops for tensor in op.inputs}
        ends = [*self.graph.outputs, *(tensor for call in self.graph.calls.values() for tensor in call.outputs)]
        for repeat in self.graph.repeats.values():
            ends += [twin for twin, _ in (*repeat.inputs, *repeat.outputs)]
        return last | dict.fromkeys(ends, len(self.graph.ops))

    def steps(self) -> Iterator[Step | Again]:
        after = 0
        for op in self.graph.ops:
            if op.id < after:
                continue
            leaf = self.leaves.get(op.id)
            if op.name == REPEAT:
                after = op.id + 1
                yield Again(self.graph.repeats[op.call])
            elif leaf is not None and self._is_one_step(leaf):
                after = leaf.ops[1]
                yield self._step(leaf.id, leaf.ops, leaf)
            else:
                function = self.functions.get(op.id)
                ops = function.ops if function else (op.id, op.id + 1)
                after = ops[1]
                yield self._step(op.call, ops, None)

    def _is_one_step(self, call: Call) -> bool:
        if contraction_of(call, self.graph) is not None:
            return True
        return math.prod(self.options[key] for key in self._variables(call.ops)) <= MOST_CHOICES

    def _variables(self, ops: tuple[int, int]) -> tuple[str, ...]:
        tensors = (self.graph.tensors[tensor] for op in self.graph.ops[slice(*ops)] for tensor in op.inputs)
        return tuple(dict.fromkeys(each.variable for each in tensors if each.variable is not None))

    def _step(self, call: int, ops: tuple[int, int], layer_call: Call | None) -> Step:
        inside = self.graph.ops[slice(*ops)]
        made = dict.fromkeys(tensor for op in inside for tensor in op.outputs)
        taken = dict.fromkeys(tensor for op in inside for tensor in op.inputs if tensor not in made)
        variables = self._variables(ops)
        contraction = None if layer_call is None else contraction_of(layer_call, self.graph)
        if layer_call is not None and contraction is not None:
            taken[layer_call.inputs[0][1]] = None
            variables = tuple(dict.fromkeys((*variables, *(key for key, _ in contraction.weights))))
        return Step(
            call=call,
            ops=ops,
            pieces=tuple(self._pieces(ops)),
            layer_call=layer_call,
            takes=tuple(tensor for tensor in taken if self.graph.tensors[tensor].variable is None),
            variables=variables,
            makes=tuple(tensor for tensor in made if self.last_read.get(tensor, -1) >= ops[1]),
            times=self.times.of(call),
            together=contraction is not None or (layer_call is not None and self._trains_matrices(variables)),
        )

    def _trains_matrices(self, variables: tuple[str, ...]) -> bool:
        read = (self.graph.variables[key] for key in variables)
        return any(each.trainable and len(each.shape) > 1 for each in read)

    def _pieces(self, ops: tuple[int, int]) -> Iterator[Piece]:
        after = ops[0]
        for op in self.graph.ops[slice(*ops)]:
            if op.id >= after:
                function = self.functions.get(op.id)
                after = function.ops[1] if function else op.id + 1
                yield function or op


def contraction_of(call: Call, graph: ModelGraph) -> Contraction | None:
    """Return what a call contracts, if it is one contraction."""
    return dict(graph.layers[call.layer].contractions).get(call.mode)


class Times:
    """How often a call runs: once, and once more for each block that does what the block around it does."""

    def __init__(self, graph: ModelGraph) -> None:
        self._graph = graph
        self._again: dict[int, list[int]] = {}
        for repeat in graph.repeats.values():
            self._again.setdefault(repeat.twin, []).append(repeat.call)
        self._known: dict[int | None, int] = {None: 1}

    def of(self, call: int | None) -> int:
        """Return how often ``call`` runs."""
        if call not in self._known:
            assert call is not None
            places = [call, *self._again.get(call, ())]
            self._known[call] = sum(self.of(self._graph.calls[place].parent) for place in places)
        return self._known[call]

    def of_crossing(self, call: int, tensor: int) -> int:
        """Return how often a tensor crosses the same boundary in ``call``: what several blocks read crosses once."""
        for outer in self._graph.enclosing(call):
            if again := self._again.get(outer.id):
                given = {dict(self._graph.repeats[each].inputs).get(tensor) for each in again}
                if given == {tensor}:
                    return self.of(outer.parent)
                return self.of(call)
        return self.of(call)
