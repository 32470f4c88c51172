"""Keras's own saving and loading calls on a sharded model: one ordinary file, whole values, clear refusals."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import torch.distributed as dist

import tp_planner
from tests.models import CASES
from tests.workers import WorkerPool, layout_map

Arrays = dict[str, np.ndarray]


def contents(path: Path) -> Arrays:
    """Return every dataset of an HDF5 file by its name."""
    found: Arrays = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def trained(folder: str | None = None) -> tuple[keras.Model, Any, Any]:
    """Return the GPT after two steps; built alike on every rank."""
    case = CASES["gpt"]
    model = case.build("float64")
    x, y = case.batch(np.random.default_rng(0), 4)
    model.compile(keras.optimizers.AdamW(0.01, epsilon=1e-3, name="adamw"), case.make_loss("float64"))
    return model, x, y


# On the ranks


def save_both(folder: str) -> None:
    """Train and save a plain model and a sharded one."""
    rules = CASES["gpt"].rules
    for name in ("single", "sharded"):
        model, x, y = trained()
        if name == "sharded":
            tp_planner.parallelize(model, layout_map(rules))
        for _ in range(2):
            model.train_on_batch(x, y)
        if name == "sharded" or dist.get_rank() == 0:
            model.save_weights(f"{folder}/{name}.weights.h5")
            model.save(f"{folder}/{name}.keras")
    checkpoint = keras.callbacks.ModelCheckpoint(f"{folder}/epoch_{{epoch}}.weights.h5", save_weights_only=True)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[checkpoint])


def resume(folder: str, sharded: bool) -> list[float]:
    """Load the whole model with its optimizer from a file and train on."""
    case = CASES["gpt"]
    model = keras.saving.load_model(f"{folder}/sharded.keras")
    if sharded:
        tp_planner.parallelize(model, layout_map(case.rules))
    x, y = case.batch(np.random.default_rng(0), 4)
    return [float(model.train_on_batch(x, y)) for _ in range(3)]


def load_into_sharded(folder: str) -> Arrays:
    """Load a file into a sharded model with other weights and return its variables."""
    model, _, _ = trained()
    model.set_weights([np.zeros_like(weight) for weight in model.get_weights()])
    tp_planner.parallelize(model, layout_map(CASES["gpt"].rules))
    model.load_weights(f"{folder}/single.weights.h5")
    return {variable.path: variable.numpy() for variable in model.variables}


def set_and_get() -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """Set weights, read them back, and assign a single variable."""
    model, _, _ = trained()
    tp_planner.parallelize(model, layout_map(CASES["gpt"].rules))
    rng = np.random.default_rng(7)
    given = [rng.standard_normal(weight.shape) for weight in model.get_weights()]
    model.set_weights(given)
    read = model.get_weights()
    variable = model.get_layer("block_0_up").kernel
    value = rng.standard_normal(variable.shape)
    variable.assign(value)
    return given, read, value, variable.numpy()


def save_on_rank_zero_alone(folder: str) -> str:
    """Return what each rank hears if rank 0 saves alone, while the other goes on, until both have heard it."""
    model, _, _ = trained()
    tp_planner.parallelize(model, layout_map(CASES["gpt"].rules))
    heard = ""
    try:
        if dist.get_rank() == 0:
            model.save_weights(f"{folder}/alone.weights.h5")
        else:
            tp_planner.verify_model_parallel(model)
    except tp_planner.ParallelRuntimeError as error:
        heard = str(error)
    dist.barrier()  # the one that heard first would wait in the next job, and the other be told of that
    return heard


def save_where_rank_zero_fails(folder: str) -> str:
    """Return what each rank hears if the file cannot be written."""
    model, _, _ = trained()
    tp_planner.parallelize(model, layout_map(CASES["gpt"].rules))
    try:
        model.save_weights(f"{folder}/no/such/folder/x.weights.h5")
    except (tp_planner.ParallelRuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def assign_wrong_shape() -> str:
    model, _, _ = trained()
    tp_planner.parallelize(model, layout_map(CASES["gpt"].rules))
    try:
        model.get_layer("block_0_up").kernel.assign(np.zeros((3, 3)))
    except ValueError as error:
        return str(error)
    return "assigned"


# In the parent


@pytest.fixture(scope="module")
def saved(pools: Callable[[int], WorkerPool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have saved a plain model and a sharded one."""
    folder = tmp_path_factory.mktemp("saved")
    pools(2).run(save_both, str(folder))
    return folder


def test_files_are_those_of_a_single_device(saved: Path) -> None:
    """Rank 0 writes the files that plain Keras would write, and no rank writes another one."""
    assert sorted(path.name for path in saved.iterdir()) == [
        "epoch_1.weights.h5",
        "epoch_2.weights.h5",
        "sharded.keras",
        "sharded.weights.h5",
        "single.keras",
        "single.weights.h5",
    ]
    single, sharded = (contents(saved / f"{name}.weights.h5") for name in ("single", "sharded"))
    assert single.keys() == sharded.keys()
    for name, value in single.items():
        np.testing.assert_allclose(sharded[name], value, rtol=1e-12, atol=1e-15, err_msg=name)
    config = [_config(saved / f"{name}.keras") for name in ("single", "sharded")]
    assert config[0] == config[1]


def test_plain_keras_reads_the_files(saved: Path) -> None:
    """A plain model loaded from a sharded model's file has its weights and its optimizer's slots."""
    loaded = {name: keras.saving.load_model(saved / f"{name}.keras") for name in ("single", "sharded")}
    for one, other in zip(loaded["single"].variables, loaded["sharded"].variables, strict=True):
        np.testing.assert_allclose(other.numpy(), one.numpy(), rtol=1e-12, atol=1e-15)
    slots = zip(loaded["single"].optimizer.variables, loaded["sharded"].optimizer.variables, strict=True)
    for one, other in slots:
        np.testing.assert_allclose(other.numpy(), one.numpy(), rtol=1e-12, atol=1e-15)


def test_training_goes_on(workers: WorkerPool, saved: Path) -> None:
    """A model loaded with its optimizer gives the same losses sharded as on one device."""
    single, sharded = (workers.run(resume, str(saved), sharded)[0] for sharded in (False, True))
    np.testing.assert_allclose(sharded, single, rtol=1e-5)  # a loss from a file computes in float32


def test_load_weights_spreads_a_file(workers: WorkerPool, saved: Path) -> None:
    """load_weights gives every rank its shards of a plain file."""
    found = workers.run(load_into_sharded, str(saved))
    expected = keras.saving.load_model(saved / "single.keras")
    for variable in expected.variables:
        np.testing.assert_array_equal(found[-1][variable.path], variable.numpy())


def test_set_get_and_assign(workers: WorkerPool) -> None:
    """Weights that are set are read back whole on every rank."""
    for given, read, value, assigned in workers.run(set_and_get):
        for one, other in zip(given, read, strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(value, assigned)


def test_saving_on_rank_zero_alone_is_refused(pools: Callable[[int], WorkerPool], tmp_path: Path) -> None:
    """Rank 0 hears that the others did not come, instead of waiting for them forever."""
    same = "every rank has to make the same calls in the same order"
    assert pools(2).run(save_on_rank_zero_alone, str(tmp_path)) == [
        f"model.save_weights: rank 1 waits in verify_model_parallel instead; {same}",
        f"verify_model_parallel: rank 0 waits in model.save_weights instead; {same}",
    ]


def test_all_ranks_hear_that_saving_failed(pools: Callable[[int], WorkerPool], tmp_path: Path) -> None:
    """An error of rank 0 while it writes ends the call on every rank."""
    zero, one = pools(2).run(save_where_rank_zero_fails, str(tmp_path))
    assert "No such file or directory" in zero
    assert one == "ParallelRuntimeError: model.save_weights failed on rank 0; see its error there"


def test_assigning_a_wrong_shape_is_refused(pools: Callable[[int], WorkerPool]) -> None:
    """A value that is neither whole nor a shard in an update is refused, with both shapes."""
    message = pools(2).run(assign_wrong_shape)[0]
    assert message == (
        "the value assigned to 'block_0_up/kernel' has shape (3, 3), "
        "the variable has shape (32, 128); assign the whole value"
    )


def _config(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        text = archive.read("config.json").decode()
    return json.loads(re.sub(r'"shared_object_id": \d+', '"shared_object_id": 0', text))
