"""Models without values: they are built on the meta device, where variables have shapes and no memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import torch
from keras.src.optimizers.base_optimizer import BaseOptimizer

from tp_planner.frontend.keras_internals import convert_to_tensor, get_device, numpy
from tp_planner.patches import wrapped


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Inside, models are built without values; optimizers keep theirs: nobody else knows a learning rate."""
    device = get_device()

    def made_there(plain: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(plain)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            with keras.device(device):
                plain(self, *args, **kwargs)

        return __init__

    with (
        wrapped(BaseOptimizer, "__init__", made_there, "optimizers of models without values"),
        wrapped(numpy, "repeat", _repeated, "Keras fails to say what it makes of tensors without values"),
        keras.device("meta"),
    ):
        yield


def _repeated(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return Keras's ``repeat``, which knows tensors without values."""

    @functools.wraps(plain)
    def repeat(x: Any, repeats: Any, axis: int | None = None) -> Any:
        tensor = convert_to_tensor(x)
        if not tensor.is_meta:
            return plain(x, repeats, axis=axis)
        dim, shape = (0, [tensor.numel()]) if axis is None else (axis, list(tensor.shape))
        times = torch.as_tensor(repeats).reshape(-1).tolist()
        shape[dim] = sum(times) if len(times) > 1 else times[0] * shape[dim]
        return tensor.new_empty(shape)

    return repeat
