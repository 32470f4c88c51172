"""Combinations: what trains as one process alone does so with others: sharing, accumulation, clipping, adapters, ..."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import torch.distributed as dist

import tp_planner
from tests.replicas import LAYOUTS, MODELS, Shape, layout, relative, share, weights
from tests.workers import Pools
from tp_planner.frontend.layer_tree import named_layers, named_variables
from tp_planner.replay import automatic
from tp_planner.storage.variables import local_tensor


@dataclass(frozen=True)
class Combination:
    """What is trained together: a model of the zoo, its layout on a mesh, and how."""

    name: str
    rules: str
    shape: Shape
    sizes: tuple[int, ...] = (8, 5, 1, 7, 8, 3)  # of global batches
    adapted: bool = False  # by LoRA
    frozen: tuple[str, ...] = ()  # layers
    jit_compile: Any = False
    distributed: bool = False  # by Keras
    optimizer: dict[str, Any] = field(default_factory=dict)
    reduction: str = "sum_over_batch_size"
    scaled: bool = False
    stream: bool = False  # sequence-parallel
    trained_before: bool = False  # whether slots have values before there is a plan

    def __str__(self) -> str:
        said = [self.name, self.rules, "x".join(map(str, self.shape)), *map(str, self.optimizer.items())]
        named = ("adapted", "frozen", "jit_compile", "distributed", "scaled", "stream", "trained_before")
        return ", ".join([*said, *(name for name in named if getattr(self, name)), self.reduction])


# On the ranks


def build(case: Combination, seed: int) -> keras.Model:
    model = MODELS[case.name].build("float64", seed=seed)
    adaptable = keras.layers.Dense | keras.layers.EinsumDense | keras.layers.Embedding
    for name, layer in named_layers(model).items():
        if name in case.frozen:
            layer.trainable = False
        elif case.adapted and isinstance(layer, adaptable) and layer.built and not layer.lora_enabled:
            layer.enable_lora(2)
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if "lora" in variable.path:
            variable.assign(0.3 * rng.standard_normal(variable.shape))
    return model


def compiled(case: Combination, model: keras.Model) -> keras.Model:
    optimizer: Any = keras.optimizers.AdamW(0.01, weight_decay=0.1, epsilon=1e-3, **case.optimizer)
    if case.scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**10)
    loss = MODELS[case.name].make_loss("float64")
    loss.reduction = case.reduction
    model.compile(optimizer, loss, jit_compile=case.jit_compile)
    if case.trained_before:
        optimizer.build(model.trainable_variables)
        rng = np.random.default_rng(3)
        for slot in optimizer.variables:
            if slot.shape:
                slot.assign(0.1 + rng.random(slot.shape))
    return model


def trained(case: Combination) -> tuple[dict[str, float], dict[str, bytes]]:
    """Return how far replicas are from one process on the whole batches, and what this rank stores in the end."""
    rng = np.random.default_rng(1)
    batches = [MODELS[case.name].batch(rng, size) for size in case.sizes]
    replica, replicas = dist.get_rank() // case.shape[1], case.shape[0]
    shares = [(share(x, replica, replicas), share(y, replica, replicas)) for x, y in batches]
    alone = compiled(replace(case, jit_compile=False), build(case, 0))
    expected = [alone.train_on_batch(x, y) for x, y in batches]
    given = layout(case.name, case.rules, case.shape)
    given = replace(given, sequence_parallel=case.stream)
    with mock.patch.object(automatic, "PATIENCE", 1):
        if case.distributed:
            tp_planner.enable_keras_distribution()
            try:
                with distribution_of(case).scope():
                    model = compiled(case, build(case, 0))
                    found = [model.train_on_batch(x, y) for x, y in batches]
                    return compare(alone, expected, model, found)
            finally:
                tp_planner.disable_keras_distribution()
        model = compiled(case, build(case, dist.get_rank()))
        check = None if "gradient_accumulation_steps" in case.optimizer else "first_step"
        tp_planner.parallelize(model, given, shares[0][0], check=check, batch_axis="batch")
        model.compile(model.optimizer, model.loss, jit_compile=case.jit_compile)  # which is noted from now on
        found = [model.train_on_batch(x, y) for x, y in shares]
        return compare(alone, expected, model, found)


def distribution_of(case: Combination) -> Any:
    devices = [f"cpu:{rank}" for rank in range(dist.get_world_size())]
    layout_map = keras.distribution.LayoutMap(keras.distribution.DeviceMesh(case.shape, ("batch", "model"), devices))
    rules, *options = case.rules.split(", ")
    for pattern, axes in LAYOUTS[rules](case.name).items():
        layout_map[pattern] = axes
    layout_map.zero = next((int(each[-1]) for each in options if each.startswith("zero")), 0)
    return keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")


def compare(alone: Any, expected: Any, model: Any, found: Any) -> tuple[dict[str, float], dict[str, bytes]]:
    end, own_end = weights(alone), weights(model)
    errors = {key: relative(own_end[key], end[key]) for key in end}
    errors["losses"] = relative(np.array(found), np.array(expected)) * 1e-7  # Keras adds them in float32
    stored = {key: local_tensor(each).numpy().tobytes() for key, each in named_variables(model).items()}
    return errors, stored


# In the parent

ACCUMULATED, CLIPPED, EACH_CLIPPED = (
    {"gradient_accumulation_steps": 2},
    {"global_clipnorm": 0.1},
    {"clipnorm": 0.05},
)
BOTH, AVERAGED = ACCUMULATED | CLIPPED, {"use_ema": True}
ADAPTED = 5e-6  # adapters are of float32, whatever the model is

USUAL = [
    Combination("recomputed", "model axis, zero 3", (2, 2), distributed=True, optimizer=EACH_CLIPPED),
    Combination("handwritten", "model axis", (2, 2), distributed=True, trained_before=True),
]
MORE = [
    Combination("stacked", "no rules, zero 1", (4, 1), optimizer=BOTH),
    Combination("stacked", "model axis, zero 1", (2, 2), optimizer=BOTH, jit_compile="auto", reduction="sum"),
    Combination("stacked", "no rules, zero 1", (4, 1), scaled=True, jit_compile="auto", optimizer=CLIPPED),
    Combination("gpt", "model axis, zero 1", (2, 2), optimizer=CLIPPED | AVERAGED, jit_compile="auto"),
    Combination("gpt", "model axis, zero 1", (2, 2), stream=True, optimizer=BOTH),
    Combination("gpt", "model axis, zero 3, 2 ahead", (2, 2), stream=True, optimizer=CLIPPED),
    Combination("gpt", "model axis, zero 1", (2, 2), distributed=True, jit_compile="auto", optimizer=CLIPPED),
    Combination("gpt", "model axis, zero 3", (2, 2), distributed=True, trained_before=True),
    Combination("tied", "model axis, zero 3", (4, 1), adapted=True, optimizer=BOTH),
    Combination("tied", "model axis, zero 3", (2, 2), distributed=True, adapted=True),
    Combination("tied", "model axis, zero 1", (2, 2), adapted=True, jit_compile=True),
    Combination("recomputed", "model axis, zero 3, 2 ahead", (4, 1), optimizer=EACH_CLIPPED | ACCUMULATED),
    Combination("llama", "KerasHub's, 2 ahead", (2, 2), optimizer=CLIPPED, jit_compile="auto"),
    Combination("llama", "KerasHub's, zero 1", (2, 2), distributed=True, optimizer=BOTH, jit_compile="auto"),
    Combination("gemma", "KerasHub's", (2, 2), distributed=True, adapted=True, jit_compile="auto"),
    Combination("handwritten", "model axis, zero 3", (2, 2), trained_before=True, optimizer=AVERAGED),
    Combination("stacked", "stacked, zero 1", (2, 2), trained_before=True, optimizer=ACCUMULATED | AVERAGED),
    Combination("stacked", "stacked, 2 ahead", (4, 1), frozen=("block_2", "head"), jit_compile="auto", optimizer=BOTH),
    Combination("entangled", "stacked, zero 1", (2, 2), adapted=True, jit_compile="auto", optimizer=AVERAGED),
    Combination("normalized", "model axis, zero 3, 2 ahead", (2, 2), jit_compile="auto", optimizer=ACCUMULATED),
    # Flat models: what is planned over the batch axis runs, in number and bytes; the first step is compared.
    Combination("gpt", "model axis, zero 3", (4, 1)),
    Combination("encoder", "no rules, zero 3", (2, 2)),
    Combination("gpt", "both axes", (4, 1), jit_compile="auto"),
    Combination("encoder", "both axes on one dim", (4, 1)),
]


@pytest.mark.parametrize("case", [*USUAL, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)], ids=str)
def test_what_is_trained_together(pools: Pools, case: Combination) -> None:
    """Losses, and weights after uneven batches, are those of one process; replicas store the same bits."""
    ranks = pools(4).run(trained, case)
    limit = ADAPTED if case.adapted else 1e-12
    for rank, (errors, stored) in enumerate(ranks):
        assert {key: error for key, error in errors.items() if not error <= limit} == {}
        if case.rules in ("no rules, zero 1", "model axis", "model axis, zero 1"):
            assert stored == ranks[rank % case.shape[1]][1]
