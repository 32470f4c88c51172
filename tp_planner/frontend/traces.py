"""Traces: those of one model, called in one way. Plans that divide the model into equal blocks alike share them."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import keras

from tp_planner.frontend.blocks import Blocks
from tp_planner.frontend.survey import survey
from tp_planner.frontend.trace import trace
from tp_planner.ir.graph import LayerInfo, ModelGraph, VariableInfo


class Traces:
    """The traces of ``model`` with ``inputs``, with its torch functions; each is made once.

    They are those of a model that stays as it is, and of one kind of device.
    """

    def __init__(self, model: keras.Model, inputs: Any) -> None:
        self._model, self._inputs = model, inputs
        self._made: dict[Hashable, ModelGraph] = {}

    @functools.cached_property
    def _surveyed(self) -> tuple[dict[str, LayerInfo], dict[str, VariableInfo]]:
        return survey(self._model)

    def of(self, blocks: Blocks, training: bool) -> ModelGraph:
        """Return the trace of a call of which only one of each of the ``blocks`` is run."""
        key = tuple(blocks.signatures.items()), training
        if key not in self._made:
            self._made[key] = trace(
                self._model, self._inputs, training=training, blocks=blocks, functions=True, surveyed=self._surveyed
            )
        return self._made[key]
