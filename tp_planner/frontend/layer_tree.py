"""Names for the layers and variables of a Keras model that are unique, stable and readable."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from typing import Any

import keras

from tp_planner.frontend.torch_modules import parameter_names

# What every Keras layer has: names, hooks and bookkeeping.
BOOKKEEPING = frozenset(keras.layers.Layer(name="probe").__dict__)


class _Known(threading.local):
    model: keras.Model | None = None
    layers: dict[str, keras.Layer]
    variables: dict[str, Any]


_known = _Known()


@contextlib.contextmanager
def naming_once(model: keras.Model, layers: dict[str, keras.Layer] | None = None) -> Iterator[None]:
    """Inside, the names of the model's layers and variables are those at its start; they are not looked up again.

    ``layers`` are its layers by name, if they have other names than ``named_layers`` finds.
    """
    known = layers or named_layers(model), named_variables(model)
    before = vars(_known).copy()
    _known.model, (_known.layers, _known.variables) = model, known
    try:
        yield
    finally:
        vars(_known).clear()
        vars(_known).update(before)


def named_layers(model: keras.Model) -> dict[str, keras.Layer]:
    """Return every layer below and including ``model``, each once, by its unique name.

    Names are the layers' own names joined with "/" as they nest, without the model's own; the model itself
    goes by its name. A layer reached on several ways has the name of the first; equal names of
    different layers get "#2", "#3". Keras numbers automatic names globally, so that they depend on what else
    was built; layers without variables, which no rule can name, go by their class instead.
    """
    if _known.model is model:
        return _known.layers
    layers: dict[str, keras.Layer] = {}
    for wanted, layer in _walk(model, "", set()):
        name, count = wanted, 1
        while name in layers:
            count += 1
            name = f"{wanted}#{count}"
        layers[name] = layer
    return layers


def _walk(layer: keras.Layer, prefix: str, seen: set[int]) -> Iterator[tuple[str, keras.Layer]]:
    seen.add(id(layer))
    yield prefix or layer.name, layer
    for child in layer._layers:
        if id(child) not in seen:
            name = _stable_name(child)
            yield from _walk(child, f"{prefix}/{name}" if prefix else name, seen)


def _stable_name(layer: keras.Layer) -> str:
    if layer._trainable_variables or layer._non_trainable_variables:
        return str(layer.name)
    automatic: str = keras.src.utils.naming.to_snake_case(type(layer).__name__)
    is_automatic = re.fullmatch(rf"{re.escape(automatic)}(_\d+)?", layer.name)
    return automatic if is_automatic and not layer.weights else str(layer.name)


def named_variables(model: keras.Model) -> dict[str, Any]:
    """Return the model's variables, seed states included, each once by a unique key.

    The key is the variable's path, or path#2 ... where paths are equal. Keras numbers seed generators and parameters of
    torch modules globally, so that their paths depend on what else was built; their keys begin with their layer's name.
    """
    if _known.model is model:
        return _known.variables
    variables: dict[str, Any] = {}
    seen: set[int] = set()
    for name, layer in named_layers(model).items():
        seeds = {id(generator.state) for generator in layer._seed_generators}
        parameters = parameter_names(layer)
        for variable in own_variables(layer):
            if id(variable) in seen:
                continue
            seen.add(id(variable))
            path = f"{name}/{variable.name}" if id(variable) in seeds else variable.path
            if id(variable._value) in parameters:
                path = f"{name}/{parameters[id(variable._value)]}"
            key, count = path, 1
            while key in variables:
                count += 1
                key = f"{path}#{count}"
            variables[key] = variable
    return variables


def layers_of_variables(model: keras.Model) -> dict[str, str]:
    """Return the name of the layer that created each variable, by the variable's key."""
    keys = {id(variable): key for key, variable in named_variables(model).items()}
    owners: dict[str, str] = {}
    for name, layer in named_layers(model).items():
        for variable in own_variables(layer):
            owners.setdefault(keys[id(variable)], name)
    return owners


def own_variables(layer: keras.Layer) -> list[Any]:
    """Return the variables that the layer itself created, its seed states last; metrics are left out."""
    own = [*layer._trainable_variables, *layer._non_trainable_variables]
    return own + [generator.state for generator in layer._seed_generators]
