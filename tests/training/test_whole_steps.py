"""Whole steps: a training step of which all is replayed runs its programs alone, and does what Keras's does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import torch

import tp_planner
from tests.models import randomize
from tests.workers import Pools, layout_map
from tp_planner.replay import automatic
from tp_planner.training import step
from tp_planner.training.whole_steps import _WholeStep

layers = keras.layers
RULES = {"(.*/)?up/kernel": (None, "model"), "(.*/)?up/bias": ("model",), "(.*/)?down/kernel": ("model", None)}
BATCH, STEPS = 6, 8


class OwnStep(keras.Model):
    """A model whose step scales what Keras's returns."""

    def train_step(self, data: Any) -> Any:
        return {name: 2 * value for name, value in super().train_step(data).items()}


class OwnLoss(keras.Model):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)


class OwnMetrics(keras.Model):
    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        return super().compute_metrics(x, y, y_pred, sample_weight) | {"first": y_pred[0, 0].detach()}


KINDS: dict[str, type] = {"own step": OwnStep, "own loss": OwnLoss, "own metrics": OwnMetrics}


def made(case: str) -> keras.Model:
    inputs = keras.Input((6, 16) if case == "stream" else (16,), name="inputs")
    x = layers.Dense(32, "relu", name="up")(inputs)
    x = layers.Dense(16, name="down")(x)
    x = (layers.LayerNormalization if case == "stream" else layers.BatchNormalization)(name="norm")(x)
    x = layers.Dropout(0.1, seed=3, name="drop")(x)
    outputs: Any = layers.Dense(8, name="head")(x)
    if case == "several":
        other = keras.Input((16,), name="other")
        outputs = {"head": outputs, "tail": layers.Dense(8, name="tail")(layers.Add()([x, other]))}
        inputs = {"inputs": inputs, "other": other}
    return randomize(KINDS.get(case, keras.Model)(inputs, outputs, name="model"))


def doubled(plain: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(plain)(lambda *args, **kwargs: 2 * plain(*args, **kwargs))


# On the ranks


def trained(case: str, jit_compile: Any) -> tuple[int, int, dict[str, np.ndarray]]:
    """Train, change something, and go on; return how many steps were whole before and after, and numbers."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    if case == "mixed":
        keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = made(case)
    finally:
        keras.config.set_dtype_policy("float32")
    tp_planner.parallelize(model, layout_map(RULES), sequence_parallel=case == "stream")
    metrics = {} if case == "several" else {"metrics": ["mae"]}
    model.compile(keras.optimizers.AdamW(0.01), "mse", jit_compile=jit_compile, **metrics)
    rng = np.random.default_rng(5)
    x, y, other = (torch.from_numpy(rng.standard_normal((BATCH, size)).astype("float32")) for size in (16, 8, 16))
    data: list[Any] = [x, y]
    if case == "stream":
        data = [each[:, None].repeat(1, 6, 1) * torch.arange(1.0, 7.0)[:, None] for each in data]
    if case == "several":
        data = [{"inputs": x, "other": other}, {"head": y, "tail": y + 1}]
    results: dict[str, np.ndarray] = {}
    count, plain = [0], _WholeStep.run

    def counting(self: _WholeStep, given: Any) -> Any:
        count[0] += 1
        return plain(self, given)

    def train(name: str) -> int:
        count[0] = 0
        for number in range(STEPS):
            if case == "gradients are left":
                model.get_layer("head").kernel._value.grad = torch.ones(16, 8)
            logs = model.train_step(tuple(data))
            for key, value in logs.items():
                results[f"{name} {number} {key}"] = keras.ops.convert_to_numpy(value).copy()
            for weight in () if case == "own step" and jit_compile is True else model.weights:  # Keras 3.16 leaves none
                gradient = getattr(weight._value.grad, "_local_tensor", weight._value.grad)
                results[f"{name} {number} {weight.path}"] = (
                    np.zeros(()) if gradient is None else gradient.numpy().copy()
                )
        return count[0]

    with mock.patch.object(automatic, "PATIENCE", 1), mock.patch.object(_WholeStep, "run", counting):
        before = train("before")
        undo = change(case, model, data) or (lambda: None)
        after = train("after")
        undo()
        train("later")
        results["predicted"] = model.predict_on_batch(data[0]) if case != "several" else np.zeros(())
        train("last")
    results |= {each.path: keras.ops.convert_to_numpy(each) for each in (*model.variables, *model.optimizer.variables)}
    return before, after, results


def change(case: str, model: keras.Model, data: list[Any]) -> Callable[[], Any] | None:
    """Change something, and return what takes it back, if it is taken back."""
    head, optimizer = model.get_layer("head"), model.optimizer
    match case:
        case "a hook of the model":
            return model.register_forward_hook(lambda model, args, output: 2 * output).remove
        case "a hook before the model":
            return model.register_forward_pre_hook(lambda model, args: (2 * args[0],)).remove
        case "a hook of a layer":
            return head.register_forward_hook(lambda layer, args, output: 2 * output).remove
        case "a hook of all modules":
            hook = torch.nn.modules.module.register_module_forward_hook
            return hook(lambda module, args, output: 2 * output if module is head else None).remove
        case "a hook of a weight":
            return head.kernel._value.register_hook(lambda gradient: 2 * gradient).remove
        case "a hook when a gradient is there":
            return head.kernel._value.register_post_accumulate_grad_hook(_double).remove
        case "another loss":
            model.compute_loss, plain = doubled(model.compute_loss), model.compute_loss
            return lambda: setattr(model, "compute_loss", plain)
        case "other metrics":
            model.compute_metrics = lambda *args, **kwargs: {"seven": torch.tensor(7.0)}
        case "another update":
            plain_apply = optimizer.apply
            optimizer.apply = lambda gradients, weights: plain_apply([2 * each for each in gradients], weights)
        case "another optimizer":
            model.optimizer = keras.optimizers.SGD(0.1)
        case "a weight without gradient":
            head.bias._value.requires_grad_(False)
            return lambda: head.bias._value.requires_grad_(True)
        case "a weight frozen":
            head.bias.trainable = False
        case "a layer frozen":
            model.get_layer("up").trainable = False
        case "a layer that infers":
            model.get_layer("norm").trainable = False
        case "eagerly":
            model.run_eagerly = True
            return lambda: setattr(model, "run_eagerly", False)
        case "sample weights":
            data.append(torch.arange(BATCH, dtype=torch.float32))
        case "a mask":
            mask = torch.arange(8).expand(BATCH, 8) < 5
            data[1]._keras_mask = mask
        case "other rows":
            data[:] = [each[:4] for each in data]
        case "numbers of arrays":
            data[:] = [each.numpy() for each in data]
        case "another rate":
            model.get_layer("drop").rate = 0.5
        case "of another scale":
            optimizer.loss_scale_factor = 4.0
        case "compiled":
            model.compile(keras.optimizers.AdamW(0.02), "mae", jit_compile=True if model.jit_compile else "auto")
    return None


def _double(weight: torch.Tensor) -> None:
    assert weight.grad is not None
    weight.grad.mul_(2)


def compared(case: str) -> tuple[list[tuple[int, int]], list[str], float]:
    """Return how many steps were whole by default and if asked for, which numbers differ by default, how far others."""
    _, _, eager = trained(case, False)
    found = [trained(case, jit_compile) for jit_compile in ("auto", True)]
    off = [key for key, value in eager.items() if not np.array_equal(found[0][2][key], value, equal_nan=True)]
    far = max(
        float(np.abs(value.astype("float64") - eager[key].astype("float64")).max())
        for key, value in found[1][2].items()
    )
    return [each[:2] for each in found], off, far


# In the parent

# By what is changed: how many of the steps after are whole, by default and if asked for.
CASES: dict[str, tuple[int, int]] = {
    "nothing": (STEPS, STEPS),
    "several": (STEPS, STEPS),
    "stream": (STEPS, STEPS),
    "mixed": (STEPS, STEPS),
    "gradients are left": (STEPS, STEPS),
    "a hook of a weight": (STEPS, STEPS),
    "a hook when a gradient is there": (STEPS, STEPS),
    "own step": (0, 0),
    "own loss": (0, 0),
    "own metrics": (0, 0),
    "a hook of the model": (0, 0),
    "a hook before the model": (0, 0),
    "another loss": (0, 0),
    "other metrics": (0, 0),
    "another update": (0, 0),
    "another optimizer": (0, 0),
    "a weight without gradient": (STEPS, STEPS),
    "a weight frozen": (3, 4),
    "a layer frozen": (3, 4),
    "eagerly": (0, 0),
    "sample weights": (4, 5),
    "a mask": (0, 0),
    "other rows": (4, 5),
    "numbers of arrays": (0, 0),
    "of another scale": (0, 0),
    "compiled": (3, 3),
}
# Those for default alone: a program that is asked for has layers as they were.
BY_DEFAULT = ("a hook of a layer", "a hook of all modules", "a layer that infers", "another rate")


@pytest.mark.parametrize("case", [*CASES, *BY_DEFAULT])
def test_whole_steps_do_what_keras_does(pools: Pools, case: str) -> None:
    """Logs, gradients, weights and slots are eager code's, by default to the bit, whatever is changed, and back."""
    for counts, off, far in pools(2).run(compared, case):
        assert off == []
        if case in CASES:
            assert far < (0.1 if case == "mixed" else 1e-3)
            if not case.startswith("own"):
                assert all(before == STEPS - 5 for before, _ in counts)  # four are taped, or run as they are written
            assert tuple(after for _, after in counts) == CASES[case]


def test_the_step_of_another_keras_is_its_own() -> None:
    """A step is run in Keras's place if its source is known."""
    assert step._is_known(keras.Model.train_step)
    assert not step._is_known(OwnStep.train_step)
