"""Losses of replicas that are no plain means over samples are those of the whole batch, in gradients and in reports."""

from __future__ import annotations

import logging.handlers
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.keras_distribution.test_distributed_replicas import distributed
from tests.models import building, randomize
from tests.workers import Pools
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.storage.log import logger

LENGTH, TOKENS, CLASSES = 5, 12, 6


# On the ranks


class OwnLoss(keras.Model):
    """Computes its loss itself."""

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None, training: bool = True) -> Any:
        return 0.5 * crossentropy(reduction="sum")(y, y_pred) + sum(self.losses)


class OwnSteps(keras.Model):
    """Trains and tests as Keras's guide to steps of one's own does."""

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        self.zero_grad()
        y_pred = self(x, training=True)
        loss = self.compute_loss(y=y, y_pred=y_pred)
        loss.backward()
        with torch.no_grad():
            self.optimizer.apply([each.value.grad for each in self.trainable_weights], self.trainable_weights)
        return self.reported(y, y_pred, loss)

    def test_step(self, data: Any) -> dict[str, Any]:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        y_pred = self(x, training=False)
        return self.reported(y, y_pred, self.compute_loss(y=y, y_pred=y_pred))

    def reported(self, y: Any, y_pred: Any, loss: Any) -> dict[str, Any]:
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=len(y))
            else:
                metric.update_state(y, y_pred)
        return {"of one's own": 1.0, **{metric.name: metric.result() for metric in self.metrics}}


def tagger(masked: bool, outputs: int, kind: type[keras.Model] = keras.Model) -> keras.Model:
    """A model in float64 of (rows, positions) of tokens, 0 being none where they are masked, to logits."""
    with building("float64"):
        tokens = keras.Input((LENGTH,), dtype="int32", name="tokens")
        x = keras.layers.Embedding(TOKENS, 8, mask_zero=masked, name="embedding")(tokens)
        x = keras.layers.Dense(16, activation="relu", kernel_regularizer="l2", name="up")(x)
        logits = keras.layers.Dense(CLASSES, name="down")(x)
        both = [logits, keras.layers.Dense(1, name="other")(x)]
        return randomize(kind(tokens, both if outputs == 2 else logits, name="tagger"), 0)


def crossentropy(**options: Any) -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64", **options)


# Whether the model masks, its loss (None for its own), whether weights of samples or of positions are given.
Setting = tuple[bool, Callable[[], Any], str]
SETTINGS: dict[str, Setting] = {
    "sum": (False, lambda: crossentropy(reduction="sum"), ""),
    "weighed sum over unmasked": (True, lambda: crossentropy(reduction="sum"), "positions"),
    "mean over unmasked": (True, crossentropy, ""),
    "weighed mean over unmasked": (True, crossentropy, "positions"),
    "mean over a class's absence": (False, lambda: crossentropy(ignore_class=0), ""),
    "weighed mean": (False, crossentropy, "rows"),
    "mean over weights of rows": (False, lambda: crossentropy(reduction="mean_with_sample_weight"), "rows"),
    "mean over weights": (True, lambda: crossentropy(reduction="mean_with_sample_weight"), "positions"),
    "own sum": (True, lambda: None, ""),
    "steps of one's own": (True, crossentropy, ""),
    "two outputs": (
        True,
        lambda: [crossentropy(), keras.losses.MeanSquaredError(reduction="sum", dtype="float64")],
        "",
    ),
}

MODELS = {"own sum": OwnLoss, "steps of one's own": OwnSteps}


def batch(rows: int, weights: str, outputs: int) -> dict[str, Any]:
    """Return a batch whose first half is masked, and weighed, otherwise than the second."""
    rng = np.random.default_rng(rows)
    tokens = rng.integers(1, TOKENS, (rows, LENGTH)).astype("int32")
    tokens[: (rows + 1) // 2][rng.random(((rows + 1) // 2, LENGTH)) < 0.7] = 0
    classes = np.where(tokens, rng.integers(1, CLASSES, (rows, LENGTH)), 0)
    shape = {"": None, "rows": (rows, 1), "positions": (rows, LENGTH)}[weights]
    weight = None if shape is None else np.linspace(0.1, 3.0, int(np.prod(shape))).reshape(shape)
    targets: Any = classes if outputs == 1 else [classes, rng.standard_normal((rows, LENGTH, 1))]
    return {"x": tokens, "y": targets, "sample_weight": weight}


def train(setting: str) -> dict[str, Any]:
    """Train on batches, one of which has a row for one replica only; return what Keras reports, and the weights."""
    masked, loss, weights = SETTINGS[setting]
    outputs = 2 if isinstance(loss(), list) else 1
    model, found = tagger(masked, outputs, MODELS.get(setting, keras.Model)), {}
    model.compile(
        keras.optimizers.SGD(0.02, momentum=0.9),
        loss(),
        loss_weights=[1.0, 0.3] if outputs == 2 else None,
        metrics=["accuracy"] if isinstance(model, OwnSteps) else None,
    )
    for rows in (6, 5, 1, 4):
        given = batch(rows, weights, outputs)
        found[f"train {rows}"] = model.train_on_batch(**given, return_dict=True)
        found[f"test {rows}"] = model.test_on_batch(**given, return_dict=True)
    found["fit"] = model.fit(**batch(9, weights, outputs), batch_size=4, shuffle=False, verbose=0).history
    return found | {variable.path: np.array(variable) for variable in model.weights}


def train_alone_and_distributed(setting: str, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    alone = train(setting)
    with distributed(kind):
        return alone, train(setting)


def first_step_is_as_planned() -> bool:
    """Take one step with a loss that communicates, which is compared with the plan."""
    model, given = tagger(masked=True, outputs=1), batch(4, "", 1)
    rules = Layout(Mesh((("batch", 2), ("model", 1))), (LayoutRule("up/kernel", ("batch", None)),))
    tp_planner.parallelize(model, rules, given["x"][:2], check="first_step", batch_axis="batch")
    model.compile("sgd", crossentropy(), jit_compile=False)
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    return bool(np.isfinite(model.train_on_batch(given["x"][rows], given["y"][rows])))


def warnings_of(loss: str) -> list[str]:
    """Return what is logged while a model trains on two batches."""
    handler = logging.handlers.BufferingHandler(100)
    logger.addHandler(handler)
    try:
        with distributed("data"):
            model = tagger(masked=False, outputs=1)
            model.compile("sgd", {"dice": keras.losses.Dice(), "values": own_values, "number": own_number}[loss])
            for rows in (4, 6):
                x = batch(rows, "", 1)["x"]
                model.train_on_batch(x, np.ones((rows, LENGTH, CLASSES)))
    finally:
        logger.removeHandler(handler)
    return [record.getMessage() for record in handler.buffer if "loss" in record.getMessage()]


def own_values(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.square(y_pred - y_true)


def own_number(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.sum(keras.ops.square(y_pred - y_true))


# In the parent


# What `make test` trains; `make sweep` trains the others.
USUAL = [
    (2, "data", "sum"),
    (2, "data", "mean over unmasked"),
    (2, "data", "two outputs"),
    (2, "data", "steps of one's own"),
    (4, "mesh", "mean over weights"),
]
ALL = [(ranks, kind, setting) for ranks, kind in ((2, "data"), (4, "mesh")) for setting in SETTINGS]


@pytest.mark.parametrize(
    ("ranks", "kind", "setting"),
    [each if each in USUAL else pytest.param(*each, marks=pytest.mark.slow) for each in ALL],
)
def test_losses_are_those_of_the_whole_batch(pools: Pools, ranks: int, kind: str, setting: str) -> None:
    """What is reported, and weights after a few steps, are those of one process, for uneven and empty shares too."""
    for alone, found in pools(ranks).run(train_alone_and_distributed, setting, kind):
        assert found.keys() == alone.keys()
        for key, expected in alone.items():
            if isinstance(expected, dict):
                for name, value in expected.items():  # Keras keeps metrics in float32
                    np.testing.assert_allclose(found[key][name], value, rtol=2e-6, err_msg=f"{key} {name}")
            else:
                np.testing.assert_allclose(found[key], expected, rtol=1e-11, atol=1e-11, err_msg=key)


@pytest.mark.parametrize(("loss", "warned"), [("values", False), ("number", True), ("dice", True)])
def test_a_loss_that_is_one_number(pools: Pools, loss: str, warned: bool) -> None:
    """Rank 0 says once that it is taken for a mean, as nothing else can be known of it."""
    message = (
        "[ModelParallel] a loss of model 'tagger' gives one number for a replica's share of the batch, taken for a "
        "mean over its samples; let it give one for each sample, and Keras reduces them over the whole batch"
    )
    assert pools(2).run(warnings_of, loss) == [[message] if warned else [], []]


def test_a_loss_that_communicates_is_in_no_plan(pools: Pools) -> None:
    assert pools(2).run(first_step_is_as_planned) == [True, True]
