"""The loss of a plan's step: which one it is, and that what it takes and communicates is what training takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import pytest
import torch

import tp_planner
from tests.dryrun.test_simulation import like, metered_training, size_of
from tests.models import building, randomize
from tests.workers import Pools, layout_map
from tp_planner.frontend.training_loss import TrainingLoss
from tp_planner.ir.errors import PlanError
from tp_planner.ir.step import Memory, Step
from tp_planner.readable_plan import Plan

layers, losses = keras.layers, keras.losses
CLASSES = 512
RULES = {
    "up/kernel": (None, "model"),
    "up/bias": ("model",),
    "(classes|value)/kernel": ("model", None),
}
TARGETS = {
    "classes": np.arange(12, dtype="int32").reshape(4, 3) % CLASSES,
    "value": np.linspace(0, 1, 12, dtype="float32").reshape(4, 3, 1),
}
LOSSES: dict[str, Any] = {
    "both": {"classes": losses.SparseCategoricalCrossentropy(from_logits=True), "value": "mse"},
    "one": {"classes": None, "value": losses.Huber()},
    "list": [losses.SparseCategoricalCrossentropy(from_logits=True), losses.mean_absolute_error],
}


def two_headed() -> keras.Model:
    """A model of two outputs: logits of many classes, and a number."""
    with building("float32"):
        x = keras.Input((3, 8), name="features")
        y = layers.Dense(16, activation="gelu", name="up")(x)
        outputs = [layers.Dense(CLASSES, name="classes")(y), layers.Dense(1, name="value")(y)]
        return randomize(keras.Model(x, outputs, name="two_headed"))


def features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 3, 8)).astype("float32")


def plan_of(model: keras.Model, **options: Any) -> Plan:
    """Return the plan of a model for two ranks."""
    layout = keras.distribution.LayoutMap(keras.distribution.DeviceMesh((2,), ("model",), ["cpu:0", "cpu:1"]))
    for pattern, axes in RULES.items():
        layout[pattern] = axes
    return tp_planner.plan(model, layout, inputs=features(), **options)


# On the ranks


def trained(name: str) -> tuple[Plan, Step, Memory, dict[str, int]]:
    """Train with a loss of the model's own, as planned; return what was planned and measured.

    The last has how many weights had a gradient before and after the forward pass of the second step.
    """
    model = two_headed()
    model.compile("adam", LOSSES[name], jit_compile=False)
    plan = tp_planner.plan(model, layout_map(RULES), inputs=features())
    tp_planner.parallelize(model, plan, check="first_step")
    targets = [TARGETS["classes"], TARGETS["value"]]
    if name == "one":
        targets = {"classes": None, "value": TARGETS["value"]}
    model.train_on_batch(features(), targets)
    seen: dict[str, int] = {}

    def count(when: str) -> Any:
        def hook(*_: Any) -> None:
            seen[when] = sum(each._value.grad is not None for each in model.trainable_variables)

        return hook

    hooks = [model.register_forward_pre_hook(count("before")), model.register_forward_hook(count("after"))]
    model.train_on_batch(features(), targets)
    for hook in hooks:
        hook.remove()
    same = like(plan.step.memory, model, features())
    by_keras = min((metered_training(model, features(), targets) for _ in range(3)), key=size_of)
    return plan, same, by_keras, seen


def accumulated() -> list[bool]:
    """Return whether a training step of the user's own still has the gradients of the step before."""
    kept: list[bool] = []

    class Own(keras.Model):
        def train_step(self, data: Any) -> Mapping[str, Any]:
            kept.append(all(each._value.grad is not None for each in self.trainable_variables))
            return super().train_step(data)

    x = keras.Input((8,))
    model = Own(x, layers.Dense(4, name="up")(x))
    tp_planner.parallelize(model, layout_map({"up/kernel": (None, "model")}))
    model.compile("sgd", "mse")
    for _ in range(2):
        model.train_on_batch(np.ones((4, 8)), np.ones((4, 4)))
    return kept


# In the parent


@pytest.mark.parametrize("name", LOSSES)
def test_planned_loss_takes_what_training_takes(pools: Pools, name: str) -> None:
    """Its memory to the byte; the first step of training communicated as planned, or it would have raised."""
    for plan, same, by_keras, gradients in pools(2).run(trained, name):
        assert same.memory == plan.step.memory
        assert by_keras.peak.total == pytest.approx(plan.step.memory.peak.total, rel=0.02)
        assert gradients == {"before": 0, "after": 0}


def test_loss_of_one_output_leaves_the_other_without_gradient() -> None:
    """Its kernel has none to update; under the sum of the outputs it has."""
    model = two_headed()
    model.compile("adam", LOSSES["one"])
    one, both = plan_of(model), plan_of(two_headed(), optimizer="adam")
    unused = CLASSES * 16 // 2 * 4 + CLASSES * 4
    assert both.step.memory.largest.gradients - one.step.memory.largest.gradients == unused


def test_gradients_stay_for_training_steps_of_ones_own(pools: Pools) -> None:
    assert all(kept == [False, True] for kept in pools(2).run(accumulated))


def test_loss_is_named() -> None:
    """Given ones come before the compiled one; none is needed."""
    model = two_headed()
    assert plan_of(model).step.loss == ""
    model.compile("adam", LOSSES["both"])
    assert plan_of(model).step.loss == "SparseCategoricalCrossentropy, mean_squared_error"
    assert plan_of(model, loss=["ce", "mae"]).step.loss == "crossentropy, mean_absolute_error"
    model.compile("adam", LOSSES["one"])
    assert plan_of(model).step.loss == "Huber"
    named = plan_of(model, loss="huber")
    assert Plan.from_json(named.to_json()) == named
    assert "Adam, loss huber: " in str(named)


def test_unknown_loss_is_refused() -> None:
    with pytest.raises(PlanError, match=r"loss 'no_such' is unknown; give a Keras loss or the name of one"):
        TrainingLoss("no_such")


def test_loss_that_cannot_be_simulated_is_noted() -> None:
    """One of the user's own: the sum of the outputs stands for it, and the plan is otherwise whole."""

    def triplets(y_true: torch.Tensor, y_pred: torch.Tensor) -> torch.Tensor:
        anchor, positive = y_true.reshape(y_pred.shape[0], 7, 2).unbind(-1)
        return (y_pred[..., 0] - anchor[:, :3] + positive[:, :3]).square()

    plan = plan_of(two_headed(), loss=triplets, optimizer="adam")
    assert (plan.step.loss, plan.step.whole_update) == ("", True)
    assert plan.step == plan_of(two_headed(), optimizer="adam").step
    (note,) = [note for note in plan.notes if "triplets" in note]
    assert note == (
        "loss triplets cannot be simulated (ValueError: it is no loss of Keras): the sum of the outputs stands for it"
    )


@pytest.mark.parametrize("taken", ["function", "fn of Keras's wrapper", "layer"])
def test_a_loss_of_ones_own_is_not_called(taken: str) -> None:
    """It may keep what it is called on, or make weights from it, which would be fake."""
    called: list[Any] = []

    class Measured(layers.Layer):
        def call(self, y_true: Any, y_pred: Any) -> Any:
            called.append(y_pred)
            return keras.ops.mean(y_pred - y_true, -1)

    def measured(y_true: Any, y_pred: Any) -> Any:
        called.append(y_pred)
        return keras.ops.mean(y_pred - y_true, -1)

    loss = {"function": measured, "layer": Measured()}.get(taken) or losses.MeanSquaredError()
    if taken.startswith("fn"):
        loss.fn = measured
    model = two_headed()
    model.compile("adam", loss)
    plan = plan_of(model)
    assert (plan.step.loss, plan.notes, called) == ("", plan_of(two_headed()).notes, [])
