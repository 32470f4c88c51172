"""Replicas across one mesh axis, tensor parallelism along the other: the same as one process on the whole batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.models import CASES, Batch, Case, building, randomize
from tests.workers import Pools
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.ir.layout import AxisSpec, Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.placement import chunk_sizes

Axes = tuple[AxisSpec, ...]
Rules = Mapping[str, Axes]
Shape = tuple[int, int]  # sizes of the mesh's axes "batch" and "model"

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


# Models that look at all of the batch


def normalized(dtype: str = "float32", *, seed: int = 0) -> keras.Model:
    """A model with batch normalization of images, and of sequences that are masked."""
    with building(dtype):
        pixels = keras.Input((6, 6, 2), name="pixels")
        steps = keras.Input((5, 3), name="steps")
        x = keras.layers.Conv2D(8, 3, name="conv")(pixels)
        x = keras.layers.BatchNormalization(name="conv_norm")(x)
        x = keras.layers.GlobalAveragePooling2D(name="pool")(keras.layers.ReLU(name="relu")(x))
        y = keras.layers.BatchNormalization(name="steps_norm")(keras.layers.Masking(name="masking")(steps))
        y = keras.layers.Flatten(name="flatten")(y)
        z = keras.layers.Concatenate(name="both")([x, y])
        z = keras.layers.Dense(16, name="up")(z)
        z = keras.layers.Activation("gelu", name="gelu")(keras.layers.BatchNormalization(name="up_norm")(z))
        model = keras.Model([pixels, steps], keras.layers.Dense(8, name="down")(z), name="normalized")
        return randomize(model, seed)


def normalized_batch(rng: np.random.Generator, size: int) -> Batch:
    steps = rng.standard_normal((size, 5, 3)).astype("float32") + 1
    steps[rng.random((size, 5)) < 0.4] = 0  # masked
    pixels = 3 * rng.standard_normal((size, 6, 6, 2)).astype("float32") + rng.standard_normal((size, 1, 1, 1))
    return [pixels.astype("float32"), steps], rng.standard_normal((size, 8)).astype("float32")


NORMALIZED_RULES: dict[str, Axes] = {
    "conv/kernel": (None, None, None, "model"),
    "up/kernel": (None, "model"),
    "up/bias": ("model",),
    "up_norm/(gamma|beta|moving_mean|moving_variance)": ("model",),
    "down/kernel": ("model", "batch"),
}
MODELS = CASES | {
    "normalized": Case("normalized", normalized, normalized_batch, "MeanSquaredError", {}, None),
}


# Layouts


def hub_rules(backbone: Any) -> Rules:
    """Return the rules that KerasHub comes with for a family."""
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"), ["cpu:0"])
    layout_map = backbone.get_layout_map(mesh)
    return {pattern: tuple(layout_map._layout_map[pattern].axes) for pattern in layout_map}


def also_over_batch(rules: Rules) -> Rules:
    """Return rules that shard another dim over the batch axis, or, where there is none, the same."""

    def both(axes: Axes) -> Axes:
        if None not in axes:
            return tuple(("batch", axis) if isinstance(axis, str) else axis for axis in axes)
        first = axes.index(None)
        return (*axes[:first], "batch", *axes[first + 1 :])

    return {pattern: both(axes) for pattern, axes in rules.items()}


def on_one_dim(rules: Rules) -> Rules:
    """Return rules that shard the same dim over both axes."""
    return {p: tuple(("batch", axis) if isinstance(axis, str) else axis for axis in axes) for p, axes in rules.items()}


def over_batch_alone(rules: Rules) -> Rules:
    return {pattern: tuple("batch" if axis else None for axis in axes) for pattern, axes in rules.items()}


LAYOUTS: dict[str, Callable[[str], Rules]] = {
    "no rules": lambda name: {},
    "model axis": lambda name: MODELS[name].rules,
    "both axes": lambda name: also_over_batch(MODELS[name].rules),
    "both axes on one dim": lambda name: on_one_dim(MODELS[name].rules),
    "batch axis alone": lambda name: over_batch_alone(MODELS[name].rules),
    "KerasHub's": lambda name: hub_rules(
        {"llama": keras_hub.models.LlamaBackbone, "gemma": keras_hub.models.GemmaBackbone}[name]
    ),
    "normalized": lambda name: NORMALIZED_RULES,
}


def layout(name: str, rules: str, shape: Shape) -> Layout:
    mesh = Mesh((("batch", shape[0]), ("model", shape[1])))
    return Layout(mesh, tuple(LayoutRule(pattern, axes) for pattern, axes in LAYOUTS[rules](name).items()))


# On the ranks


@dataclass
class Trained:
    """What one rank has seen: how far it is from one process on the whole batch, and what it stores at the end."""

    errors: dict[str, float]
    stored: dict[str, bytes]
    collectives: Counter[tuple[str, str]]  # by kind and axis


def share(tree: Any, replica: int, replicas: int) -> Any:
    """Return the replica's share of each array: a run of rows."""

    def rows(array: np.ndarray) -> np.ndarray:
        sizes = chunk_sizes(len(array), replicas)
        return array[sum(sizes[:replica]) : sum(sizes[: replica + 1])]

    return keras.tree.map_structure(rows, tree)


def whole(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().numpy().copy()


def gradients_of(model: keras.Model, case: Case, dtype: str, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    x, y = batch
    output = model(x, training=True)
    loss = model.compute_loss(x, y, output)
    loss.backward()
    gradients = {key: whole(v.value.grad) for key, v in named_variables(model).items() if v.value.grad is not None}
    model.zero_grad()
    return float(loss.detach()), gradients


def train(name: str, rules: str, shape: Shape, dtype: str, sizes: list[int], optimizer: str) -> Trained:
    """Train a case on global batches of these sizes, across the replicas and by one process, and compare."""
    case = MODELS[name]
    rng = np.random.default_rng(1)
    batches = [case.batch(rng, size) for size in sizes]
    models = [case.build(dtype, seed=seed) for seed in (0, dist.get_rank())]
    replica = dist.get_rank() // shape[1]
    shares = [(share(x, replica, shape[0]), share(y, replica, shape[0])) for x, y in batches]
    tp_planner.parallelize(models[1], layout(name, rules, shape), shares[0][0], check="first_step", batch_axis="batch")
    applied = applied_to(models[1])
    assert applied is not None
    plan = applied.plan
    assert tp_planner.Plan.from_json(plan.to_json()) == plan
    results = []
    for model, fed in zip(models, (batches, shares), strict=True):
        metrics = ["mae"] if case.loss == "MeanSquaredError" else ["accuracy"]
        model.compile(OPTIMIZERS[optimizer](), case.make_loss(dtype), metrics=metrics, jit_compile=False)
        loss, gradients = gradients_of(model, case, dtype, fed[0])
        losses = [model.train_on_batch(x, y) for x, y in fed]
        evaluated = model.test_on_batch(*fed[-1])
        results.append((loss, gradients, np.array([*losses, evaluated]), weights(model)))
    (_, expected, losses, end), (_, found, own_losses, own_end) = results
    scale = max(float(np.abs(array).max()) for array in expected.values())
    assert expected.keys() == found.keys()
    errors = {f"gradient of {key}": float(np.abs(found[key] - expected[key]).max()) / scale for key in expected}
    errors |= {key: relative(own_end[key], end[key]) for key in end}
    errors["losses and metrics"] = relative(own_losses, losses) * TOLERANCE[dtype] / 1e-5  # Keras adds them in float32
    stored = {
        key: (v._value._local_tensor if hasattr(v._value, "_local_tensor") else v._value).detach().numpy().tobytes()
        for key, v in named_variables(models[1]).items()
    }
    tp_planner.restore(models[1])
    errors |= {f"restored {key}": relative(array, own_end[key]) for key, array in weights(models[1]).items()}
    return Trained(errors, stored, Counter((each.kind, each.axis) for each in plan.collectives))


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, epsilon=1e-3),
}


def weights(model: keras.Model) -> dict[str, np.ndarray]:
    return {key: whole(variable._value) for key, variable in named_variables(model).items()}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max(initial=0.0) / max(np.abs(expected).max(initial=0.0), 1e-30))


# In the parent

TRAININGS: list[tuple[str, str, Shape, str, list[int], str]] = [
    ("gpt", "model axis", (2, 2), "float64", [4, 4], "adamw"),
    ("gpt", "both axes", (2, 2), "float64", [4, 4], "adamw"),
    ("gpt", "both axes", (2, 2), "float32", [4, 4], "sgd"),
    ("gpt", "no rules", (4, 1), "float64", [8, 4], "sgd"),
    ("gpt", "both axes", (1, 4), "float64", [4, 4], "sgd"),
    ("encoder", "both axes on one dim", (2, 2), "float64", [4, 4], "adamw"),
    ("encoder", "batch axis alone", (4, 1), "float32", [4, 4], "sgd"),
    ("llama", "KerasHub's", (2, 2), "float64", [4, 4], "adamw"),
    ("llama", "KerasHub's", (4, 1), "float32", [4, 4], "sgd"),
    ("gemma", "KerasHub's", (2, 2), "float64", [4, 4], "sgd"),
    ("normalized", "normalized", (2, 2), "float64", [6, 6], "adamw"),
    ("normalized", "no rules", (4, 1), "float32", [8, 8], "sgd"),
    ("normalized", "normalized", (2, 2), "float64", [7, 5, 1], "sgd"),
    ("mlp", "model axis", (2, 1), "float64", [8, 5, 1], "adamw"),
    ("mlp", "both axes", (2, 1), "float32", [8, 8], "adamw"),
    ("mlp", "both axes", (1, 2), "float32", [8, 8], "sgd"),
    ("gpt", "both axes", (2, 2), "float64", [4, 3, 1], "sgd"),
    ("tied", "both axes", (2, 2), "float64", [4, 3], "adamw"),
]


@pytest.mark.parametrize("training", TRAININGS, ids=lambda t: f"{t[0]}, {t[1]}, {t[2][0]}x{t[2][1]}, {t[3]}, {t[4]}")
def test_replicas_train_as_one_process_on_the_whole_batch(
    pools: Pools, training: tuple[str, str, Shape, str, list[int], str]
) -> None:
    """Gradients, losses, metrics, weights and statistics are those of one process; replicas store the same bits.

    The first step communicates what was planned, and restored weights are the trained ones.
    """
    _, rules, shape, dtype, *_ = training
    ranks = pools(shape[0] * shape[1]).run(train, *training)
    for rank, each in enumerate(ranks):
        assert {key: error for key, error in each.errors.items() if not error <= TOLERANCE[dtype]} == {}
        if rules in ("no rules", "model axis"):
            assert each.stored == ranks[rank % shape[1]].stored
