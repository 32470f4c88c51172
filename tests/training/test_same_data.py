"""Ranks of one replica that are fed different data hear of it, all of them; shares go to the batch's axis."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.models import building, randomize
from tests.workers import Pools
from tp_planner.job.same_data import differing_data

WIDTH = 8
RULES = {"up/kernel": (None, "model"), "up/bias": ("model",), "down/kernel": ("model", None)}


# On the ranks


def perceptron() -> keras.Model:
    with building("float64"):
        x = keras.Input((WIDTH,), name="x")
        y = keras.layers.Dense(16, "gelu", name="up")(x)
        return randomize(keras.Model(x, keras.layers.Dense(WIDTH, name="down")(y), name="perceptron"), 0)


def batch(size: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((size, WIDTH)), rng.standard_normal((size, WIDTH))


def layout(shape: tuple[int, ...], names: tuple[str, ...] = ("batch", "model")) -> keras.distribution.LayoutMap:
    devices = [f"cpu:{rank}" for rank in range(dist.get_world_size())]
    layouts = keras.distribution.LayoutMap(keras.distribution.DeviceMesh(shape, names, devices))
    for pattern, axes in RULES.items():
        layouts[pattern] = axes
    return layouts


def train_on_shares(shape: tuple[int, ...]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Train on shares along the axis that no rule names, and in one process on all; return all weights."""
    x, y = batch(8)
    alone, parallel = perceptron(), perceptron()
    tp_planner.parallelize(parallel, layout(shape))
    shares, share = shape[0], dist.get_rank() // shape[1]
    own = slice(share * 8 // shares, (share + 1) * 8 // shares)
    for model, rows in ((alone, slice(None)), (parallel, own)):
        model.compile(keras.optimizers.SGD(0.1), "mse")
        for _ in range(3):
            model.train_on_batch(x[rows], y[rows])
    return alone.get_weights(), parallel.get_weights()


def called_on_own(model: keras.Model, seed: int) -> None:
    model(batch(4, seed)[0])


def evaluated_on_own_rows(model: keras.Model, seed: int) -> None:
    model.predict(batch(10 - seed)[0], verbose=0)


def trained_on_own_targets(model: keras.Model, seed: int) -> None:
    model.compile("sgd", "mse")
    model.train_on_batch(batch(4)[0], batch(4, seed)[1])


def trained_in_a_loop(model: keras.Model, seed: int) -> None:
    for number in range(4):
        model(batch(4, seed if number == 1 else 3)[0]).sum().backward()


def planned_for_own_inputs(model: keras.Model, seed: int) -> None:
    tp_planner.restore(model)
    tp_planner.parallelize(model, layout((dist.get_world_size(),), ("model",)), inputs=batch(10 - seed)[0])


USES = (called_on_own, evaluated_on_own_rows, trained_on_own_targets, trained_in_a_loop, planned_for_own_inputs)


def differing_uses() -> list[str]:
    """Return what this rank hears of each use that feeds it something else than the others; the model stays usable."""
    messages = []
    for use in USES:
        model = perceptron()
        tp_planner.parallelize(model, layout((dist.get_world_size(),), ("model",)))
        messages.append(heard(functools.partial(use, model, dist.get_rank())))
        tp_planner.parallelize(perceptron(), layout((1, dist.get_world_size())))(batch(4)[0])
    return messages


def compared(values: Any) -> str:
    return differing_data("the test", values(dist.get_rank()))


KINDS: dict[str, tuple[Callable[[int], Any], str]] = {
    "equal": (lambda rank: {"ids": np.arange(4), "mask": None, "text": "one"}, ""),
    "rounding": (lambda rank: torch.linspace(0, 1, 100) * (1 + rank * 1e-6), ""),
    "not a number": (lambda rank: np.array([np.nan, 1.0]), ""),
    "one integer": (
        lambda rank: np.array([0, 1, rank]),
        "rank 0: (3,) int64; rank 1: (3,) int64, of other values",
    ),
    "one row": (
        lambda rank: np.linspace(0, 1, 64).reshape(32, 2) + rank * np.eye(32, 2),
        "rank 0: (32, 2) float64; rank 1: (32, 2) float64, of other values",
    ),
    "rows": (lambda rank: np.ones((10 - rank, 2)), "rank 0: (10, 2) float64; rank 1: (9, 2) float64"),
    "dtype": (lambda rank: np.ones(2, "float32" if rank else "float64"), "rank 0: (2,) float64; rank 1: (2,) float32"),
    "count": (lambda rank: [np.ones(2)] * (1 + rank), "rank 0: 1 arrays; rank 1: 2"),
    "words": (lambda rank: [f"text {rank}"], "rank 0: () str; rank 1: () str, of other values"),
}


def compare_all() -> dict[str, str]:
    return {kind: compared(values) for kind, (values, _) in KINDS.items()}


def reading(kind: str, rank: int) -> Any:
    """Return data that differ on rank 1, in rows or in batches, after equal first batches."""
    x, _ = batch(64)
    if kind == "arrays":
        return {"x": x[: 61 - 2 * rank], "batch_size": 32}
    if kind == "generator":
        return {"x": ((each,) for each in (x[:8], x[8:16])[: 2 - rank])}
    return {"x": torch.utils.data.DataLoader(x[: 20 - rank], batch_size=8)}


def predict_all(auto: bool, shape: tuple[int, int], planned: bool, kinds: Sequence[str]) -> list[str]:
    """Return what this rank hears of data of each kind that differ on rank 1."""
    tp_planner.enable_keras_distribution()
    try:
        distribution = keras.distribution.ModelParallel(layout_map=layout(shape), batch_dim_name="batch")
        distribution.auto_shard_dataset = auto
        with distribution.scope():
            model = perceptron()
            if planned:
                model(batch(4)[0])
            return [heard(functools.partial(predict, model, kind)) for kind in kinds]
    finally:
        tp_planner.disable_keras_distribution()


def predict(model: keras.Model, kind: str) -> None:
    model.predict(verbose=0, **reading(kind, dist.get_rank()))


def heard(use: Callable[[], Any]) -> str:
    try:
        use()
    except (tp_planner.PlanError, tp_planner.ParallelRuntimeError) as error:
        return str(error)
    return ""


# In the parent


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)], ids=["2x1", "2x2"])
def test_shares_go_to_the_axis_that_no_rule_names(pools: Pools, shape: tuple[int, int]) -> None:
    """What ranks are fed along the batch's axis is averaged, whatever the size of the axis that rules name."""
    for alone, parallel in pools(shape[0] * shape[1]).run(train_on_shares, shape):
        for expected, found in zip(alone, parallel, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_ranks_of_a_replica_that_are_fed_different_data(pools: Pools) -> None:
    """In a call, a loss, a loop or a plan: one message that speaks of data, on all ranks."""
    says = "ranks 0, 1 hold parts of one replica, and were given different data"
    then = (
        "give them the same. If each is to have a share of its own, name the mesh axis of the shares: batch_axis= of "
        "tp_planner.parallelize, batch_dim_name= of keras.distribution.ModelParallel"
    )
    other_values = "rank 0: (4, 8) float32; rank 1: (4, 8) float32, of other values"
    expected = [
        f"a call of model 'perceptron': {says} ({other_values}); {then}",
        f"a call of model 'perceptron': {says} (rank 0: (10, 8) float32; rank 1: (9, 8) float32); {then}",
        f"the loss of model 'perceptron': {says} ({other_values}); {then}",
        f"a call of model 'perceptron': {says} ({other_values}); {then}",
        "ranks 0 and 1 hold parts of one replica and were given different inputs (rank 0: (10, 8) float32; rank 1: "
        "(9, 8) float32); give all ranks of a replica the same data",
    ]
    for messages in pools(2).run(differing_uses):
        assert [message.replace("float64", "float32") for message in messages] == expected


def test_what_is_different(pools: Pools) -> None:
    expected = {kind: message for kind, (_, message) in KINDS.items()}
    assert pools(2).run(compare_all) == [expected, expected]


def test_global_batches_that_differ_in_length(pools: Pools) -> None:
    """More rows or batches on a rank: every rank says so, though the first batches are equal."""
    then = (
        "; seed what shuffles or draws the data alike on every rank (keras.utils.set_random_seed), or set "
        "distribution.auto_shard_dataset = False and give each process its own share"
    )
    expected = [
        "rank 1 reads other data than rank 0: 2 batches, the first of 32 rows and the last of 27 on rank 1, "
        f"2 batches, the first of 32 rows and the last of 29 on rank 0{then}",
        f"batch 2 of an epoch has 8 rows on rank 0 and ended on rank 1: the ranks' data are not the same{then}",
        f"batch 3 of an epoch has 4 rows on rank 0 and 3 rows on rank 1: the ranks' data are not the same{then}",
    ]
    assert pools(2).run(predict_all, True, (2, 1), True, ("arrays", "generator", "loader")) == [expected, expected]


@pytest.mark.parametrize("planned", [False, True], ids=["first", "planned"])
def test_shares_of_ones_own_that_differ_in_a_replica(pools: Pools, planned: bool) -> None:
    for messages in pools(2).run(predict_all, False, (1, 2), planned, ["arrays"]):
        assert [message.partition(";")[0] for message in messages] == [
            "a call of model 'perceptron': ranks 0, 1 hold parts of one replica, and were given different data (rank "
            "0: (29, 8) float32"
        ]
