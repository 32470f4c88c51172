"""Layers that take shards do not check them against the sizes of the whole; afterwards they check as before."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import pytest
from keras.src.layers.input_spec import assert_input_compatibility

from tp_planner.layers.styles import relax_input_spec


def _axes() -> keras.Layer:
    layer = keras.layers.Dense(4)
    layer.build((None, 8))
    return layer


def _shape() -> keras.Layer:
    layer = keras.layers.Identity()
    layer.input_spec = keras.InputSpec(shape=(None, 8))
    return layer


def _several() -> keras.Layer:
    layer = keras.layers.Identity()
    layer.input_spec = [keras.InputSpec(shape=(None, 8))]
    return layer


def _model() -> keras.Layer:
    inputs = keras.Input((8,))
    return keras.Model(inputs, keras.layers.Activation("relu")(inputs))


@pytest.mark.parametrize("make", [_axes, _shape, _several, _model])
def test_shards_are_taken(make: Callable[[], keras.Layer]) -> None:
    layer, shard = make(), np.zeros((2, 4), "float32")
    specs, attributes = repr(layer.input_spec), set(vars(layer))
    undo: list[Callable[[], None]] = []
    relax_input_spec(layer, undo)
    assert_input_compatibility(layer.input_spec, shard, layer.name)
    for each in undo:
        each()
    assert repr(layer.input_spec) == specs
    assert set(vars(layer)) == attributes
    with pytest.raises(ValueError, match="incompatible"):
        assert_input_compatibility(layer.input_spec, shard, layer.name)
