"""Names for the layers and variables of a Keras model that are unique, stable and readable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras


def named_layers(model: keras.Model) -> dict[str, keras.Layer]:
    """Return every layer below and including ``model``, each once, by its unique name.

    Names are the layers' own names joined with "/" as they nest, without the model's own; the model itself
    goes by its name. A layer reached on several ways has the name of the first; equal names of
    different layers get "#2", "#3".
    """
    layers: dict[str, keras.Layer] = {}
    for prefix, layer in _walk(model, "", set()):
        name, count = prefix, 1
        while name in layers:
            count += 1
            name = f"{prefix}#{count}"
        layers[name] = layer
    return layers


def _walk(layer: keras.Layer, name: str, seen: set[int]) -> Iterator[tuple[str, keras.Layer]]:
    seen.add(id(layer))
    yield name or layer.name, layer
    for child in layer._layers:
        if id(child) not in seen:
            yield from _walk(child, f"{name}/{child.name}" if name else child.name, seen)


def named_variables(model: keras.Model) -> dict[str, Any]:
    """Return the model's variables, seed states included, each once by a unique key: its path, or path#2 ..."""
    variables: dict[str, Any] = {}
    seen: set[int] = set()
    for layer in named_layers(model).values():
        for variable in own_variables(layer):
            if id(variable) in seen:
                continue
            seen.add(id(variable))
            key, count = variable.path, 1
            while key in variables:
                count += 1
                key = f"{variable.path}#{count}"
            variables[key] = variable
    return variables


def own_variables(layer: keras.Layer) -> list[Any]:
    """Return the variables that the layer itself created, its seed states last; metrics are left out."""
    own = [*layer._trainable_variables, *layer._non_trainable_variables]
    return own + [generator.state for generator in layer._seed_generators]
