"""Replicas add up gradients of micro-steps on their own, average once an update, and have what one process has."""

from __future__ import annotations

from collections import Counter
from typing import Any

import keras
import numpy as np
import pytest
import torch.distributed as dist

import tp_planner
from tests.models import building, randomize
from tests.replicas import MODELS, Shape, layout, share
from tests.training.test_training import variables_of
from tests.workers import Pools

OPTIMIZERS = {
    "adamw": lambda: keras.optimizers.AdamW(
        0.01, weight_decay=0.1, epsilon=1e-3, global_clipnorm=0.1, gradient_accumulation_steps=3
    ),
    "momentum": lambda: keras.optimizers.SGD(
        0.05, momentum=0.9, loss_scale_factor=64.0, clipnorm=0.01, gradient_accumulation_steps=2
    ),
    "averages": lambda: keras.optimizers.Adam(
        0.01, epsilon=1e-3, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2, gradient_accumulation_steps=2
    ),
    "ftrl": lambda: keras.optimizers.Ftrl(0.01, gradient_accumulation_steps=2),
    "lamb": lambda: keras.optimizers.Lamb(0.01, epsilon=1e-3, gradient_accumulation_steps=2),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01, epsilon=1e-3, gradient_accumulation_steps=2), initial_scale=1024.0
    ),
}
SIZES = [8, 8, 8, 5, 1, 8, 8]  # of global batches; with four replicas some have no share


# On the ranks


def train(name: str, rules: str, shape: Shape, optimizer: str) -> dict[str, float]:
    """Return how far replicas are from one process in each micro-step: losses, weights and slots, sums among them."""
    case, rng, replica = MODELS[name], np.random.default_rng(0), dist.get_rank() // shape[1]
    models = [case.build("float64", seed=seed) for seed in (0, dist.get_rank())]
    batches = [case.batch(rng, size) for size in SIZES]
    own = [(share(x, replica, shape[0]), share(y, replica, shape[0])) for x, y in batches]
    models[1].set_weights(models[0].get_weights())
    tp_planner.parallelize(models[1], layout(name, rules, shape), own[0][0], batch_axis="batch")
    for model in models:
        model.compile(OPTIMIZERS[optimizer](), case.make_loss("float64"), jit_compile=False)
    errors: dict[str, float] = {}
    for number, (whole, part) in enumerate(zip(batches, own, strict=True)):
        losses = [float(model.train_on_batch(*fed)) for model, fed in zip(models, (whole, part), strict=True)]
        errors[f"step {number}: loss"] = abs(losses[1] - losses[0]) * 1e-5  # Keras adds them in float32
        expected, found = map(variables_of, models)
        scale = max(float(np.abs(array).max()) for array in expected.values())
        for key in expected:
            errors[f"step {number}: {key}"] = float(np.abs(found[key] - expected[key]).max()) / scale
    return errors
