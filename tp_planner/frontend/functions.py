"""Torch functions: which calls of them a layer's code makes, and which ATen ops each becomes."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from tp_planner.frontend.dispatch import tensors_in
from tp_planner.frontend.recorder import Recorder
from tp_planner.ir.graph import FunctionCall

CONSTANT = int | float | str
_CASTS = frozenset(("to", "float", "half", "bfloat16", "double"))
_PLACES = frozenset((torch.int32, torch.int64))
_LEAVES = frozenset((torch.Tensor, torch.nn.Parameter, FakeTensor, torch.dtype, int, float, bool, str, type(None)))


def function_name(function: Callable[..., Any]) -> str:
    """Return what a torch function or tensor method is called: ``reshape`` for ``torch.reshape`` and the method."""
    return getattr(function, "__name__", "")


@functools.cache
def is_elementwise(name: str) -> bool:
    """Whether torch functions of this name make each element of those at the same place, without random numbers."""
    if name in _CASTS:
        return True
    packet = getattr(torch.ops.aten, name.strip("_") if name.startswith("__") else name, None)
    if packet is None or not hasattr(packet, "overloads"):
        return False
    ops = [getattr(packet, each) for each in packet.overloads()]
    computes = [op for op in ops if torch.Tag.pointwise in op.tags and not op._schema.is_mutable]
    return bool(computes) and not any(torch.Tag.nondeterministic_seeded in op.tags for op in ops)


class _Slice(NamedTuple):
    start: Any
    stop: Any
    step: Any


def flatten_arguments(args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    """Return the flattened arguments of a function, ends of slices one by one, and what puts them together again."""
    return tree_flatten((_with_open_slices(args), kwargs))


def _leaves(args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments as ``flatten_arguments`` takes them apart; most are leaves themselves."""
    leaves = [*args, *kwargs.values()]
    return leaves if all(type(leaf) in _LEAVES for leaf in leaves) else flatten_arguments(args, kwargs)[0]


def put_arguments_together(leaves: list[Any], structure: Any) -> tuple[Any, Any]:
    """Return the arguments that ``flatten_arguments`` took apart."""
    args, kwargs = tree_unflatten(leaves, structure)
    return _with_slices(args), kwargs


def _with_open_slices(tree: Any) -> Any:
    if isinstance(tree, slice):
        return _Slice(tree.start, tree.stop, tree.step)
    return tuple(map(_with_open_slices, tree)) if type(tree) is tuple else tree


def _with_slices(tree: Any) -> Any:
    if isinstance(tree, _Slice):
        return slice(*tree)
    return tuple(map(_with_slices, tree)) if type(tree) is tuple else tree


def computes_places(leaves: Sequence[Any]) -> bool:
    """Whether a function is called on tensors, all of whole numbers as places are.

    Such calls are not counted: code that writes into a cache makes some, and does not in the traced call.
    """
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return bool(tensors) and all(tensor.dtype in _PLACES for tensor in tensors)


class FunctionRecorder(TorchFunctionMode):
    """Sees every torch function that the layers of a model call while ``recorder`` records their ops."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.functions: list[FunctionCall] = []
        self._counts: Counter[tuple[int, str]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function_name(func)
        if name == "__get__":  # reads of a tensor's shape, dtype and so on are most of the calls
            return func(*args, **kwargs)
        call = self.recorder.running_call
        if call is None:
            return func(*args, **kwargs)
        leaves = _leaves(args, kwargs)
        if computes_places(leaves):
            return func(*args, **kwargs)
        self._counts[call, name] += 1
        number, first = self._counts[call, name], len(self.recorder.ops)
        before = [self.recorder.known_id(leaf) for leaf in leaves]
        result = func(*args, **kwargs)
        ops = self.recorder.ops[first:]
        if ops and all(op.call == call for op in ops):
            after = [self.recorder.known_id(leaf) for leaf in leaves]
            ids = [later if known is None else known for known, later in zip(before, after, strict=True)]
            returned = [self.recorder.known_id(tensor) for tensor in tensors_in(result)]
            self.functions.append(
                FunctionCall(
                    name,
                    call,
                    number,
                    tuple((position, known) for position, known in enumerate(ids) if known is not None),
                    tuple(known for known in returned if known is not None),
                    tuple((position, leaf) for position, leaf in enumerate(leaves) if isinstance(leaf, CONSTANT)),
                    (first, first + len(ops)),
                    is_elementwise(name),
                )
            )
        return result
