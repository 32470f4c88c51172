"""Resuming within an epoch: what follows a checkpoint is what would have followed, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.checkpoints.test_saving import whole
from tests.keras_distribution.test_distributed_replicas import distributed
from tests.workers import Pools, layout_map
from tp_planner.checkpoints.shelf import checkpoints_in

ROWS, BATCH, EPOCHS = 20, 4, 3
X, Y = np.random.default_rng(0).normal(size=(ROWS, 8)), np.random.default_rng(1).normal(size=(ROWS, 4))
Told = tuple[dict[str, list[float]], list[float]]  # History's, and the losses that batches ended with


def built(rate: float = 0.3) -> keras.Model:
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    x = keras.layers.Dense(16, name="up", activation="relu")(inputs)
    x = keras.layers.Dropout(rate, seed=3, name="drop")(x)
    model = keras.Model(inputs, keras.layers.Dense(4, name="down")(x), name="small")
    model.compile("adam", "mse", metrics=["mae"])
    return model


class Dataset(keras.utils.PyDataset):
    """Batches in order, as Keras shuffles them."""

    def __len__(self) -> int:
        return ROWS // BATCH

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return X[rows], Y[rows]


def loader(**options: Any) -> torch.utils.data.DataLoader[Any]:
    pairs = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    return torch.utils.data.DataLoader(pairs, batch_size=BATCH, **options)


# What fit is given, by name.
DATA: dict[str, Callable[[], dict[str, Any]]] = {
    "arrays, shuffled": lambda: {"x": X, "y": Y, "batch_size": BATCH, "validation_data": (X[:8], Y[:8])},
    "arrays, shuffled in batches": lambda: {"x": X, "y": Y, "batch_size": BATCH, "shuffle": "batch"},
    "batches, shuffled": lambda: {"x": Dataset(), "shuffle": True},
    "a loader, shuffled": lambda: {"x": loader(shuffle=True)},
}


class Watch(keras.callbacks.Callback):
    """Notes the loss of each batch, draws in each, and ends training after some, as an interruption would."""

    def __init__(self, batches: int | None) -> None:
        super().__init__()
        self.losses: list[float] = []
        self._left = batches

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        torch.rand(1)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.losses.append(float(logs["loss"]))
        if self._left is not None and len(self.losses) >= self._left:
            raise KeyboardInterrupt


def fit(model: keras.Model, data: dict[str, Any], folder: Path | None, stop: int | None, every: int = 3) -> Told:
    watch = Watch(stop)
    keeping = [] if folder is None else [tp_planner.Checkpoint(folder, every=every)]
    try:
        history = model.fit(**data, epochs=EPOCHS, verbose=0, callbacks=[*keeping, watch])
    except KeyboardInterrupt:
        keeping[0].on_train_end()
        return {}, watch.losses
    return history.history, watch.losses


def compare(make: Callable[[], keras.Model], data: Callable[[], dict[str, Any]], folder: Path, every: int = 3) -> int:
    """Compare a run that was cut off, and resumed, with an undisturbed one; return how many batches were left."""
    undisturbed = make()
    history, losses = fit(undisturbed, data(), None, None)
    fit(make(), data(), folder, 9 if every == 3 else 5, every)
    resumed = make()
    keras.utils.set_random_seed(7)  # which are not the numbers that the interrupted run had
    history_then, losses_then = fit(resumed, data(), folder, None, every)
    assert losses_then == losses[-len(losses_then) :]
    np.testing.assert_equal(whole(resumed), whole(undisturbed))
    assert history_then == {key: values[-2 if every == 3 else 0 :] for key, values in history.items()}
    return len(losses_then)


# On the ranks


def shards(rate: float = 0.3) -> keras.Model:
    rules = {"up/kernel": (None, "model"), "down/kernel": ("model", None)}
    return tp_planner.parallelize(built(rate), layout_map(rules))


def replicas(rate: float = 0.3) -> keras.Model:
    mesh = keras.distribution.DeviceMesh((2,), ("batch",), ["cpu:0", "cpu:1"])
    return tp_planner.parallelize(built(rate), keras.distribution.LayoutMap(mesh), batch_axis="batch")


def own_rows() -> dict[str, Any]:
    own = slice(dist.get_rank(), None, 2)
    return {"x": X[own], "y": Y[own], "batch_size": BATCH // 2}


def on_replicas(folder: str) -> tuple[int, dict[str, list[float]], dict[str, list[float]]]:
    """Resume on replicas, and on shards what replicas began."""
    left = compare(replicas, own_rows, Path(folder, "replicas"))
    fit(replicas(0.0), own_rows() | {"shuffle": False}, Path(folder, "elastic"), 9)
    data = {"x": X, "y": Y, "batch_size": BATCH, "shuffle": False}
    resumed, _ = fit(shards(0.0), data, Path(folder, "elastic"), None)
    undisturbed, _ = fit(shards(0.0), data, None, None)
    return left, resumed, undisturbed


def on_shards(folder: str) -> list[int]:
    """Resume on shards, and under a distribution, where a model is planned after the checkpoint was loaded."""
    left = [compare(shards, DATA["arrays, shuffled"], Path(folder, "shards"))]
    with distributed("data"):
        left.append(compare(built, DATA["arrays, shuffled"], Path(folder, "distribution")))
    return left


# In the test's process


@pytest.mark.parametrize("name", DATA)
def test_fit_goes_on_within_an_epoch(name: str, tmp_path: Path) -> None:
    """Losses of each batch, history and weights are those of an undisturbed run, whatever shuffles the data."""
    assert compare(built, DATA[name], tmp_path) == 7


def test_nothing_is_left_of_an_epoch(tmp_path: Path) -> None:
    """Written after the last batch, what is left is validation, and the end of the epoch, of which all is known."""
    assert compare(built, DATA["arrays, shuffled"], tmp_path, every=5) == 10


def test_replicas_go_on_within_an_epoch(pools: Pools, tmp_path: Path) -> None:
    """So do replicas; on another mesh metrics count on from what all replicas had counted."""
    for left, resumed, undisturbed in pools(2).run(on_replicas, str(tmp_path)):
        assert left == 7
        for key, values in undisturbed.items():
            np.testing.assert_allclose(resumed[key], values[-len(resumed[key]) :], rtol=1e-5)


@pytest.mark.slow
def test_shards_go_on_within_an_epoch(pools: Pools, tmp_path: Path) -> None:
    """So do shards, and models under a distribution."""
    assert pools(2).run(on_shards, str(tmp_path)) == [[7, 7], [7, 7]]


def test_an_epoch_of_other_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With another number of batches the epoch begins again, which is said; data that end too soon are an error."""
    fit(built(), DATA["arrays, shuffled"](), tmp_path / "a", 4)
    path = checkpoints_in(tmp_path / "a")[0]
    _, losses = fit(built(), {"x": X[:16], "y": Y[:16], "batch_size": BATCH}, tmp_path / "a", None, every=100)
    assert len(losses) == EPOCHS * 4
    told = [each.getMessage() for each in caplog.records if each.name == "tp_planner"]
    assert told == [
        f"[ModelParallel] {path} was written in an epoch of 5 batches, and this one has 4: epoch 1 begins again"
    ]
    fit(built(), {"x": (Dataset()[index] for index in range(5))}, tmp_path / "b", 4)
    with pytest.raises(tp_planner.PlanError) as refusal:
        fit(built(), {"x": (Dataset()[index] for index in range(2))}, tmp_path / "b", None)
    path = checkpoints_in(tmp_path / "b")[0]
    assert str(refusal.value) == (
        f"{path} was written after batch 3 of an epoch, and the data of this one end after 2; give fit the same data, "
        f"or tp_planner.Checkpoint resume=False"
    )


def test_another_call_of_a_callback_reads_its_own_batches(tmp_path: Path) -> None:
    """What another callback evaluates before the first batch is not what is passed over."""
    fit(built(), DATA["arrays, shuffled"](), tmp_path, 4)
    counted = []

    class Evaluate(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            count = keras.callbacks.LambdaCallback(on_test_batch_end=lambda batch, logs: counted.append(batch))
            self.model.evaluate(X, Y, batch_size=BATCH, verbose=0, callbacks=[count])

    watch = Watch(None)
    data = DATA["arrays, shuffled"]() | {"validation_data": None}
    checkpoint = tp_planner.Checkpoint(tmp_path, every=100)
    built().fit(**data, epochs=1, verbose=0, callbacks=[checkpoint, Evaluate(), watch])
    assert (counted, len(watch.losses)) == ([0, 1, 2, 3, 4], 2)
