"""Rank 0 writes, whoever is asked to write whatever; the others take part, and see the file afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import keras
import keras_hub
import numpy as np
import pytest
import torch.distributed as dist

import tp_planner
from tests.layers.test_entries import RULES as NESTED
from tests.layers.test_entries import Nested, used
from tests.workers import Pools
from tp_planner.training.writing import is_distributed

LLAMA = {
    ".*(query|key|value)/kernel": (None, "model", None),
    ".*attention_output/kernel": ("model", None, None),
    ".*feedforward_(intermediate|gate)_dense/kernel": (None, "model"),
}
INPUTS = {"token_ids": np.ones((2, 6), "int32"), "padding_mask": np.ones((2, 6), "int32")}
X, Y = np.ones((8, 16)), np.ones((8, 8))


# On the ranks


def llama() -> Any:
    keras.utils.set_random_seed(1)
    model = keras_hub.models.Llama3Backbone(
        vocabulary_size=32,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
    )
    model.enable_lora(2)
    model.input_example = lambda: INPUTS
    return model


class WritingWeights(keras.callbacks.TensorBoard):
    """Writes what TensorBoard would, which is not installed: the weights, at the end of each epoch."""

    def set_model(self, model: keras.Model) -> None:
        self._model = model

    def on_train_begin(self, logs: Any = None) -> None:
        Path(self.log_dir).mkdir()

    def on_train_end(self, logs: Any = None) -> None: ...

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None: ...

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None: ...

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None: ...

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        np.savez(f"{self.log_dir}/weights.npz", *self.model.get_weights())


def fit(model: keras.Model, *callbacks: keras.callbacks.Callback, epochs: int = 2) -> None:
    if not model.compiled:
        model.compile(keras.optimizers.SGD(0.1, use_ema=True), "mse")
    model.fit(X, Y, epochs=epochs, batch_size=4, verbose=0, callbacks=list(callbacks))


def checkpoints(model: keras.Model, path: str) -> None:
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    fit(model, swap, keras.callbacks.ModelCheckpoint(f"{path}/{{epoch}}.weights.h5", save_weights_only=True))


def back_up(model: keras.Model, path: str) -> None:
    fit(model, keras.callbacks.BackupAndRestore(path, delete_checkpoint=False))
    fit(model, keras.callbacks.BackupAndRestore(f"{path}_deleted"))


def note_down(model: keras.Model, path: str) -> None:
    model.compile(keras.optimizers.SGD(0.1), "mse")  # without averages, which would be the weights after the last epoch
    fit(model, WritingWeights(path, histogram_freq=1))


WRITES: Mapping[str, Callable[[Any, str], Any]] = {
    "whole.keras": lambda model, path: model.save(path),
    "whole.weights.h5": lambda model, path: model.save_weights(path),
    "function.keras": lambda model, path: keras.saving.save_model(model, path),
    "function.weights.h5": lambda model, path: keras.saving.save_weights(model, path),
    "inner.weights.h5": lambda model, path: model.get_layer("inner").save_weights(path),
    "checkpoints": checkpoints,
    "backup": back_up,
    "log.csv": lambda model, path: fit(model, keras.callbacks.CSVLogger(path)),
    "board": note_down,
}
WRITES_OF_KERAS_HUB: Mapping[str, Callable[[Any, str], Any]] = {
    "adapter.lora.h5": lambda model, path: model.save_lora_weights(path),
    "preset": lambda model, path: model.save_to_preset(path),
}


def write(way: str, folder: str) -> dict[str, tuple[bool, bool]]:
    """Write everything, each rank to a place of its own; return whether this rank's and rank 0's are there."""
    found = {}
    for build, rules, writes in ((Nested(), NESTED, WRITES), (llama, LLAMA, WRITES_OF_KERAS_HUB)):
        with used(way, build, rules) as model:
            for name, each in writes.items():
                own, first = (Path(folder) / f"{rank}_{name}" for rank in (dist.get_rank(), 0))
                each(model, str(own))
                found[name] = own.exists(), first.exists()
            if build is not llama:
                model.save_weights(f"{folder}/last.weights.h5")
    return found


def write_one_place(way: str, folder: str) -> int:
    """Write to the same place from all ranks, again and again."""
    with used(way, Nested(), NESTED) as model:
        for number in range(3):
            model.save_weights(f"{folder}/same.weights.h5")
            fit(model, keras.callbacks.BackupAndRestore(f"{folder}/same_{number}"), epochs=1)
    return len(list(Path(folder).glob("same*")))


def alone(way: str, call: str, folder: str) -> list[str]:
    """Return what each rank hears where rank 0 alone makes a call, and the other another one."""
    with used(way, Nested(), NESTED) as model:
        calls: dict[str, Callable[[], Any]] = {
            "save": lambda: model.save(f"{folder}/alone.keras"),
            "save_weights of inner": lambda: model.get_layer("inner").save_weights(f"{folder}/alone.weights.h5"),
            "fit": functools.partial(fit, model),
            "evaluate": lambda: model.evaluate(X, Y, verbose=0),
            "predict": lambda: model.predict(X, verbose=0),
            "restore": lambda: tp_planner.restore(model),
        }
        model.compile("sgd", "mse")
        try:
            calls[call]() if dist.get_rank() == 0 else tp_planner.verify_model_parallel(model)
        except tp_planner.ParallelRuntimeError as error:
            return [str(error)]
    return []


def different_steps() -> list[str]:
    """Return what each rank hears whose share has another number of batches, and whether it trains afterwards."""
    size = dist.get_world_size()
    mesh = keras.distribution.DeviceMesh((size,), ("batch",), [f"cpu:{rank}" for rank in range(size)])
    model = tp_planner.parallelize(Nested()(), keras.distribution.LayoutMap(mesh), batch_axis="batch")
    model.compile("sgd", "mse")
    rows = 8 - 4 * dist.get_rank()
    try:
        model.fit(X[:rows], Y[:rows], batch_size=4, verbose=0)
    except tp_planner.ParallelRuntimeError as error:
        model.fit(X[: 8 - dist.get_rank()], Y[: 8 - dist.get_rank()], batch_size=4, verbose=0)
        return [str(error), str(model.predict(X[:rows], verbose=0).shape)]
    return []


# In the parent

WAYS = ("parallelize", "distribution", "called")


@pytest.mark.parametrize("way", [*WAYS[:2], pytest.param(WAYS[2], marks=pytest.mark.slow)])
def test_rank_zero_writes(pools: Pools, way: str, tmp_path: Path) -> None:
    """Of the files that ranks are told to write only rank 0's are there, for every rank to see, and they are whole."""
    first, second = pools(2).run(write, way, str(tmp_path))
    assert first == dict.fromkeys((*WRITES, *WRITES_OF_KERAS_HUB), (True, True))
    assert second == dict.fromkeys((*WRITES, *WRITES_OF_KERAS_HUB), (False, True))
    assert not (tmp_path / "0_backup_deleted").exists()
    assert sorted(path.name for path in (tmp_path / "0_checkpoints").iterdir()) == ["1.weights.h5", "2.weights.h5"]
    whole, loaded, preset = Nested()(), llama(), keras_hub.models.Llama3Backbone.from_preset(str(tmp_path / "0_preset"))
    written = [array.copy() for array in whole.get_weights()]
    for name in ("whole.weights.h5", "function.weights.h5"):
        whole.set_weights([np.zeros_like(array) for array in written])
        whole.load_weights(tmp_path / f"0_{name}")
        for array, expected in zip(whole.get_weights(), written, strict=True):
            np.testing.assert_array_equal(array, expected)
    loaded.load_lora_weights(str(tmp_path / "0_adapter.lora.h5"))
    expected = keras.ops.convert_to_numpy(loaded(INPUTS))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(preset(INPUTS)), expected, rtol=1e-5, atol=1e-5)
    whole.load_weights(tmp_path / "last.weights.h5")
    with np.load(tmp_path / "0_board" / "weights.npz") as board:
        for array, expected in zip(board.values(), whole.get_weights(), strict=True):
            np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS[:2])
def test_all_ranks_write_to_one_place(pools: Pools, way: str, tmp_path: Path) -> None:
    assert pools(2).run(write_one_place, way, str(tmp_path)) == [1, 1]


CALLS = {
    "save": "model.save",
    "save_weights of inner": "model.save_weights",
    "fit": "model.fit",
    "evaluate": "model.evaluate",
    "predict": "model.predict",
    "restore": "tp_planner.restore",
}


@pytest.mark.parametrize(
    ("way", "call"),
    [
        *(("parallelize", call) for call in CALLS),
        *(pytest.param("distribution", call, marks=[] if call == "fit" else pytest.mark.slow) for call in CALLS),
    ],
)
def test_a_call_on_one_rank_alone(pools: Pools, way: str, call: str, tmp_path: Path) -> None:
    """Whoever waits in a call that the other does not make is told where that one waits, before the first call, too."""
    if (way, call) == ("distribution", "restore"):
        pytest.skip("there is nothing to restore before the first call")
    same = "every rank has to make the same calls in the same order"
    assert pools(2).run(alone, way, call, str(tmp_path)) == [
        [f"{CALLS[call]}: rank 1 waits in verify_model_parallel instead; {same}"],
        [f"verify_model_parallel: rank 0 waits in {CALLS[call]} instead; {same}"],
    ]


def test_replicas_that_are_given_different_numbers_of_batches(pools: Pools) -> None:
    message = (
        "model.fit: rank 0 was given 2 batches, rank 1 1; replicas take each step together: give all the same number, "
        "of which the last may be shorter"
    )
    assert pools(2).run(different_steps) == [[message, "(8, 8)"], [message, "(4, 8)"]]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_starts_before_it_is_asked_who_writes(processes: int) -> None:
    """Nothing before the first call has to start the process group: without it every process would write."""
    mesh = mock.MagicMock()
    started = mock.PropertyMock()
    type(mesh).backend_mesh = started
    distribution = SimpleNamespace(num_processes=processes, device_mesh=mesh)
    with mock.patch.object(keras.distribution, "distribution", return_value=distribution):
        assert not is_distributed()
    assert started.called == (processes > 1)
