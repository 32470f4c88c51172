"""Pieces: losses, metrics and updates that are Keras's own are replayed, and do what they did, whatever changes."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.metrics.reduction_metrics import Mean

import tp_planner
from tests.models import randomize
from tests.replicas import Shape, share
from tests.workers import Pools, layout_map
from tp_planner.frontend.layout_map import read_zero
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.replay import automatic
from tp_planner.replay.objects import foreign_code_of, objects_in
from tp_planner.training.optimizer import ParallelOptimizer

layers, losses, metrics, optimizers = keras.layers, keras.losses, keras.metrics, keras.optimizers
RULES = {"(.*/)?up/kernel": (None, "model"), "(.*/)?up/bias": ("model",), "(.*/)?down/kernel": ("model", None)}
CLASSES, BATCH = 8, 6
# By name: a mesh's axes "batch" and "model", and the stage of ZeRO.
REPLICAS: dict[str, tuple[Shape, int]] = {
    "2x2": ((2, 2), 0),
    "2x2, zero 1": ((2, 2), 1),
    "2x2, zero 3": ((2, 2), 3),
    "4x1, zero 1": ((4, 1), 1),
}


def small_model() -> keras.Model:
    inputs = keras.Input((16,), name="inputs")
    x = layers.Dense(32, "relu", name="up")(inputs)
    x = layers.Dense(16, name="down")(x)
    return randomize(keras.Model(inputs, layers.Dense(CLASSES, name="head")(x), name="model"))


class OwnSchedule(optimizers.schedules.LearningRateSchedule):
    def __init__(self) -> None:
        self.rate = 0.01

    def __call__(self, step: Any) -> Any:
        return self.rate


def own_metric(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.mean(y_pred, axis=-1)


# On the ranks


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Inside, runs of Keras's code for the loss, the metrics and the update are counted, in this order."""
    count = [0, 0, 0]

    def counting(place: int, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            count[place] += place != 1 or args[0].name == "accuracy"
            return plain(*args, **kwargs)

        return call

    parts = ((LossFunctionWrapper, "call"), (Mean, "update_state"), (ParallelOptimizer, "_backend_apply_gradients"))
    with contextlib.ExitStack() as stack:
        for place, (owner, name) in enumerate(parts):
            stack.enter_context(mock.patch.object(owner, name, counting(place, getattr(owner, name))))
        yield count


def trained(change: str, jit_compile: Any, replicas: str = "") -> tuple[str, dict[str, np.ndarray]]:
    """Train a parallel model, ``change`` something, and go on; return what became of the pieces then, and numbers.

    What is changed may be something from the start on. ``replicas`` is the name of one of REPLICAS, "" for none.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    model = small_model()
    shape, zero = REPLICAS.get(replicas, ((1, 1), 0))
    replica = dist.get_rank() // shape[1] if replicas else 0
    if replicas:
        mesh, rules = Mesh((("batch", shape[0]), ("model", shape[1]))), itertools.starmap(LayoutRule, RULES.items())
        tp_planner.parallelize(model, Layout(mesh, tuple(rules), zero=read_zero(zero)), batch_axis="batch")
    else:
        tp_planner.parallelize(model, layout_map(RULES))
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((BATCH, 16)).astype("float32"), rng.integers(0, CLASSES, BATCH)
    given: dict[str, Any] = {"sample_weight": None}

    def compile(**others: Any) -> None:
        reduction = "sum" if change == "summed" else "sum_over_batch_size"
        loss = losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
        options = {"optimizer": _optimizer(change), "loss": loss, "metrics": ["accuracy"]} | others
        model.compile(**options, jit_compile=jit_compile)

    def train(steps: int) -> None:
        for step in range(steps):
            rows = given.get("rows", BATCH)
            weights = given["sample_weight"]
            batch = share([each[:rows] for each in (x, y, weights) if each is not None], replica, shape[0])
            if not replicas:  # of tensors steps are replayed as a whole
                batch = list(map(torch.from_numpy, batch))
            results.append(np.asarray(model.train_on_batch(*batch)))
            if replicas:
                results.append(np.asarray(model.test_on_batch(*batch)))
            if change == "rate, in each step":
                model.optimizer.learning_rate = 0.01 / (step + 2)

    compile()
    results: list[np.ndarray] = []
    with mock.patch.object(automatic, "PATIENCE", 1), counted() as count:
        train(6)
        count[:] = [0, 0, 0]
        _make(change, model, given, compile)
        train(6)
    weights = {each.path: keras.ops.convert_to_numpy(each) for each in model.variables}
    slots = {f"slot {each.path}": keras.ops.convert_to_numpy(each) for each in model.optimizer.variables}
    calls = (12, 12, 6) if replicas else (6, 6, 6)
    became = "".join("r" if each == 0 else "a" if each < most else "w" for each, most in zip(count, calls, strict=True))
    return became, {str(number): each for number, each in enumerate(results)} | weights | slots


def _optimizer(name: str) -> keras.optimizers.Optimizer:
    schedules = optimizers.schedules
    match name:
        case "schedule":
            return optimizers.AdamW(schedules.ExponentialDecay(0.05, 3, 0.5))
        case "steps":
            return optimizers.AdamW(schedules.PiecewiseConstantDecay([3, 7], [0.05, 0.01, 0.001]))
        case "own schedule":
            return optimizers.AdamW(OwnSchedule())
        case "clipped":
            return optimizers.Adam(0.01, global_clipnorm=0.1)
        case "each clipped":
            return optimizers.Adam(0.01, clipnorm=0.1)
        case "averages":
            return optimizers.AdamW(0.01, use_ema=True, ema_momentum=0.5)
        case "overwritten":
            return optimizers.AdamW(0.01, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=4)
        case "accumulated":
            return optimizers.AdamW(0.01, gradient_accumulation_steps=2)
        case "scaled":
            return optimizers.LossScaleOptimizer(optimizers.AdamW(0.01), initial_scale=2.0**20)
        case "momentum" | "momentum, another rate":
            return optimizers.SGD(0.01, momentum=0.9)
        case "excluded":
            adam = optimizers.AdamW(0.01, weight_decay=0.1)
            adam.exclude_from_weight_decay(var_names=["bias"])
            return adam
        case "nadam":
            return optimizers.Nadam(0.01)
    return optimizers.AdamW(0.01)


def _make(change: str, model: keras.Model, given: dict[str, Any], compile: Callable[..., None]) -> None:
    loss, optimizer, head = model.loss, model.optimizer, model.get_layer("head")
    match change:
        case "rate" | "momentum, another rate":
            optimizer.learning_rate = 0.05
        case "own schedule":
            optimizer._learning_rate.rate = 0.1
        case "decay":
            optimizer.weight_decay = 0.2
        case "iterations":
            optimizer.iterations.assign(0)
        case "slots":
            optimizer.set_weights([np.zeros(each.shape) + 0.5 for each in optimizer.variables])
        case "weights":
            model.set_weights([0.5 * each for each in model.get_weights()])
        case "frozen":
            model.get_layer("up").trainable = False
        case "compiled":
            compile(loss=losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"))
        case "reduction":
            loss.reduction = "sum"
        case "ignored class":
            loss._fn_kwargs["ignore_class"] = 3
        case "sample weights":
            given["sample_weight"] = np.arange(BATCH, dtype="float32")
        case "rows":
            given["rows"] = 3
        case "uneven":
            given["rows"] = 5
        case "empty":
            given["rows"] = 1
        case "reset":
            model.reset_metrics()
        case "regularizer":
            head.kernel.regularizer = keras.regularizers.L2(0.1)
        case "constraint":
            head.kernel.constraint = keras.constraints.MaxNorm(0.5)
        case "added loss":
            head.activity_regularizer = keras.regularizers.L2(0.1)
        case "own metric":
            compile(metrics=["accuracy", own_metric])
        case "patched metric":
            accuracy = model.metrics[1].metrics[0]
            accuracy.result = lambda: keras.ops.convert_to_tensor(7.0)
        case "eagerly":
            model.run_eagerly = True


def compared(change: str, replicas: str = "") -> tuple[str, str, dict[str, float], dict[str, float]]:
    """Return what became of the pieces, by default and where replay is asked for, and by how much numbers are off."""
    _, eager = trained(change, False, replicas)
    found = [trained(change, jit_compile, replicas) for jit_compile in ("auto", True)]
    off = [{key: _difference(results[key], value) for key, value in eager.items()} for _, results in found]
    return found[0][0], found[1][0], {key: each for key, each in off[0].items() if each != 0}, off[1]


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype("float64") - other.astype("float64")).max()) if one.size else 0.0


# In the parent

# What is changed after six steps, and what becomes of the loss, the metrics and the update in six others: they are
# replayed (r), taped anew before they are (a), or run as they are written (w).
CHANGES = {
    "nothing": "rrr",
    "rate": "rrr",
    "rate, in each step": "rrr",
    "momentum": "rrr",
    "momentum, another rate": "rrr",
    "iterations": "rrr",
    "slots": "rrr",
    "weights": "rrr",
    "reset": "rrr",
    "schedule": "rrr",
    "steps": "rrr",
    "excluded": "rrr",
    "clipped": "rrr",
    "each clipped": "rrr",
    "averages": "rrr",
    "own schedule": "rrw",
    "overwritten": "rrw",
    "accumulated": "rrw",
    "scaled": "rrr",
    "nadam": "rrw",
    "decay": "rra",
    "frozen": "rra",
    "compiled": "aaa",
    "reduction": "arr",
    "ignored class": "arr",
    "sample weights": "aar",
    "rows": "aar",
    "regularizer": "wwr",
    "constraint": "rrw",
    "added loss": "wwr",
    "own metric": "awa",
    "patched metric": "rwr",
    "eagerly": "www",
}
QUICK = ("rate, in each step", "frozen", "sample weights", "compiled")
NOT_NOTICED = ("added loss",)  # where calls are to be replayed, a program has written into it what layers are


@pytest.mark.parametrize(
    "change", [pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow) for each in CHANGES]
)
def test_changes_are_noticed(pools: Pools, change: str) -> None:
    """By default numbers are those of eager code to the bit, and what has not changed is replayed."""
    for default, asked, errors, off in pools(2).run(compared, change):
        assert errors == {}
        assert default == CHANGES[change]
        assert change in NOT_NOTICED or (asked == default and max(off.values()) < 1e-4)


OF_REPLICAS = {
    **{change: CHANGES[change] for change in ("rate, in each step", "schedule", "clipped", "averages", "compiled")},
    **{change: CHANGES[change] for change in ("frozen", "sample weights", "slots", "weights", "momentum", "reset")},
    **{change: CHANGES[change] for change in ("accumulated", "regularizer", "constraint", "own metric", "excluded")},
    "scaled": "rrr",
    "summed": "rrr",
    "uneven": "aar",
    "empty": "aar",
}
ON_SOME = ("uneven", "empty")  # not all shares are other ones then
OF_WHOLE_WEIGHTS = ("regularizer", "constraint")  # refused for a weight in shards
QUICK_ONES = (("sample weights", "2x2, zero 1"), ("empty", "2x2"))


@pytest.mark.parametrize(
    ("change", "replicas"),
    [
        pytest.param(change, replicas, marks=[] if (change, replicas) in QUICK_ONES else pytest.mark.slow)
        for change, replicas in itertools.product(OF_REPLICAS, REPLICAS)
        if change not in OF_WHOLE_WEIGHTS or REPLICAS[replicas][1] < 3
    ],
)
def test_changes_are_noticed_by_replicas(pools: Pools, change: str, replicas: str) -> None:
    """What replicas communicate in a loss, in metrics and in an update that they share is replayed to the bit, too."""
    expected = {OF_REPLICAS[change], *(["rrr"] if change in ON_SOME else [])}
    for default, asked, errors, off in pools(4).run(compared, change, replicas):
        assert errors == {}
        assert asked == default
        assert default in expected
        assert max(off.values()) < 1e-4


class OwnLoss(losses.Loss):
    def call(self, y_true: Any, y_pred: Any) -> Any:
        return y_pred


def hung_on() -> keras.Metric:
    metric = metrics.Mean(name="mean")
    metric.result = lambda: 1.0
    return metric


OBJECTS: dict[str, tuple[Callable[[], Any], str]] = {
    "loss": (lambda: losses.MeanSquaredError(), ""),
    "list": (lambda: [metrics.MeanSquaredError(), {"one": (metrics.AUC(),)}], ""),
    "schedule": (lambda: optimizers.SGD(optimizers.schedules.CosineDecay(0.1, 10)), ""),
    "own loss": (lambda: OwnLoss(name="own"), "OwnLoss 'own' has code of OwnLoss"),
    "own function": (
        lambda: [metrics.MeanMetricWrapper(own_metric, name="own")],
        "MeanMetricWrapper 'own' has '_fn', which is not Keras's",
    ),
    "own schedule": (
        lambda: optimizers.SGD(OwnSchedule(), name="sgd"),
        "SGD 'sgd' has '_learning_rate', which is not Keras's",
    ),
    "own rate": (
        lambda: optimizers.SGD(lambda: 0.1, name="sgd"),
        "SGD 'sgd' has '_learning_rate', which is not Keras's",
    ),
    "own result": (hung_on, "Mean 'mean' has 'result', which is not Keras's"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_code_of_a_users(name: str) -> None:
    build, reason = OBJECTS[name]
    assert foreign_code_of(objects_in(build())) == reason
