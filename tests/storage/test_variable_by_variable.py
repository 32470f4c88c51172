"""Keras's own calls go from variable to variable: none holds the model whole, and files are those of one device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch.distributed as dist

import tp_planner
from tests.keras_distribution.test_model_parallel import model_parallel
from tests.memory_in_use import watching
from tests.models import CASES
from tests.storage.test_persistence import contents, trained
from tests.workers import Pools, layout_map
from tp_planner.checkpoints.contents import contents_of
from tp_planner.storage.variables import local_tensor

WIDTH, LAYERS = 1024, 6
LARGEST = 4 * WIDTH * WIDTH  # bytes of a weight; with Adam's slots the model has 18 as large
RULES = {"wide_[135]/kernel": (None, "model"), "wide_[024]/kernel": ("model", None)}
WRITES: dict[str, Callable[[keras.Model, str], Any]] = {
    "model.weights.h5": lambda model, path: model.save_weights(path),
    "model.keras": lambda model, path: model.save(path),
    "parts.weights.json": lambda model, path: model.save_weights(path, max_shard_size=LARGEST * 3 / 2**30),
}


def wide() -> keras.Model:
    x = inputs = keras.Input((WIDTH,), name="x")
    for number in range(LAYERS):
        x = keras.layers.Dense(WIDTH, use_bias=False, name=f"wide_{number}")(x)
    model = keras.Model(inputs, x, name="wide")
    model.compile(keras.optimizers.Adam(0.01, name="adam"), "mse")
    return model


# On the ranks


def write_twice(folder: str) -> None:
    """Write a trained model in shards, then the same model restored to one device, which is written by rank 0."""
    model, x, y = trained()
    tp_planner.parallelize(model, layout_map(CASES["gpt"].rules))
    for _ in range(2):
        model.train_on_batch(x, y)
    for name, write in WRITES.items():
        Path(folder, "shards").mkdir(exist_ok=True)
        write(model, f"{folder}/shards/{name}")
    model.fit(
        x,
        y,
        epochs=1,
        verbose=0,
        callbacks=[keras.callbacks.ModelCheckpoint(f"{folder}/shards/checkpoint.weights.h5", save_weights_only=True)],
    )
    model.load_weights(f"{folder}/shards/model.weights.h5")
    tp_planner.restore(model)
    if dist.get_rank() == 0:
        Path(folder, "single").mkdir()
        for name, write in WRITES.items():
            write(model, f"{folder}/single/{name}")


def peaks_of_calls(folder: str) -> dict[str, int]:
    """Return how much memory each call takes at most, beside what the model has already."""
    found = {}

    def measure(what: str, act: Callable[[], Any]) -> None:
        with watching() as most:
            act()
        found[what] = most[0]

    model = tp_planner.parallelize(wide(), layout_map(RULES))
    x = np.ones((2, WIDTH), "float32")
    model.train_on_batch(x, x)
    for again in ("first ", ""):  # what is imported and cached in the first use is there
        for name, write in WRITES.items():
            measure(f"{again}write {name}", lambda name=name, write=write: write(model, f"{folder}/{name}"))
            measure(f"{again}load {name}", lambda name=name: model.load_weights(f"{folder}/{name}"))
        backup = keras.callbacks.BackupAndRestore(f"{folder}/backup")
        measure(f"{again}back up", lambda backup=backup: model.fit(x, x, verbose=0, callbacks=[backup]))
        for name in ("each.keras", "each.weights.h5"):
            each = keras.callbacks.ModelCheckpoint(f"{folder}/{name}", save_weights_only=name != "each.keras")
            measure(f"{again}ModelCheckpoint {name}", lambda each=each: model.fit(x, x, verbose=0, callbacks=[each]))
        array = np.ones((WIDTH, WIDTH), "float32")
        measure(f"{again}assign", lambda array=array: model.get_layer("wide_1").kernel.assign(array))
    return {what: most for what, most in found.items() if not what.startswith("first")}


def loaded_under_a_distribution(folder: str) -> tuple[int, int, dict[str, np.ndarray]]:
    """Return the most memory that loading a model took, this rank's values, and all values."""
    with model_parallel(RULES):
        keras.saving.load_model(f"{folder}/model.keras")
        with watching() as most:
            model = keras.saving.load_model(f"{folder}/model.keras")
        found = contents_of(model)
        own = sum(local_tensor(variable).nbytes for variable in found.values())
        return most[0], own, {name: np.array(variable) for name, variable in found.items()}


# In the test's process


def test_files_are_equal_to_those_of_one_device(pools: Pools, tmp_path: Path) -> None:
    """All names, dtypes and values, the optimizer's too, bit for bit."""
    pools(2).run(write_twice, str(tmp_path))
    single, shards = (
        {
            f"{path.name.rpartition('_')[2]}/{name}": value
            for path in sorted((tmp_path / folder).iterdir())
            if path.name.endswith(".h5") and not path.name.startswith("checkpoint")
            for name, value in contents(path).items()
        }
        for folder in ("single", "shards")
    )
    assert any("optimizer/vars" in name for name in single)
    np.testing.assert_equal(shards, single)
    assert {name: each.dtype for name, each in shards.items()} == {name: each.dtype for name, each in single.items()}
    models = [keras.saving.load_model(tmp_path / folder / "model.keras") for folder in ("single", "shards")]
    one, other = ({name: np.array(each) for name, each in contents_of(model).items()} for model in models)
    np.testing.assert_equal(one, other)


@pytest.mark.slow
def test_no_call_holds_the_model(pools: Pools, tmp_path: Path) -> None:
    """Saving, loading and assigning take a few copies of one weight, of a model of 18 such weights."""
    for answer in pools(2).run(peaks_of_calls, str(tmp_path)):
        for what, most in answer.items():
            assert most < 8 * LARGEST, what
    model = keras.saving.load_model(tmp_path / "model.keras")
    expected = {name: np.array(each) for name, each in contents_of(model).items()}
    for most, own, values in pools(2).run(loaded_under_a_distribution, str(tmp_path)):
        assert len(values) == 3 * LAYERS + 2
        np.testing.assert_equal(values, expected)
        assert own < 10 * LARGEST
        assert most < own + 8 * LARGEST
