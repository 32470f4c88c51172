"""Torch modules inside Keras models: what their parameters are called, and how they compute with other tensors.

A ``TorchModuleWrapper`` has a Keras variable for each parameter, which the module reads by itself and under a name of
its own. Keras calls all of them "variable", and numbers them across models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import torch

Wrapper = keras.layers.TorchModuleWrapper


def parameter_names(layer: keras.Layer) -> dict[int, str]:
    """Return torch's names of a layer's parameters, such as ``0.weight``, by ``id``; none for any other layer."""
    if not isinstance(layer, Wrapper):
        return {}
    return {id(parameter): name for name, parameter in layer.module.named_parameters()}


def parameter_holders(layer: keras.Layer) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield where the layer's torch modules hold their parameters: a module's own dict, and the name in it."""
    if isinstance(layer, Wrapper):
        for module in layer.module.modules():
            yield from ((module._parameters, name) for name, value in module._parameters.items() if value is not None)


def keeps_parameters_elsewhere(layer: keras.Layer) -> bool:
    """Whether modules inside the layer hold their parameters in other places too, as torch's recurrent ones do."""
    return isinstance(layer, Wrapper) and any(isinstance(each, torch.nn.RNNBase) for each in layer.module.modules())


@contextlib.contextmanager
def computing_with(layer: keras.Layer, tensors: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Inside, the layer's torch modules have these tensors in place of their parameters, by ``id`` of the parameter."""
    held = [(holder, name, holder[name]) for holder, name in parameter_holders(layer) if id(holder[name]) in tensors]
    for holder, name, parameter in held:
        holder[name] = tensors[id(parameter)]
    try:
        yield
    finally:
        for holder, name, parameter in held:
            holder[name] = parameter
