"""Same steps: whether two tapes of one sort of call are of one program, or code does something else each time."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tp_planner.frontend.functions import function_name
from tp_planner.replay.program import Name, Step


def difference(before: Sequence[Step], now: Sequence[Step]) -> str:
    """Return what the second of two calls does otherwise; "" if it is the same, with the same constants."""
    for first, second in zip(before, now, strict=False):
        if not _same(first.function, second.function):
            return f"it calls torch's {function_name(second.function)} where it called {function_name(first.function)}"
        if not (_same(first.args, second.args) and _same(first.kwargs, second.kwargs)):
            return f"it calls torch's {function_name(second.function)} with other arguments"
    if len(before) != len(now):
        return f"it calls {len(now)} torch functions, and called {len(before)}"
    return ""


def _same(first: Any, second: Any) -> bool:
    """Whether two values that are no results of steps are the same in each call; of tensors it has to be one."""
    if first is second:
        return True
    if type(first) is not type(second) or isinstance(first, torch.Tensor):
        return False
    match first:
        case Name():
            return bool(first == second)
        case tuple() | list():
            return len(first) == len(second) and all(map(_same, first, second))
        case dict():
            return list(first) == list(second) and all(_same(first[key], second[key]) for key in first)
        case slice():
            return _same((first.start, first.stop, first.step), (second.start, second.stop, second.step))
        case np.ndarray():
            return bool(first.dtype == second.dtype and first.tobytes() == second.tobytes())
        case float():
            return first == second or (math.isnan(first) and math.isnan(second))
        case functools.partial():
            return _same((first.func, first.args, first.keywords), (second.func, second.args, second.keywords))
        case types.FunctionType():
            return first.__code__ is second.__code__ and _same(_bound(first), _bound(second))
    return bool(first == second)


def _bound(function: types.FunctionType) -> Any:
    """Return what a function made inside of another has of it, and its defaults."""
    cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    return cells, function.__defaults__, function.__kwdefaults__
