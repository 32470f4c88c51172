"""In what state Keras calls: whether it calls a layer, whether it only infers shapes, under which distribution."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import in_stateless_scope

from tp_planner.frontend.keras_internals import get_device


def in_layer_call() -> bool:
    """Whether a layer call is running in this thread."""
    return global_state.get_global_attribute("current_call_ctx") is not None


def is_symbolic() -> bool:
    """Whether Keras is only inferring shapes, on meta tensors."""
    return str(get_device()) == "meta"


def leaves_no_trace() -> bool:
    """Whether Keras infers shapes, or calls without state: what is made then is nobody's afterwards."""
    return is_symbolic() or in_stateless_scope()


@contextlib.contextmanager
def without_distribution() -> Iterator[None]:
    """Inside, no distribution is current."""
    current = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(current)
