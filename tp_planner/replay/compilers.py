"""Compilers: by what the segments of a replayed program run, where ``jit_compile`` names it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import keras
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tp_planner.ir.errors import PlanError, in_one_line
from tp_planner.replay.cuda_graphs import CudaGraphs
from tp_planner.replay.program import Name, Program, Step, Writing, compiled
from tp_planner.replay.segments import joined
from tp_planner.storage.log import logger


def written_by(jit_compile: Any, model: keras.Model) -> Writing:
    """Return what makes a model's programs of their steps.

    True runs them one by one, "inductor" and "cudagraphs" segments of them by what torch.compile calls so.

    Raises:
        PlanError: for anything else.
    """
    match jit_compile:
        case True:
            return compiled
        case "inductor":
            return functools.partial(_by_inductor, model.name)
        case "cudagraphs":
            return functools.partial(_by_graphs, model)
    raise PlanError(
        f"model {model.name!r} is compiled with jit_compile={jit_compile!r}; it is True, which replays calls, "
        f"'inductor' or 'cudagraphs', by which what lies between their boundaries runs, or False"
    )


def _by_inductor(model: str, inputs: Sequence[Name], steps: Sequence[Step], output: Any) -> Program:
    return compiled(inputs, joined(steps, output, functools.partial(_Inductor, model)), output)


def _by_graphs(model: keras.Model, inputs: Sequence[Name], steps: Sequence[Step], output: Any) -> Program:
    graphs = CudaGraphs(model)
    return graphs.around(compiled(inputs, joined(steps, output, graphs.segment, shared=False), output))


class _Inductor:
    """A segment that torch.compile compiles in its first call; one that it cannot compile runs as it is."""

    def __init__(self, model: str, segment: Program) -> None:
        self._model, self._segment = model, segment
        self._compiled = torch.compile(segment, backend="inductor", fullgraph=True, dynamic=False)

    def __call__(self, *tensors: torch.Tensor) -> Any:
        if _get_current_dispatch_mode() is not None:  # who watches ops is to see them, and torch compiles nothing then
            return self._segment(*tensors)
        try:
            return self._compiled(*tensors)
        except Exception as error:
            result = self._segment(*tensors)  # which raises what is no error of the compiler
            reason = in_one_line(error)
            logger.warning(
                "[ModelParallel] jit_compile='inductor' leaves a part of model %r as it is: %s", self._model, reason
            )
            self._compiled = self._segment
            return result
