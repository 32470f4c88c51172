"""Weights: what a model trains, and its parameters, found once for as long as they stay the same.

Keras walks through all layers to forget gradients, twice in a step, and once to find the weights that are trained: of a
small model's step as much as the update.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import keras

from tp_planner.replay.objects import Held

_OF_LAYERS = ("_trainable_variables", "_non_trainable_variables", "_layers")
_WALKS = ("weights", "trainable_weights", "trainable", "zero_grad", "parameters", "named_parameters")
_TRAINABLE = operator.itemgetter("_trainable")


class TrainedWeights:
    """The weights that a model trains and the parameters it has, looked for again where layers or weights change."""

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self.found: Found | None = None  # None where it is not known what changes it

    def forget_gradients(self) -> None:
        """Do what the model's ``zero_grad`` does."""
        self._look()
        self.forget_gradients_again()

    def forget_gradients_again(self) -> None:
        """Do the same, in a step in which it was done."""
        if self.found is None:
            self._model.zero_grad()
            return
        for parameter in self.found.parameters:
            parameter.grad = None

    def trained(self) -> list[Any]:
        """Return the model's ``trainable_weights``."""
        self._look()
        return list(self._model.trainable_weights if self.found is None else self.found.trained)

    def _look(self) -> None:
        if "zero_grad" in vars(self._model):
            self.found = None
        elif self.found is None or self.found.is_another():
            layers = list(self._model._flatten_layers())
            self.found = Found(self._model, layers) if all(map(_is_walked_by_keras, layers)) else None


def _is_walked_by_keras(layer: keras.Layer) -> bool:
    """Whether a layer's weights and parameters are those that Keras finds, and no torch module's."""
    kinds = keras.Model if isinstance(layer, keras.Model) else keras.Layer
    own = any(inspect.getattr_static(type(layer), name) is not inspect.getattr_static(kinds, name) for name in _WALKS)
    return not own and not isinstance(layer, keras.layers.TorchModuleWrapper)


class Found:
    """What was found, as long as it is no other."""

    def __init__(self, model: keras.Model, layers: Sequence[keras.Layer]) -> None:
        self._held = Held(*(getattr(layer, name) for layer in layers for name in _OF_LAYERS))
        self._layers = list(map(vars, layers))
        self._flags = list(map(_TRAINABLE, self._layers))
        self.trained: Sequence[Any] = model.trainable_weights
        self.parameters = list(model.parameters())

    def is_another(self) -> bool:
        """Whether a layer has other weights or layers, or something is trained that was not, or the reverse."""
        return list(map(_TRAINABLE, self._layers)) != self._flags or self._held.is_another()
