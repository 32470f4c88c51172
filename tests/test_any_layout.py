"""Any layout computes the right function: random dims of random variables, sharded without sense."""

from __future__ import annotations

import random
import re
from typing import Any

import keras
import numpy as np
import pytest
import torch

import tp_planner
from tests.models import CASES, usual
from tests.workers import WorkerPool, layout_map
from tp_planner.frontend.layer_tree import named_variables


def random_rules(model: keras.Model, seed: int) -> dict[str, tuple[str | None, ...]]:
    """Return rules that shard a random dim of two thirds of the variables, uneven dims included."""
    rng, rules = random.Random(seed), {}
    for variable in model.variables:
        if len(variable.shape) and rng.random() < 0.67:
            dim = rng.randrange(len(variable.shape))
            axes = tuple("model" if each == dim else None for each in range(len(variable.shape)))
            rules[re.escape(variable.path)] = axes
    return rules


def whole(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().numpy()


# On the ranks


def output_and_gradients(name: str, seed: int, sequence_parallel: bool) -> tuple[float, dict[str, float]]:
    """Return the relative error of the output, and of each gradient against the largest of all."""
    case = CASES[name]
    models = [case.build("float64") for _ in range(2)]
    x, y = case.batch(np.random.default_rng(seed), 3)
    rules = layout_map(random_rules(models[0], seed))
    tp_planner.parallelize(models[1], rules, sequence_parallel=sequence_parallel)
    outputs, gradients = [], []
    for model in models:
        output = model(keras.tree.map_structure(keras.ops.convert_to_tensor, x), training=True)
        case.make_loss("float64")(y, output).backward()
        outputs.append(whole(output))
        gradients.append({key: whole(v.value.grad) for key, v in named_variables(model).items() if v.trainable})
    scale = max(float(np.abs(gradient).max()) for gradient in gradients[0].values())
    errors = {key: float(np.abs(gradients[1][key] - gradients[0][key]).max()) / scale for key in gradients[0]}
    return _error(outputs), errors


def _error(outputs: list[Any]) -> float:
    return float(np.abs(outputs[1] - outputs[0]).max() / np.abs(outputs[0]).max())


# In the parent


@pytest.mark.parametrize("sequence_parallel", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", usual(CASES, {"handwritten", "llama"}))
def test_random_layout(workers: WorkerPool, name: str, seed: int, sequence_parallel: bool) -> None:
    """Output and every gradient are those of the single device."""
    error, gradients = workers.run(output_and_gradients, name, seed, sequence_parallel)[0]
    assert error < 1e-12
    assert {key: value for key, value in gradients.items() if value > 1e-11} == {}
