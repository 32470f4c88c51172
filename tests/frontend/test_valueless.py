"""Models built without values may be compiled there: their optimizers have values."""

from __future__ import annotations

import keras

import tp_planner


def test_optimizers_of_models_without_values_keep_their_learning_rate() -> None:
    with tp_planner.deferred_init():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        model.compile(keras.optimizers.Adam(0.25), "mse")
    assert model.layers[0].kernel._value.is_meta
    assert float(model.optimizer.learning_rate.numpy()) == 0.25
