"""Torch modules in parallel models: they compute with what the plan lets their layer read, and save whole values."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import torch
from keras.src.backend.common.variables import AutocastScope

from tp_planner.frontend.layer_tree import own_variables
from tp_planner.frontend.torch_modules import computing_with
from tp_planner.storage.variables import ParallelVariable


def follow_variables(layer: keras.Layer) -> Callable[[], None]:
    """Let a TorchModuleWrapper's module follow its parallel variables; return what ends this."""
    changed = {
        "call": _calling(layer),
        "save_own_variables": _saving(layer),
        "load_own_variables": _loading(layer),
    }
    layer.__dict__.update(changed)

    def undo() -> None:
        for name in changed:
            del layer.__dict__[name]

    return undo


def _parallel(layer: keras.Layer) -> list[Any]:
    return [variable for variable in own_variables(layer) if isinstance(variable, ParallelVariable)]


def _calling(layer: keras.Layer) -> Callable[..., Any]:
    plain = layer.call

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        with AutocastScope(None):  # as the module does
            tensors = {id(variable._value): variable.value for variable in _parallel(layer)}
        with computing_with(layer, tensors), _op_by_op():
            return plain(*args, **kwargs)

    return call


@contextlib.contextmanager
def _op_by_op() -> Iterator[None]:
    """Inside, attention of torch does not take the short way that it has for inference: that was not planned."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _saving(layer: keras.Layer) -> Callable[[Any], None]:
    plain = layer.save_own_variables

    def save_own_variables(store: Any) -> None:
        whole = {id(variable._value): torch.from_numpy(np.asarray(variable)) for variable in _parallel(layer)}
        with computing_with(layer, whole):
            plain(store)

    return save_own_variables


def _loading(layer: keras.Layer) -> Callable[[Any], None]:
    plain = layer.load_own_variables

    def load_own_variables(store: Any) -> None:
        variables = _parallel(layer)
        whole = [torch.empty(tuple(variable.shape), dtype=variable._value.dtype) for variable in variables]
        held = {id(variable._value): value for variable, value in zip(variables, whole, strict=True)}
        with computing_with(layer, held):
            plain(store)
        for variable, value in zip(variables, whole, strict=True):
            variable.assign(value)

    return load_own_variables
