"""Replicas under ``keras.distribution``: whatever Keras does with global batches it does as one process would."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.keras_distribution.test_model_parallel import PAIR
from tests.models import building, randomize
from tests.workers import Pools
from tp_planner.keras_distribution.data import own_share, rows_of_all
from tp_planner.storage.variables import local_tensor

WIDTH = 8
STORED_OVER_BOTH = {**PAIR, ".*up/kernel": ("batch", "model")}


# On the ranks


def normalized() -> keras.Model:
    """A model of two outputs with batch normalization, in float64 and with weights that are not trivial."""
    with building("float64"):
        x = keras.Input((WIDTH,), name="x")
        y = keras.layers.Dense(16, name="up")(x)
        y = keras.layers.ReLU(name="relu")(keras.layers.BatchNormalization(name="norm")(y))
        y = keras.layers.Dense(WIDTH, name="down")(y)
        return randomize(keras.Model(x, y, name="normalized"), 0)


def rows(count: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, WIDTH)), rng.standard_normal((count, WIDTH))


def dropping() -> keras.Model:
    """A model in float32 with dropout, of which replicas draw masks of their own, and batch normalization."""
    x = keras.Input((WIDTH,), name="x")
    y = keras.layers.Dense(16, name="up")(x)
    y = keras.layers.ReLU(name="relu")(keras.layers.BatchNormalization(name="norm")(y))
    y = keras.layers.Dense(WIDTH, name="down")(keras.layers.Dropout(0.3, name="dropout")(y))
    return keras.Model(x, y, name="dropping")


@contextlib.contextmanager
def distributed(kind: str) -> Iterator[None]:
    """Enable keras.distribution and make a distribution current over all ranks.

    ``kind`` is "data"; or a mesh of two axes: "replicated", with a weight in parts "mesh", the axes swapped
    "transposed". Behind it may be ", zero 1".
    """
    tp_planner.enable_keras_distribution()
    try:
        with distribution_of(kind).scope():
            yield
    finally:
        tp_planner.disable_keras_distribution()


def distribution_of(kind: str) -> Any:
    kind, _, zero = kind.partition(", zero ")
    size = dist.get_world_size()
    names = [f"cpu:{rank}" for rank in range(size)]
    if kind == "data":
        distribution = keras.distribution.DataParallel(devices=names)
        distribution.zero = int(zero or 0)
        return distribution
    axes = {"batch": 2, "model": size // 2}
    order = ("model", "batch") if kind == "transposed" else ("batch", "model")
    mesh = keras.distribution.DeviceMesh(tuple(axes[axis] for axis in order), order, names)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts.zero = int(zero or 0)
    for pattern, spec in (PAIR if kind == "replicated" else STORED_OVER_BOTH).items():
        layouts[pattern] = spec
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def compiled() -> keras.Model:
    model = normalized()
    loss = keras.losses.MeanSquaredError(dtype="float64")
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss, metrics=["mae"])
    return model


def fit() -> dict[str, Any]:
    """Three epochs of shuffled batches, the last of them uneven, with validation after each; then all else."""
    model, (x, y) = compiled(), rows(15)
    history = model.fit(x, y, batch_size=7, epochs=3, validation_data=rows(9, seed=4), verbose=0).history
    return {
        **history,
        "evaluate": model.evaluate(x, y, batch_size=7, verbose=0),
        "predict": model.predict(x, batch_size=7, verbose=0),
        **{variable.path: np.array(variable) for variable in model.weights},
    }


def on_batches() -> dict[str, Any]:
    """Single batches, of which the last has fewer rows than there are replicas."""
    model, found = compiled(), {}
    for count in (6, 5, 1):
        x, y = rows(count)
        weight = np.linspace(0.5, 1.5, count)
        found[f"train {count}"] = model.train_on_batch(x, y, sample_weight=weight)
        found[f"test {count}"] = list(model.test_on_batch(x, y, return_dict=True).values())
        found[f"predict {count}"] = model.predict_on_batch(x)
    return found | {variable.path: np.array(variable) for variable in model.weights}


TASKS: dict[str, Callable[[], dict[str, Any]]] = {"fit": fit, "batches": on_batches}


def alone_and_distributed(kind: str, task: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what one process comes to with rank 0's seed, and what this rank does under a distribution."""
    keras.utils.set_random_seed(0)
    alone = TASKS[task]()
    keras.utils.set_random_seed(dist.get_rank())
    with distributed(kind):
        return alone, TASKS[task]()


def bits_after_fifty_steps(kind: str) -> dict[str, bytes]:
    """Return the bits that this rank stores of each variable and slot after 50 steps of shuffled, uneven batches."""
    x, y = (array.astype("float32") for array in rows(33))
    with distributed(kind):
        model = dropping()
        model.compile(keras.optimizers.Adam(0.01), "mse")
        model.fit(x, y, batch_size=7, epochs=10, verbose=0)
        assert int(model.optimizer.iterations) == 50
        stored = [*model.variables, *model.optimizer.variables]
        return {each.path: local_tensor(each).numpy().tobytes() for each in stored if "seed" not in each.path}


def gathered_rows() -> dict[str, Any]:
    """Return rows of all ranks by dtype, of which rank 0 has two, rank 1 one and others none; and what has no rows."""
    found = {}
    with distributed("data"):
        share = own_share()
        assert share is not None
        for dtype in ("float64", "float16", "bfloat16", "int32", "bool"):
            count = max(2 - share.shard, 0)
            rows = torch.full((count, 3, 2), float(share.shard + 1)).to(getattr(torch, dtype))
            whole = rows_of_all(rows.transpose(1, 2), share)
            found[dtype] = (str(whole.dtype), whole.double().tolist())
        found["flat"] = rows_of_all(torch.full((1,), share.shard), share).tolist()
        found["scalar"] = rows_of_all(torch.tensor(3), share).tolist()
        found["empty"] = tuple(rows_of_all(torch.zeros((0, 4)), share).shape)
    return found


def own_rows() -> tuple[np.ndarray, np.ndarray]:
    """Return what this rank is given and predicts where data is shared out already."""
    with distributed("data"):
        keras.distribution.distribution().auto_shard_dataset = False
        model, x = normalized(), rows(3, seed=dist.get_rank())[0]
        found = model.predict(x, verbose=0)
    return found, normalized().predict(x, verbose=0)


def different_batches() -> str:
    with distributed("data"):
        with pytest.raises(tp_planner.ParallelRuntimeError) as error:
            compiled().train_on_batch(*rows(4, seed=dist.get_rank()))
        return str(error.value)


# In the parent


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("ranks", "kind"),
    [
        (2, "data"),
        pytest.param(2, "mesh", marks=pytest.mark.slow),
        (4, "mesh"),
        pytest.param(4, "transposed", marks=pytest.mark.slow),
        (4, "replicated, zero 1"),
        pytest.param(4, "data", marks=pytest.mark.slow),
        pytest.param(2, "data, zero 1", marks=pytest.mark.slow),
        pytest.param(4, "mesh, zero 1", marks=pytest.mark.slow),
    ],
)
def test_replicas_do_what_one_process_does(pools: Pools, ranks: int, kind: str, task: str) -> None:
    """Histories, metrics, rows and weights are those of one process, on every rank."""
    for alone, found in pools(ranks).run(alone_and_distributed, kind, task):
        assert found.keys() == alone.keys()
        for key, expected in alone.items():
            tolerance = 1e-6 if isinstance(expected, list) else 1e-11  # Keras keeps metrics in float32
            np.testing.assert_allclose(found[key], expected, rtol=tolerance, atol=tolerance, err_msg=key)


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [
        (2, "data"),
        pytest.param(4, "replicated", marks=pytest.mark.slow),
        pytest.param(4, "replicated, zero 1", marks=pytest.mark.slow),
    ],
)
def test_replicas_are_bit_identical_after_fifty_steps(pools: Pools, ranks: int, kind: str) -> None:
    """Ranks at the same place of their replicas store the same bits: weights, statistics and optimizer slots.

    With updates that are shared each has slots of its own.
    """
    stored = pools(ranks).run(bits_after_fifty_steps, kind)
    one, other = stored[: ranks // 2], stored[ranks // 2 :]
    for first, second in zip(one, other, strict=True):
        differing = [path for path in first if first[path] != second[path]]
        assert [path for path in differing if "zero" not in kind or not path.startswith("adam")] == []
    if ranks == 4:
        assert one[0]["up/kernel"] != one[1]["up/kernel"]  # shards on the model axis


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_of_all_shares(pools: Pools, ranks: int) -> None:
    """Rows come back in order, whatever their dtype, from shares of any length."""
    for found in pools(ranks).run(gathered_rows):
        for dtype in ("float64", "float16", "bfloat16", "int32", "bool"):
            last = 1.0 if dtype == "bool" else 2.0
            assert found.pop(dtype) == (f"torch.{dtype}", [[[row] * 3] * 2 for row in (1.0, 1.0, last)])
        assert found == {"flat": list(range(ranks)), "scalar": 3, "empty": (0, 4)}


def test_rows_of_data_that_is_shared_out_already(pools: Pools) -> None:
    for found, expected in pools(2).run(own_rows):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_ranks_that_are_given_different_batches(pools: Pools) -> None:
    for message in pools(2).run(different_batches):
        assert message.startswith("rank 1 read another first batch than rank 0, so that ranks would train on different")
