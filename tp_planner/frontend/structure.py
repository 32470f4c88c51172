"""Where variables are in the structure of a model, whatever names Keras has made for its layers.

Keras numbers automatic names globally, and a Sequential's variables have its name in their paths if it was built in
code, but not if it was loaded from a file. So equal models may name their variables differently, and different ones
alike; only their structure tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import keras

from tp_planner.frontend.layer_tree import BOOKKEEPING, named_variables, own_variables
from tp_planner.frontend.torch_modules import parameter_names


def places_in_structure(model: keras.Model) -> dict[str, str]:
    """Return the place of each variable, by its key in ``named_variables``; equal in models of the same code.

    A place is the attributes, or names, that lead to the variable's layer, and its name there. A layer in a list, or in
    a Functional model, whose name is automatic, goes by its class and which of these it is.
    """
    keys = {id(variable): key for key, variable in named_variables(model).items()}
    places: dict[str, str] = {}
    unique = _Unique()
    for place, layer in _walk(model, "", set()):
        for variable in own_variables(layer):
            places.setdefault(keys[id(variable)], unique.of(place + _name_in(layer, variable)))
    return places


class _Unique:
    """Tells equal names apart by their numbers."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def of(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self._seen:
            count += 1
            name = f"{wanted}#{count}"
        self._seen.add(name)
        return name


def _name_in(layer: keras.Layer, variable: Any) -> str:
    parameters = parameter_names(layer)
    if id(variable._value) in parameters:
        return parameters[id(variable._value)]
    return _without_number(str(variable.name), "variable")


def _walk(layer: keras.Layer, place: str, seen: set[int]) -> Iterator[tuple[str, keras.Layer]]:
    seen.add(id(layer))
    yield place, layer
    names, is_row = _Unique(), isinstance(layer, keras.Sequential | keras.src.models.Functional)
    attributes, lists = ({}, {}) if is_row else (_attributes(layer), _lists(layer))
    for child in layer._layers:
        name = attributes.get(id(child)) or _name_of(child, lists.get(id(child), ""))
        name = names.of(name)
        if id(child) not in seen:
            yield from _walk(child, f"{place}{name}/", seen)


def _attributes(layer: keras.Layer) -> dict[int, str]:
    """Return the first attribute that each layer below was given to."""
    found: dict[int, str] = {}
    for name, value in layer._modules.items():
        found.setdefault(id(value), name)
    return found


def _lists(layer: keras.Layer) -> dict[int, str]:
    """Return the first attribute whose list, or other container, has each layer below."""
    found: dict[int, str] = {}
    for name, value in vars(layer).items():
        if name not in BOOKKEEPING and isinstance(value, list | tuple | dict):
            for each in keras.tree.flatten(value):
                found.setdefault(id(each), name)
    return found


def _name_of(layer: keras.Layer, held_in: str) -> str:
    """Return a layer's name; if Keras has made it, without its number, and with the list that holds the layer."""
    automatic = keras.src.utils.naming.to_snake_case(type(layer).__name__)
    name = _without_number(str(layer.name), automatic)
    return name if name == layer.name or not held_in else f"{held_in}.{name}"


def _without_number(name: str, automatic: str) -> str:
    return f"<{automatic}>" if re.fullmatch(rf"{re.escape(automatic)}(_\d+)?", name) else name
