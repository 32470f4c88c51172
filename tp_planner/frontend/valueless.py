"""Models without values: they are built on the meta device, where variables have shapes and no memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src.optimizers.base_optimizer import BaseOptimizer

from tp_planner.frontend.keras_internals import get_device
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

    with wrapped(BaseOptimizer, "__init__", made_there, "optimizers of models without values"), keras.device("meta"):
        yield
