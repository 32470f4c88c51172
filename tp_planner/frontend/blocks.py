"""Equal blocks: recognise layers that compute the same, so that a tower of equal blocks is traced once.

Two layers are equal if their classes, their plain attributes, their variables' shapes and dtypes and all their
inner layers are. Attributes that cannot be compared make a layer equal to itself only.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import keras
import torch

from tp_planner.frontend.layer_tree import own_variables
from tp_planner.frontend.penalties import penalty_kind

_PLAIN = (int, float, str, bool, bytes, complex, type(None))
# Attributes of these kinds do not change what a call computes, or are compared in another way.
_INERT = (
    keras.Variable,
    keras.Layer,
    keras.initializers.Initializer,
    keras.regularizers.Regularizer,
    keras.constraints.Constraint,
    keras.random.SeedGenerator,
    torch.nn.Module,
)
# What every Keras layer has: names, hooks and bookkeeping, but for these three, which matter.
_COMMON = frozenset(keras.layers.Layer(name="probe").__dict__) - {"_dtype_policy", "_trainable", "autocast"}


def layer_signature(layer: keras.Layer, known: dict[int, Hashable]) -> Hashable:
    """Return a value that is equal for layers that compute the same; ``known`` remembers it by ``id(layer)``."""
    if id(layer) not in known:
        known[id(layer)] = (
            type(layer),
            tuple(sorted((name, _attribute(value)) for name, value in layer.__dict__.items() if _matters(name, value))),
            tuple(_variable_signature(variable) for variable in own_variables(layer)),
            tuple(layer_signature(child, known) for child in layer._layers),
        )
    return known[id(layer)]


def _matters(name: str, value: Any) -> bool:
    return (name not in _COMMON or name == "_dtype_policy") and not isinstance(value, _INERT)


def _attribute(value: Any) -> str:
    """Return an attribute as text; the identity of what cannot be compared."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, keras.DTypePolicy):
        return f"{value.compute_dtype} {value.variable_dtype}"
    if isinstance(value, keras.InputSpec):
        return repr(value)
    if isinstance(value, dict):
        items = [(str(key), _attribute(each)) for key, each in value.items() if not isinstance(each, _INERT)]
        return repr(sorted(items))
    if isinstance(value, list | tuple | set | frozenset):
        return repr([_attribute(each) for each in value if not isinstance(each, _INERT)])
    return f"{type(value).__qualname__} {id(value)}"


def _variable_signature(variable: Any) -> Hashable:
    return (
        variable.name,
        tuple(variable.shape),
        str(variable._dtype),
        bool(variable.trainable),
        penalty_kind(variable.regularizer),
    )
