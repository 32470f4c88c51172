"""Models built without values may be compiled there: their optimizers have values."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

import tp_planner


def test_optimizers_of_models_without_values_keep_their_learning_rate() -> None:
    with tp_planner.deferred_init():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        model.compile(keras.optimizers.Adam(0.25), "mse")
    assert model.layers[0].kernel._value.is_meta
    assert float(model.optimizer.learning_rate.numpy()) == 0.25


class Repeats(keras.layers.Layer):
    def call(self, x: Any) -> Any:
        return [
            keras.ops.repeat(x, 2, axis=0),
            keras.ops.repeat(x, np.array([1, 3, 2, 0]), axis=-1),
            keras.ops.repeat(x, np.int64(3)),
        ]


def test_repeated_tensors_without_values_have_shapes() -> None:
    """A layer's code repeats a class token, say; Keras fails to repeat what is on the meta device."""
    with tp_planner.deferred_init():
        found = Repeats()(np.zeros((2, 3, 4)))
    assert all(each.is_meta for each in found)
    assert [each.shape for each in found] == [each.shape for each in Repeats()(np.zeros((2, 3, 4)))]
