"""Random models, with random layouts and ways of use, train as on one device."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import torch.distributed as dist

import tp_planner
from tests.random_models import random_batch, random_model
from tests.replicas import Shape, relative, share, weights
from tests.search.test_found_models import fast_links
from tests.workers import Pools
from tp_planner.frontend.layer_tree import named_layers
from tp_planner.ir.layout import AxisSpec, Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.replay import automatic
from tp_planner.search.find import search

ADAPTABLE = keras.layers.Dense | keras.layers.EinsumDense | keras.layers.Embedding
OF_FLOAT32 = 1e-4  # as adapters are, whatever the model is
Rules = dict[str, tuple[AxisSpec, ...]]


@dataclass(frozen=True)
class Use:
    """How a model is sharded and trained."""

    seed: int
    shape: Shape
    rules: Rules
    zero: int
    ahead: int
    stream: bool
    distributed: bool
    jit_compile: Any
    optimizer: dict[str, Any]
    sizes: tuple[int, ...]  # of global batches
    frozen: float  # share of layers
    decayed: bool  # by regularizers
    adapted: bool  # by LoRA
    found: bool  # the layout, rather than drawn
    event: str  # what happens between two steps
    at: int  # before which step
    tensors: bool  # whether data are, rather than arrays


def random_use(seed: int, ranks: int) -> Use:
    rng = random.Random(1000 + seed)
    shape = rng.choice({2: [(1, 2), (2, 1)], 4: [(1, 4), (2, 2), (2, 2), (4, 1)]}[ranks])
    distributed = rng.random() < 0.3
    optimizer = rng.choice([{}, {}, {"gradient_accumulation_steps": 2}, {"global_clipnorm": 0.1}, {"use_ema": True}])
    return Use(
        seed=seed,
        shape=shape,
        rules=_rules(random_model(seed), rng, shape[0] > 1, not distributed) if rng.random() < 0.8 else {},
        zero=rng.choice([0, 0, 1, 3]) if shape[0] > 1 else 0,
        ahead=rng.choice([0, 1, 1, 2]),
        stream=rng.random() < 0.2,
        distributed=distributed,
        jit_compile=rng.choice([False, "auto", "auto", "auto" if distributed else True]),
        optimizer=optimizer,
        sizes=tuple(rng.choice([[8] * 10, [8] * 10, [8, 5, 8, 3], [4, 4, 1, 4, 7, 4, 4, 4, 4, 4]])),
        frozen=rng.choice([0.0, 0.0, 0.3]),
        decayed=rng.random() < 0.2,
        adapted=rng.random() < 0.15,
        found=not distributed and rng.random() < 0.15,
        event=rng.choice(sorted(EVENTS)),
        at=rng.randint(2, 7),
        tensors=rng.random() < 0.6,
    )


def _rules(model: keras.Model, rng: random.Random, replicas: bool, pairs: bool) -> Rules:
    """Return rules for a random share of the weights: a random dim of each, with ``replicas`` two, or one over both."""
    chance, both, rules = rng.choice([0.4, 0.7, 1.0]), rng.random() < 0.3 and replicas, {}
    for variable in model.variables:
        if len(variable.shape) and rng.random() < chance:
            axes: list[AxisSpec] = [None] * len(variable.shape)
            dims = rng.sample(range(len(axes)), min(len(axes), 2))
            axes[dims[0]] = "model"
            if both and len(dims) == 2 and rng.random() < 0.5:
                axes[dims[1]] = "batch"
            elif both and pairs and rng.random() < 0.3:
                axes[dims[0]] = ("batch", "model")
            rules[re.escape(variable.path)] = tuple(axes)
    return rules


# On the ranks


def _faster(model: keras.Model) -> None:
    model.optimizer.learning_rate = 0.03


def _halved(model: keras.Model) -> None:
    variable = model.trainable_variables[0]
    variable.assign(0.5 * np.array(variable))


def _set(model: keras.Model) -> None:
    model.set_weights([0.9 * each if each.dtype.kind == "f" else each for each in model.get_weights()])


def _frozen(model: keras.Model) -> None:
    next(layer for layer in model.layers if layer.trainable_variables).trainable = False


def _with_another_loss(model: keras.Model) -> None:
    model.compile(model.optimizer, keras.losses.MeanAbsoluteError(dtype="float64"), jit_compile=model.jit_compile)


EVENTS: dict[str, Callable[[keras.Model], None]] = {
    "nothing": lambda model: None,
    "faster": _faster,
    "halved": _halved,
    "set": _set,
    "frozen": _frozen,
    "with another loss": _with_another_loss,
    "tested": lambda model: None,
    "weighted": lambda model: None,
}


def build(use: Use, seed: int) -> keras.Model:
    model, rng = random_model(use.seed), random.Random(use.seed)
    if seed:  # another start than rank 0's, whose weights are those that count
        noise = np.random.default_rng(seed)
        for variable in model.trainable_variables:
            variable.assign(noise.standard_normal(variable.shape))
    for name, layer in named_layers(model).items():
        if layer is not model and rng.random() < use.frozen and name != "head":
            layer.trainable = False
        if use.decayed and isinstance(layer, keras.layers.Dense) and layer.built:
            layer.kernel.regularizer = keras.regularizers.L2(0.01)
        if use.adapted and isinstance(layer, ADAPTABLE) and layer.built and rng.random() < 0.5:
            layer.enable_lora(2)
    noise = np.random.default_rng(use.seed)
    for variable in model.variables:
        if "lora" in variable.path:
            variable.assign(0.3 * noise.standard_normal(variable.shape))
    return model


def compiled(use: Use, model: keras.Model) -> keras.Model:
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1, epsilon=1e-2, **use.optimizer)
    model.compile(optimizer, keras.losses.MeanSquaredError(dtype="float64"), jit_compile=use.jit_compile)
    return model


def trained(use: Use) -> dict[str, float]:
    """Return how far weights and losses are from those of one process on the whole batches."""
    rng = np.random.default_rng(use.seed)
    alone = compiled(replace(use, jit_compile=False), build(use, 0))
    batches = [random_batch(alone, rng, size) for size in use.sizes]
    expected = _steps(use, alone, batches)
    with mock.patch.object(automatic, "PATIENCE", 1):
        model, found = _distributed(use, batches) if use.distributed else _parallelized(use, batches)
    end, own_end = weights(alone), weights(model)
    errors = {key: relative(own_end[key], end[key]) for key in end if "seed_generator" not in key}
    outputs = [np.asarray(each.predict_on_batch(batches[0][0])) for each in (alone, model)]
    errors["outputs"] = relative(outputs[1][: len(outputs[0])], outputs[0])
    errors["losses"] = relative(np.array(found), np.array(expected)) * 1e-6  # Keras adds them in float32
    return errors


def _steps(use: Use, model: keras.Model, batches: Any) -> list[float]:
    """Train on batches, of which a rank may have its share, and return the losses that are reported."""
    losses = []
    for number, (x, y) in enumerate(batches):
        if number == use.at:
            EVENTS[use.event](model)
        if number >= use.at and use.event == "tested":
            losses.append(model.test_on_batch(x, y))
        weights = np.abs(y).sum(axis=-1)
        weighted = number >= use.at and use.event == "weighted"
        data = (x, y, weights) if weighted else (x, y)
        if use.tensors:
            data = tuple(map(keras.ops.convert_to_tensor, data))
        losses.append(model.train_on_batch(*data))
    return losses


def _parallelized(use: Use, batches: Any) -> tuple[keras.Model, list[float]]:
    replicas = use.shape[0]
    shares = [share(batch, dist.get_rank() // use.shape[1], replicas) for batch in batches]
    rules = tuple(LayoutRule(pattern, axes) for pattern, axes in use.rules.items())
    mesh = Mesh((("batch", replicas), ("model", use.shape[1])))
    layout = Layout(mesh, rules, sequence_parallel=use.stream, gathers_ahead=use.ahead, zero=use.zero)
    model = compiled(use, build(use, dist.get_rank()))
    if use.found:
        layout = search(model, mesh, fast_links(), shares[0][0], model.optimizer).layout
    tp_planner.parallelize(model, layout, shares[0][0], batch_axis="batch")
    model.compile(model.optimizer, model.loss, jit_compile=use.jit_compile)  # which is noted from now on
    return model, _steps(use, model, shares)


def _distributed(use: Use, batches: Any) -> tuple[keras.Model, list[float]]:
    devices = [f"cpu:{rank}" for rank in range(dist.get_world_size())]
    layout_map = keras.distribution.LayoutMap(keras.distribution.DeviceMesh(use.shape, ("batch", "model"), devices))
    for pattern, axes in use.rules.items():
        layout_map[pattern] = axes
    layout_map.zero = use.zero
    tp_planner.enable_keras_distribution()
    try:
        with keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch").scope():
            model = compiled(use, build(use, 0))
            return model, _steps(use, model, batches)
    finally:
        tp_planner.disable_keras_distribution()


# In the parent


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("seed", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in range(1, 30))])
def test_random_models_train(pools: Pools, ranks: int, seed: int) -> None:
    """Losses, and weights after steps of AdamW on uneven batches, are those of one process."""
    use = random_use(seed, ranks)
    for errors in pools(ranks).run(trained, use):
        limit = OF_FLOAT32 if use.adapted else 1e-10
        assert {key: error for key, error in errors.items() if not error < limit} == {}
