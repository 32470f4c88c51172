"""Whether Keras is calling a layer, and whether it only infers shapes."""

from __future__ import annotations

from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import in_stateless_scope

from tp_planner.frontend.keras_internals import get_device


def in_layer_call() -> bool:
    """Whether a layer call is running in this thread."""
    return global_state.get_global_attribute("current_call_ctx") is not None


def is_symbolic() -> bool:
    """Whether Keras infers shapes, on meta tensors or without state."""
    return str(get_device()) == "meta" or in_stateless_scope()
