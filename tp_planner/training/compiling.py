"""Compiling: which models are compiled with Keras's default, ``jit_compile="auto"``, that is for the backend to decide.

Keras on torch makes False of it at once, and notes that.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import keras
from keras.src.models.model import Trainer  # that of the backend

from tp_planner.patches import wrap_for_good

_left_open: weakref.WeakSet[keras.Model] = weakref.WeakSet()


def note_how_models_are_compiled() -> None:
    """Note it from now on."""
    owner = next(each for each in Trainer.__mro__ if "compile" in vars(each))
    wrap_for_good(owner, "compile", _noting, "Keras makes False of its default, and notes that")


def is_left_open(model: keras.Model) -> bool:
    """Whether it is left to the backend how a model runs, since that is noted."""
    return model in _left_open and not model.jit_compile


def _noting(plain: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        _left_open.discard(self)
        result = plain(self, *args, **kwargs)
        if signature.bind(self, *args, **kwargs).arguments.get("jit_compile", "auto") == "auto":
            _left_open.add(self)
        return result

    return compile
