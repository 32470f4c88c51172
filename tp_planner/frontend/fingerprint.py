"""A model's fingerprint: what a plan was made for."""

from __future__ import annotations

import hashlib
import json

import keras

from tp_planner.frontend.layer_tree import named_layers, named_variables
from tp_planner.frontend.stretches import Stretch


def fingerprint(model: keras.Model) -> str:
    """Return a SHA-256 of the model's variables (path, whole shape, dtype) and layers (name, class), in order.

    Sharded and plain models have the same fingerprint.
    """
    variables = [
        [key, list(variable.shape), keras.backend.standardize_dtype(variable._dtype)]
        for key, variable in named_variables(model).items()
    ]
    layers = [
        [name, type(layer).__name__] for name, layer in named_layers(model).items() if not isinstance(layer, Stretch)
    ]
    return hashlib.sha256(json.dumps([variables, layers]).encode()).hexdigest()
