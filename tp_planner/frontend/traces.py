"""Traces: those of one model, called in one way. Plans that divide the model into equal blocks alike share them."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import keras

from tp_planner.frontend.blocks import Blocks, layer_signature
from tp_planner.frontend.survey import Surveyed, survey
from tp_planner.frontend.trace import trace
from tp_planner.ir.graph import ModelGraph


class Traces:
    """The traces of ``model`` with ``inputs``, with its torch functions; each is made once.

    They are those of a model that stays as it is, and of one kind of device. ``surveyed`` are its layers and variables,
    ``signature`` is what has to be equal in a layer itself for another to be planned like it, as a number.
    """

    def __init__(self, model: keras.Model, inputs: Any, surveyed: Surveyed | None = None) -> None:
        self._model, self._inputs = model, inputs
        self._made: dict[Hashable, ModelGraph] = {}
        self.surveyed = surveyed or survey(model)
        self._within: dict[Hashable, Traces] = {}
        numbers: dict[Hashable, int] = {}
        self.signature = functools.cache(lambda layer: numbers.setdefault(layer_signature(layer), len(numbers)))

    def within(self, layers: Hashable) -> Traces:
        """Return the traces of the model while its layers are those of these names."""
        if layers not in self._within:
            self._within[layers] = Traces(self._model, self._inputs)
        return self._within[layers]

    def of(self, blocks: Blocks, training: bool) -> ModelGraph:
        """Return the trace of a call of which only one of each of the ``blocks`` is run."""
        key = tuple(blocks.signatures.items()), training
        if key not in self._made:
            self._made[key] = trace(
                self._model, self._inputs, training=training, blocks=blocks, functions=True, surveyed=self.surveyed
            )
        return self._made[key]
