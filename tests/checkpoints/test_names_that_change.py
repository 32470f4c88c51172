"""Checkpoints go by the structure of models, not by names, which Keras numbers, and prefixes in what it builds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import tp_planner
from tests.workers import Pools, layout_map
from tp_planner.checkpoints.contents import contents_of, structure_of
from tp_planner.storage.variables import whole_tensor

RULES = {"(.*/)?up/kernel": (None, "model"), "(.*/)?up/bias": ("model",), "(.*/)?down/kernel": ("model", None)}


@keras.saving.register_keras_serializable("names_that_change")
class Pair(keras.layers.Layer):
    """Two layers of equal sizes, in either order, and a list of others, none of which has a name of its own."""

    def __init__(self, first: str = "left", second: str = "right", **options: Any) -> None:
        super().__init__(**options)
        self.names = sorted((first, second))
        for name in (first, second):
            setattr(self, name, layers.Dense(6))
        self.rest = [layers.Dense(6, "gelu"), layers.BatchNormalization()]

    def build(self, shape: Any) -> None:
        for layer in self._layers:
            layer.build(shape)

    def call(self, x: Any) -> Any:
        for layer in self.rest:
            x = layer(x)
        one, other = (getattr(self, name)(x) for name in self.names)
        return one - 2.0 * other


def functional() -> keras.Model:
    x = keras.Input((6,))
    y = layers.Dropout(0.2, seed=1)(layers.Dense(6, "gelu")(layers.Dense(6)(x)))
    return keras.Model(x, layers.Add()([Pair()(y), layers.Dense(6, name="own")(x)]))


def recurrent() -> keras.Model:
    x = keras.Input((3, 6))
    y = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(x)
    return keras.Model(x, layers.TimeDistributed(layers.Dense(5))(y))


def row() -> keras.Model:
    dense = [layers.Dense(8, "gelu", name="up"), layers.BatchNormalization(), layers.Dense(6, name="down")]
    return keras.Sequential([keras.Input((6,)), *dense, layers.Dense(6)], name="row")


def built_again(build: Callable[[], keras.Model], folder: Path) -> keras.Model:
    layers.Dense(1), layers.LSTM(1), layers.BatchNormalization()  # whose numbers are taken
    return build()


def loaded(build: Callable[[], keras.Model], folder: Path) -> keras.Model:
    build().save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


BUILDS = {"functional": functional, "recurrent": recurrent, "row": row}
OTHERS = {"built again": built_again, "loaded": loaded}


def trained(model: keras.Model, seed: int, steps: int = 2) -> tuple[keras.Model, list[Any]]:
    """Return the model with other weights, after steps of Adam, and the data of the next."""
    rng = np.random.default_rng(seed)
    model.set_weights([rng.standard_normal(each.shape) / 4 for each in model.get_weights()])
    model.compile(keras.optimizers.Adam(0.01, name=f"adam_{seed}"), "mse")
    rng = np.random.default_rng(0)
    data = [rng.standard_normal((8, *shape[1:])).astype("float32") for shape in (model.input_shape, model.output_shape)]
    for _ in range(steps):
        model.train_on_batch(*data)
    return model, data


def values(model: keras.Model) -> dict[str, np.ndarray]:
    """Return all that a checkpoint has of a model, by its place."""
    structure = structure_of(model)
    return {structure[name]: whole_tensor(each).numpy().copy() for name, each in contents_of(model).items()}


# On the ranks


def in_shards(folder: str) -> tuple[dict[str, np.ndarray], ...]:
    """Return what a model in shards had that was saved, and what one from a file then had, and one without values."""
    one, _ = trained(tp_planner.parallelize(row(), layout_map(RULES)), 1)
    path = tp_planner.save_checkpoint(one, folder)
    one.save(f"{folder}/row.keras")
    two = tp_planner.parallelize(keras.saving.load_model(f"{folder}/row.keras"), layout_map(RULES))
    two, _ = trained(two, 2)
    tp_planner.load_checkpoint(two, folder)
    with tp_planner.deferred_init():
        three = row()
    tp_planner.parallelize(three, layout_map(RULES), weights=path)
    return values(one), values(two), values(three)


# In the test's process


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", BUILDS)
def test_models_that_are_named_otherwise(name: str, other: str, tmp_path: Path) -> None:
    """Each loads what the other has saved, bit for bit, before and after its first step, and makes the same next."""
    one, two = BUILDS[name](), OTHERS[other](BUILDS[name], tmp_path)
    assert contents_of(one).keys() != contents_of(two).keys()
    for number, (saved, into, steps) in enumerate(((one, two, 0), (two, one, 2))):
        saved, data = trained(saved, 1)
        tp_planner.save_checkpoint(saved, tmp_path / str(number))
        into, _ = trained(into, 2, steps)
        tp_planner.load_checkpoint(into, tmp_path / str(number))
        np.testing.assert_equal(values(into), values(saved))
        assert into.train_on_batch(*data) == saved.train_on_batch(*data)
        np.testing.assert_equal(values(into), values(saved))


def test_in_shards(pools: Pools, tmp_path: Path) -> None:
    """So does a model in shards, and one that is given its weights when it is sharded."""
    for saved, loaded_values, born in pools(2).run(in_shards, str(tmp_path)):
        np.testing.assert_equal(loaded_values, saved)
        assert born
        np.testing.assert_equal(born, {place: saved[place] for place in born})


def test_equal_names_in_other_places(tmp_path: Path) -> None:
    """Layers that were made in another order have each other's names, and yet their own weights."""
    keras.utils.clear_session()
    one = keras.Sequential([keras.Input((6,)), Pair("left", "right", name="pair")], name="one")
    keras.utils.clear_session()
    two = keras.Sequential([keras.Input((6,)), Pair("right", "left", name="pair")], name="one")
    assert contents_of(one).keys() == contents_of(two).keys()
    tp_planner.save_checkpoint(trained(one, 1)[0], tmp_path)
    tp_planner.load_checkpoint(trained(two, 2)[0], tmp_path)
    np.testing.assert_equal(values(two), values(one))


def test_equal_names_of_other_models(tmp_path: Path) -> None:
    """A layer of the same name and sizes in another place is not taken for the one that was saved."""
    keras.utils.clear_session()
    one = keras.Sequential([keras.Input((6,)), Pair("left", "right", name="pair")], name="one")
    keras.utils.clear_session()
    two = keras.Sequential([keras.Input((6,)), Pair("left", "up", name="pair")], name="one")
    path = tp_planner.save_checkpoint(one, tmp_path)
    with pytest.raises(tp_planner.PlanError) as refusal:
        tp_planner.load_checkpoint(two, tmp_path)
    assert refusal.value.problems == (
        f"{path} has 'model/one/pair/dense_1/kernel' at '<pair>/right/kernel', the model at '<pair>/up/kernel'",
        f"{path} has 'model/one/pair/dense_1/bias' at '<pair>/right/bias', the model at '<pair>/up/bias'",
    )
