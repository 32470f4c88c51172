"""Replicas of the zoo's models: layouts on meshes of two axes, shares of a batch, and what ranks are compared by."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import keras
import keras_hub
import numpy as np
import torch

from tests.models import CASES, Batch, Case, building, randomize
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.frontend.layout_map import read_zero
from tp_planner.ir.layout import AxisSpec, Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.placement import chunk_sizes

Axes = tuple[AxisSpec, ...]
Rules = Mapping[str, Axes]
Shape = tuple[int, int]  # sizes of the mesh's axes "batch" and "model"


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

# A model whose blocks read parts of every kind


class StackedBlock(keras.layers.Layer):
    """Two dense layers, whose dims do not divide by four, and a norm; ``common`` is a layer of other blocks too."""

    def __init__(self, common: keras.layers.Layer, holds: bool, **options: Any) -> None:
        super().__init__(**options)
        self.norm = keras.layers.LayerNormalization(epsilon=1e-3, name="norm")
        self.up = keras.layers.Dense(14, "tanh", name="up")
        self.down = keras.layers.Dense(10, name="down")
        self.common = common if holds else None

    def build(self, shape: Shape) -> None:
        self.norm.build(shape)
        self.up.build(shape)
        self.down.build((*shape[:-1], 14))

    def call(self, x: Any) -> Any:
        x = x + self.down(self.up(self.norm(x)))
        return x if self.common is None else self.common(x)


def stacked(dtype: str = "float32", *, seed: int = 0, holds: bool = False) -> keras.Model:
    """Four blocks, of which one is frozen in part, and a layer used between them, or inside of each of them."""
    with building(dtype):
        common = keras.layers.Dense(10, name="common")
        inputs = x = keras.Input((10,), name="x")
        blocks = [StackedBlock(common, holds, name=f"block_{number}") for number in range(4)]
        for block in blocks:
            x = block(x) if holds else common(block(x))
        model = randomize(keras.Model(inputs, keras.layers.Dense(8, name="head")(x), name="stacked"), seed)
        blocks[1].down.trainable = False
        return model


def stacked_batch(rng: np.random.Generator, size: int) -> Batch:
    return rng.standard_normal((size, 10)).astype("float32"), rng.standard_normal((size, 8)).astype("float32")


STACKED_RULES: dict[str, Axes] = {
    "block_./norm/(gamma|beta)": ("batch",),
    "block_./up/kernel": ("batch", "model"),
    "block_./up/bias": (("model", "batch"),),
    "block_./down/kernel": ("model", "batch"),
    "(block_./)?common/kernel": (None, "batch"),
    "head/kernel": (None, "batch"),
    "head/bias": ("batch",),
}
MODELS = CASES | {
    "recomputed": replace(CASES["llama"], build=partial(CASES["llama"].build, recomputed=True)),
    "stacked": Case("stacked", stacked, stacked_batch, "MeanSquaredError", {}, None),
    "entangled": Case("entangled", partial(stacked, holds=True), stacked_batch, "MeanSquaredError", {}, None),
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


def random_rules(name: str, seed: int) -> Rules:
    """Return rules that shard random dims of two thirds of the variables over either axis, or both, without sense."""
    rng, rules = random.Random(seed), {}
    for variable in MODELS[name].build().variables:
        if rng.random() < 0.67:
            axes: list[AxisSpec] = [None] * len(variable.shape)
            for dim in rng.sample(range(len(axes)), min(len(axes), rng.choice([1, 2]))):
                free = [axis for axis in ("batch", "model") if axis not in axes]
                axes[dim] = rng.choice([*free, ("batch", "model")] if len(free) == 2 else free or [None])
                if isinstance(axes[dim], tuple):
                    break
            rules[re.escape(variable.path)] = tuple(axes)
    return rules


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
    "stacked": lambda name: STACKED_RULES,
    **{f"random {seed}": partial(random_rules, seed=seed) for seed in range(8)},
}


def layout(name: str, rules: str, shape: Shape) -> Layout:
    """Return a layout by the name of its rules, behind which may be ", 2 ahead" for early gathers, ", zero 1"."""
    rules, *options = rules.split(", ")
    said = {word: int(number) for option in options for word, number in [sorted(option.split(), reverse=True)]}
    mesh = Mesh((("batch", shape[0]), ("model", shape[1])))
    made = tuple(LayoutRule(pattern, axes) for pattern, axes in LAYOUTS[rules](name).items())
    return Layout(mesh, made, gathers_ahead=said.get("ahead", 1), zero=read_zero(said.get("zero", 0)))


# On the ranks


def share(tree: Any, replica: int, replicas: int) -> Any:
    """Return the replica's share of each array: a run of rows."""

    def rows(array: np.ndarray) -> np.ndarray:
        sizes = chunk_sizes(len(array), replicas)
        return array[sum(sizes[:replica]) : sum(sizes[: replica + 1])]

    return keras.tree.map_structure(rows, tree)


def whole(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().numpy().copy()


def weights(model: keras.Model) -> dict[str, np.ndarray]:
    return {key: whole(variable._value) for key, variable in named_variables(model).items()}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max(initial=0.0) / max(np.abs(expected).max(initial=0.0), 1e-30))
