"""Interruptions: an exception out of any call of tp_planner's own functions, and what must be as before it."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import keras
import torch
from keras.src.backend.common.global_state import get_global_attribute
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import tp_planner
from tp_planner import patches
from tp_planner.regions.calls import running

PACKAGE = Path(tp_planner.__file__).parent
# What ranks do alike, call by call; the others, as in sending shards, do what their number says.
ALIKE = tuple(f"{PACKAGE / room}/" for room in ("frontend", "passes", "dryrun", "layers", "regions", "replay"))
# What takes something back. An error there is another one, after which nothing can be promised.
TAKING_BACK = {"__exit__", "_put_back", "end", "give_back", "leave", "restored", "revert", "undo"}


class Interrupted(BaseException):
    """Like KeyboardInterrupt: nobody catches it by the way."""


@dataclass(frozen=True)
class Point:
    """A call of tp_planner's functions: the one of this number among those of one function.

    Not among all: what is called when a tensor goes, ranks call at other times.
    """

    function: str
    number: int


class Calls:
    """Writes down calls of tp_planner's functions, and raises Interrupted out of one, if there is one to be."""

    def __init__(self, at: Point | None = None) -> None:
        self.at, self.where, self.points, self.counts = at, "", list[Point](), Counter[str]()

    def __enter__(self) -> Calls:
        sys.setprofile(self._see)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ALIKE):
            name = f"{frame.f_code.co_filename.removeprefix(str(PACKAGE))}:{frame.f_code.co_qualname}"
            self.counts[name] += 1
            if self.at is None:
                self.points.append(Point(name, self.counts[name]))
            elif self.counts[self.at.function] >= self.at.number and not (
                _takes_back(frame) or _is_asked_by_torch(frame)
            ):
                self.where = name
                sys.setprofile(None)
                raise Interrupted(self.where)


def _takes_back(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name in TAKING_BACK:
            return True
        frame = frame.f_back
    return False


def _is_asked_by_torch(frame: FrameType) -> bool:
    """Whether torch's own code asks on which device a tensor is; in some of it an exception ends the process."""
    return frame.f_locals.get("func") is torch.ops.prim.device.default


def state(*models: keras.Model) -> dict[str, Any]:
    """Return what a call that has failed must not change: of the process, and of models."""
    process = {
        "calls": (list(running.frames), dict(+running.scopes), dict(running.open), len(running.entered)),
        "running": (running.watching, running.guarded, running.values, running.stream_is_whole, running.site),
        "modes": (len(_get_current_dispatch_mode_stack()), len(_get_current_function_mode_stack())),
        "torch": (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            str(get_global_attribute("torch_device")),
        ),
        "patches": sorted((name, thread or 0) for _, name, thread in patches._standing),
        "keras": (keras.config.floatx(), keras.config.dtype_policy().name, keras.distribution.distribution()),
    }
    return process | {f"{model.name} {key}": value for model in models for key, value in _of_model(model).items()}


def _of_model(model: keras.Model) -> dict[str, Any]:
    layers = model._flatten_layers()
    return {
        "attributes": [(layer.name, sorted(vars(layer))) for layer in layers],
        "hooks": [(len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in layers],
        "variables": [(type(each).__name__, id(each._value), str(each._value.device)) for each in model.variables],
        "parameters": [id(each) for each in model.parameters()],
        "specs": [repr(layer.input_spec) for layer in layers],
    }
