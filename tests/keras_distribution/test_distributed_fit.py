"""Data, logs and callbacks under a distribution: every process has its share, rank 0 writes, all decide alike."""

from __future__ import annotations

import contextlib
import csv
import io
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
from keras.src.trainers import data_adapters

import tp_planner
from tests.keras_distribution.test_model_parallel import PAIR, data, model_parallel, pair
from tests.workers import Pools

ROWS, BATCH, EPOCHS = 14, 4, 2


class Batches(keras.utils.PyDataset):
    def __init__(self, workers: int) -> None:
        super().__init__(workers=workers)

    def __len__(self) -> int:
        return -(-ROWS // BATCH)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.arange(ROWS)[index * BATCH : (index + 1) * BATCH].astype("float32")
        return rows[:, None], -rows


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([float(index)]), torch.tensor(-float(index))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        info = torch.utils.data.get_worker_info()
        step, first = (1, 0) if info is None else (info.num_workers, info.id)
        return ((torch.tensor([float(row)]), torch.tensor(-float(row))) for row in range(first, ROWS, step))


def loader(dataset: Any, workers: int, shuffle: bool | None = None) -> torch.utils.data.DataLoader[Any]:
    fork = "fork" if workers else None  # quicker than the spawning that ranks of the pool would do
    return torch.utils.data.DataLoader(dataset, BATCH, shuffle, num_workers=workers, multiprocessing_context=fork)


def source(kind: str) -> dict[str, Any]:
    """Return the arguments that give Keras rows 0 to 13, in batches of 4."""
    rows = np.arange(ROWS, dtype="float32")
    dataset, _, workers = kind.partition(" ")
    match dataset:
        case "arrays":
            return {"x": rows[:, None], "y": -rows, "batch_size": BATCH}
        case "shuffled":
            return {"x": rows[:, None], "y": -rows, "batch_size": BATCH, "shuffle": True}
        case "dictionary":
            return {"x": {"a": rows[:, None]}, "y": -rows, "batch_size": BATCH, "shuffle": True}
        case "PyDataset":
            return {"x": Batches(int(workers)), "shuffle": True}
        case "DataLoader":
            return {"x": loader(Rows(), int(workers), shuffle=True)}
        case "stream":
            return {"x": loader(Stream(), int(workers))}
        case "generator":
            return {"x": ((batch[0], batch[1]) for _ in range(EPOCHS) for batch in Batches(0))}
    raise AssertionError(kind)


KINDS = (
    "arrays",
    "shuffled",
    "dictionary",
    "PyDataset 0",
    "PyDataset 2",
    "DataLoader 0",
    "DataLoader 1",
    "stream 0",
    "stream 2",
    "generator",
)


def read(kind: str) -> list[list[Any]]:
    """Return the rows of every batch of two epochs, and how many batches an epoch has, as Keras reads them."""
    adapter = data_adapters.get_data_adapter(**source(kind))
    epochs = []
    for _ in range(1 if kind == "generator" else EPOCHS):
        adapter.on_epoch_begin()
        batches = []
        for x, y in adapter.get_torch_dataloader():
            assert np.array_equal(np.ravel(keras.tree.flatten(x)[0]), -np.ravel(y))
            batches.append(np.ravel(y).tolist())
        adapter.on_epoch_end()
        epochs.append(batches)
    return [adapter.num_batches, *epochs]


def read_in_one_process_and_here(replicas: int) -> dict[str, tuple[Any, Any]]:
    """Return, for every kind of data, what one process reads and what this rank reads."""
    found = {}
    multiprocessing.current_process()._config["daemon"] = False  # ranks of the pool may have no children, else
    for kind in KINDS:
        keras.utils.set_random_seed(5)
        alone = read(kind)
        keras.utils.set_random_seed(5 + dist.get_rank())
        tp_planner.enable_keras_distribution()
        try:
            size = dist.get_world_size()
            names = [f"cpu:{rank}" for rank in range(size)]
            mesh = keras.distribution.DeviceMesh((replicas, size // replicas), ("batch", "model"), names)
            layouts = keras.distribution.LayoutMap(mesh)
            with keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch").scope():
                found[kind] = alone, read(kind)
        finally:
            tp_planner.disable_keras_distribution()
    multiprocessing.current_process()._config["daemon"] = True
    return found


def read_different_data() -> str:
    with model_parallel(PAIR):
        adapter = data_adapters.get_data_adapter(np.full((8, 1), float(dist.get_rank())))
        with pytest.raises(tp_planner.ParallelRuntimeError) as error:
            list(adapter.get_torch_dataloader())
        return str(error.value)


def read_own_share() -> list[float]:
    with model_parallel(PAIR) as distribution:
        distribution.auto_shard_dataset = False
        adapter = data_adapters.get_data_adapter(np.full((2,), float(dist.get_rank())))
        return [float(row) for batch in adapter.get_torch_dataloader() for row in keras.tree.flatten(batch)[0]]


class Stopper(keras.callbacks.Callback):
    """Stops on rank 0 alone, and notes the logs of every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, float]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen.append(dict(logs))
        if epoch == 2 and dist.get_rank() == 0:
            self.model.stop_training = True


def fit_with_callbacks(folder: str) -> dict[str, Any]:
    """Train with callbacks that write, print and stop."""
    x, y = data()
    stopper, printed = Stopper(), io.StringIO()
    own = os.path.join(folder, f"rank {dist.get_rank()}")
    with model_parallel(PAIR), contextlib.redirect_stdout(printed):
        model = pair()
        model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
        callbacks = [
            keras.callbacks.CSVLogger(f"{own}.csv"),
            keras.callbacks.ModelCheckpoint(
                os.path.join(folder, "deep", "{epoch}.weights.h5"), save_weights_only=True, verbose=1
            ),
            keras.callbacks.BackupAndRestore(os.path.join(folder, "backup"), double_checkpoint=True),
            keras.callbacks.EarlyStopping(monitor="val_loss", patience=1, start_from_epoch=1),
            keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1, min_delta=10.0),
            stopper,
        ]
        history = model.fit(x, y, epochs=6, batch_size=8, validation_data=(x, y), verbose=2, callbacks=callbacks)
        rate = float(model.optimizer.learning_rate)
    return {
        "epochs": len(history.epoch),
        "seen": stopper.seen,
        "history": history.history,
        "rate": rate,
        "printed": printed.getvalue(),
    }


def fit_with_vectors() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return what a metric with one result a class gives after each epoch, in one process and here."""
    x, y = np.random.default_rng(0).standard_normal((16, 8)), np.eye(8)[np.arange(16) % 8]
    found = []
    for way in (contextlib.nullcontext(), model_parallel(PAIR)):
        with way:
            keras.utils.set_random_seed(1)
            model = pair()
            model.compile(keras.optimizers.SGD(0.1), "mse", metrics=[keras.metrics.F1Score(name="f1")])
            found.append(model.fit(x, y, epochs=2, batch_size=8, shuffle=False, verbose=0).history["f1"])
    return found[0], found[1]


# In the parent


@pytest.mark.parametrize("replicas", [1, 2])
def test_every_process_reads_its_share(pools: Pools, replicas: int) -> None:
    """Batches are those of one process with rank 0's seed; replicas share them out, ranks of one have the same."""
    ranks = pools(2).run(read_in_one_process_and_here, replicas)
    for kind in KINDS:
        alone = ranks[0][kind][0]
        shares = [rank[kind][1] for rank in ranks]
        assert [share[0] for share in shares] == [alone[0]] * 2, kind
        for epoch, batches in enumerate(alone[1:], 1):
            for number, batch in enumerate(batches):
                parts = [share[epoch][number] for share in shares]
                assert parts == [batch, batch] if replicas == 1 else parts[0] + parts[1] == batch, kind
        if kind in ("shuffled", "PyDataset 0", "DataLoader 0"):
            assert alone[1] != alone[2], kind


def test_ranks_that_would_train_on_different_data(pools: Pools) -> None:
    message = (
        "rank 1 read another first batch than rank 0, so that ranks would train on different data; seed what "
        "shuffles or draws the data alike on every rank (keras.utils.set_random_seed), or set "
        "distribution.auto_shard_dataset = False and give each process its own share"
    )
    assert pools(2).run(read_different_data) == [message, message]


def test_data_that_is_shared_out_already(pools: Pools) -> None:
    assert pools(2).run(read_own_share) == [[0.0, 0.0], [1.0, 1.0]]


def test_callbacks(pools: Pools, tmp_path: Path) -> None:
    """Logs are equal, rank 0's wish to stop is everybody's, and files and lines are rank 0's."""
    first, second = pools(2).run(fit_with_callbacks, str(tmp_path))
    assert first["epochs"] == second["epochs"] == 3
    assert (first["seen"], first["history"], first["rate"]) == (second["seen"], second["history"], second["rate"])
    assert first["rate"] == pytest.approx(0.025)
    assert second["printed"] == ""
    assert all(text in first["printed"] for text in ("Epoch 3/6", "saving model to"))
    with (tmp_path / "rank 0.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == pytest.approx(first["history"]["loss"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "rank 0.csv"]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == [f"{epoch}.weights.h5" for epoch in (1, 2, 3)]


def test_a_metric_with_a_vector_for_a_result(pools: Pools) -> None:
    for alone, here in pools(2).run(fit_with_vectors):
        np.testing.assert_allclose(here, alone, rtol=1e-5, atol=1e-6)
