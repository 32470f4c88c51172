"""CUDA graphs: the segments of a program as graphs of kernels, which one launch each runs.

A program's first run shows what each segment is given. Then all are captured together, for the forward and the backward
pass, into one pool of memory (``torch.cuda.make_graphed_callables``): weights are read where they are, everything else
is copied to where the graph reads it. Collectives lie between segments and are in no graph.

A graph writes where it wrote the last time. So nothing of that memory leaves the program: outputs, and the gradients of
inputs and weights, are copied out, and while a call waits for its backward pass, others run without graphs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import torch
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_unflatten

from tp_planner.ir.errors import ParallelRuntimeError, in_one_line
from tp_planner.replay.program import Program
from tp_planner.storage.log import logger
from tp_planner.storage.variables import local_tensor


@dataclass(slots=True)
class _Segment:
    """A segment: its function, what it is given in a run that shows it, and its graph once there is one."""

    function: Program
    shown: tuple[torch.Tensor, ...] = ()
    gradients: bool = False  # whether the run recorded them
    requires: list[bool] = field(default_factory=list)  # of the results, whether they require gradients
    weights: dict[int, int] = field(default_factory=dict)  # where the graph reads weights, by their place
    graph: Program | None = None

    def reads(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the weights are those that the graph reads; in others' place it would change them."""
        return all(tensors[place].data_ptr() == pointer for place, pointer in self.weights.items())

    def as_shown(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what the function does, with gradients or without as it was shown."""
        with torch.set_grad_enabled(self.gradients):
            results: tuple[torch.Tensor, ...] = self.function(*tensors)
        return results


class _Waiting:
    """Exists as long as a call may have a backward pass before it."""


class CudaGraphs:
    """The graphs of one program of a model."""

    def __init__(self, model: keras.Model) -> None:
        self._model = weakref.ref(model)
        self._segments: list[_Segment] = []
        self._storages: set[int] = set()  # of the model's variables
        self._state: str = "plain"  # how segments run: as they are, to be shown, or by their graphs
        self._problem = ""
        self._captured = False
        self._waiting: Callable[[], _Waiting | None] = lambda: None
        self.runs = 0

    def segment(self, function: Program) -> Program:
        """Return what is called in place of a segment's function."""
        segment = _Segment(function)
        self._segments.append(segment)
        return functools.partial(self._run, segment)

    def around(self, program: Program) -> Program:
        """Return a program that runs by graphs once it has shown what they are given."""

        def run(*tensors: torch.Tensor) -> Any:
            self._problem = self._problem or self._why_not(tensors)
            watched = _get_current_dispatch_mode() is not None or torch.is_inference_mode_enabled()
            if self._problem or watched or self._waiting() is not None:
                return self._in_state("plain", program, tensors)
            if self._captured:
                given = [_OutOfGraph.apply(each) if each.requires_grad else each for each in tensors]
                return self._apart(self._in_state("graphs", program, given))
            output = self._in_state("shown", program, tensors)
            self._capture()
            return output

        return run

    def _why_not(self, tensors: Sequence[torch.Tensor]) -> str:
        if all(tensor.is_cuda for tensor in tensors):
            return ""
        return self._refused("it is not on a CUDA device")

    def _refused(self, problem: str) -> str:
        model = self._model()
        name = "" if model is None else model.name
        logger.warning("[ModelParallel] jit_compile='cudagraphs' replays model %r without graphs: %s", name, problem)
        return problem

    def _in_state(self, state: str, program: Program, tensors: Sequence[torch.Tensor]) -> Any:
        self._state = state
        if state == "shown":
            self._storages = {_storage(local_tensor(each)) for each in self._variables()}
        try:
            return program(*tensors)
        finally:
            self._state = "plain"

    def _variables(self) -> list[Any]:
        model = self._model()
        return [] if model is None else model.variables

    def _run(self, segment: _Segment, *tensors: torch.Tensor) -> Any:
        if self._state == "graphs" and segment.graph is not None and segment.reads(tensors):
            given = [
                _OutOfGraph.apply(each) if place in segment.weights and each.requires_grad else each
                for place, each in enumerate(tensors)
            ]
            results = segment.graph(*given)
            return tuple(
                each if requires else each.detach() for each, requires in zip(results, segment.requires, strict=True)
            )
        results = segment.function(*tensors)
        if self._state == "shown":
            self._show(segment, tensors, results)
        return results

    def _show(self, segment: _Segment, tensors: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> None:
        """Note what a segment is given: weights where they are, all else to be copied to memory of the graph."""
        segment.gradients = torch.is_grad_enabled()
        segment.requires = [each.requires_grad for each in results]
        segment.weights = {
            place: each.data_ptr() for place, each in enumerate(tensors) if _storage(each) in self._storages
        }
        segment.shown = tuple(
            (each.detach() if place in segment.weights else each.detach().clone()).requires_grad_(each.requires_grad)
            for place, each in enumerate(tensors)
        )

    def _capture(self) -> None:
        """Capture all segments; if one cannot be captured, none of them is."""
        functions = tuple(segment.as_shown for segment in self._segments)
        shown = tuple(segment.shown for segment in self._segments)
        try:
            graphs = torch.cuda.make_graphed_callables(functions, shown, allow_unused_input=True) if functions else ()
        except Exception as error:
            self._problem = self._refused(in_one_line(error))
            return
        for segment, graph in zip(self._segments, graphs, strict=True):
            segment.graph, segment.shown = graph, ()
        self._captured = True

    def _apart(self, output: Any) -> Any:
        """Return the output of a run by graphs, which nothing overwrites."""
        self.runs += 1
        leaves, structure = tree_flatten(output)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        waiting = _Waiting()
        apart = _OutOfProgram.apply(self, waiting, *(leaves[place] for place in places))
        if any(tensor.requires_grad for tensor in apart):
            self._waiting = weakref.ref(waiting)
        for place, tensor in zip(places, apart, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, structure)

    def begin_backward(self, run: int) -> None:
        """Note that a run's backward pass begins, after which graphs may run again.

        Raises ParallelRuntimeError if they have: what that run left for its backward pass is overwritten.
        """
        if run != self.runs:
            raise ParallelRuntimeError(
                "a backward pass runs a second time after the model was called again, and jit_compile='cudagraphs' "
                "keeps what it needs of the last call alone; compile the model with jit_compile=True"
            )
        self._waiting = lambda: None


class _OutOfGraph(torch.autograd.Function):
    """Hands an input or a weight to graphs, and gives it a gradient that no later run overwrites."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor) -> torch.Tensor:
        return given.view_as(given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.clone()


class _OutOfProgram(torch.autograd.Function):
    """Copies outputs out of the memory of graphs, and tells these when the backward pass begins."""

    @staticmethod
    def forward(ctx: Any, graphs: CudaGraphs, waiting: _Waiting, *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.graphs, ctx.run, ctx.waiting = graphs, graphs.runs, waiting
        ctx.set_materialize_grads(False)
        copies = tuple(output.clone() for output in outputs)
        plain = (copy for copy, given in zip(copies, outputs, strict=True) if not given.requires_grad)
        ctx.mark_non_differentiable(*plain)
        return copies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        ctx.graphs.begin_backward(ctx.run)
        return None, None, *gradients


def _storage(tensor: torch.Tensor) -> int:
    pointer: int = tensor.untyped_storage().data_ptr()
    return pointer
