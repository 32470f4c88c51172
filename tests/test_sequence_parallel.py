"""With the residual stream sharded over the sequence a model is the same function, and sends what its plan says.

Trained as in ``test_parity``, and recorded as in ``regions/test_collectives``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import tp_planner
from tests.families import FAMILIES
from tests.models import CASES, building, randomize
from tests.regions.test_collectives import Ran, Recorder, Step, forward, mismatch
from tests.test_parity import (
    BATCH_SIZE,
    STEPS,
    TOLERANCE,
    Record,
    Trained,
    begin,
    differences,
    gradient_differences,
    make_batches,
    train,
)
from tests.test_parity import _replicas as bits_of_replicas
from tests.test_parity import _train_alone as train_alone
from tests.workers import Pools, layout_map
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.planner import make_plan
from tp_planner.training.model import applied_to

MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
}
REST: dict[str, tuple[str, Mapping[str, Any]]] = {
    "gpt with dropout": ("gpt", {"dropout": 0.2}),
    **{name: (name, {}) for name in CASES if name != "llama"},
    "llama with tied embeddings and one head for keys": ("llama", {"tied": True, "kv_heads": 1}),
    "llama with blocks that are computed again": ("llama", {"recomputed": True}),
    "handwritten with two heads for keys": ("handwritten", {"kv_heads": 2}),
    "gpt with uneven dims": ("gpt", {"vocabulary": 65, "hidden": 63}),
}


# On the ranks


def train_both(name: str, sizes: Mapping[str, Any], dtype: str) -> tuple[Trained, Step]:
    """Train alone on rank 0, and sharded; return that, and the collectives of one more step."""
    case = CASES[name]
    batches = make_batches(case)
    single = train_alone(case, sizes, dtype, batches) if dist.get_rank() == 0 else None
    model = case.build(dtype, seed=dist.get_rank(), **sizes)
    plan = tp_planner.plan(
        model,
        layout_map(case.rules),
        batches[0][0],
        optimizer=keras.optimizers.AdamW(),
        loss=case.make_loss(dtype),
        sequence_parallel=True,
    )
    tp_planner.parallelize(model, plan)
    record = begin(model, case, dtype, batches[0])
    train(model, case, dtype, batches[:STEPS], record)
    replicas = bits_of_replicas(model)
    with Recorder() as recorder:
        model.train_on_batch(*batches[STEPS])
    with Recorder() as prediction:
        model.predict_on_batch(batches[0][0])
    planned = [Ran(each.kind, each.bytes, each.group_size, each.phase) for each in plan.collectives]
    predicted = prediction.ran
    if any(each.into_loss for each in plan.layers):  # which takes two small all-reduces in place of a gather
        assert predicted[-1].kind == "all_gather"
        predicted = [*predicted[:-1], *forward(planned)[-2:]]
    return Trained(single, record, replicas, []), Step(planned, recorder.ran, predicted)


# In the parent


def assert_same_function(pools: Pools, size: int, name: str, sizes: Mapping[str, Any], dtype: str) -> None:
    ranks = pools(size).run(train_both, name, sizes, dtype)
    single = ranks[0][0].single
    assert isinstance(single, Record)
    for trained, step in ranks:
        assert differences(trained.sharded.outputs, single.outputs, TOLERANCE[dtype]) == {}
        assert gradient_differences(trained.sharded, single, TOLERANCE[dtype]) == {}
        assert differences(trained.sharded.weights, single.weights, TOLERANCE[dtype]) == {}
        assert trained.replicas == ranks[0][0].replicas
        assert mismatch(step.planned, step.step) == ({}, {})
        assert forward(step.step) == forward(step.planned) == step.prediction


@pytest.mark.parametrize("model", MODELS)
def test_same_function(pools: Pools, model: str) -> None:
    """Outputs, every gradient, weights after five steps; replicas bit by bit; the collectives are those of the plan."""
    assert_same_function(pools, 2, *MODELS[model], "float64")


@pytest.mark.slow
@pytest.mark.parametrize("model", {**MODELS, **REST})
@pytest.mark.parametrize("size", [2, 4])
def test_same_function_of_the_zoo(pools: Pools, model: str, size: int) -> None:
    assert_same_function(pools, size, *{**MODELS, **REST}[model], "float64")


# Other ways of use


def run_on_other_lengths(lengths: list[int]) -> list[tuple[float, dict[str, float]]]:
    """Call KerasHub's Llama on sequences of these lengths; return how far outputs and gradients are off."""

    def build(seed: int) -> keras.Model:
        with building("float32"):
            backbone = keras_hub.models.LlamaBackbone(
                64, 2, 4, 32, 64, 2, tie_word_embeddings=True, name="llama_backbone"
            )
            return randomize(backbone, seed)

    single, sharded = build(0), build(dist.get_rank())
    inputs = {name: keras.InputSpec(shape=(2, 16), dtype="int32") for name in ("token_ids", "padding_mask")}
    rules = {**CASES["llama"].rules}
    tp_planner.parallelize(sharded, layout_map(rules), inputs, sequence_parallel=True)
    found = []
    for length in lengths:
        tokens = np.random.default_rng(length).integers(0, 64, (2, length)).astype("int32")
        x = {"token_ids": torch.as_tensor(tokens), "padding_mask": torch.ones(2, length, dtype=torch.int32)}
        outputs, gradients = [], []
        for model in (single, sharded):
            model.zero_grad()
            output = model(x, training=True)
            (output**2).mean().backward()
            outputs.append(_array(output))
            gradients.append({key: _array(v._value.grad) for key, v in named_variables(model).items() if v.trainable})
        scale = max(float(np.abs(each).max()) for each in gradients[0].values())
        errors = {key: float(np.abs(gradients[1][key] - gradients[0][key]).max()) / scale for key in gradients[0]}
        found.append((float(np.abs(outputs[1] - outputs[0]).max() / np.abs(outputs[0]).max()), errors))
    return found


def _array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().numpy().copy()


def gradients_in_other_ways() -> dict[str, dict[str, float]]:
    """Return how far gradients are off that are asked for by name, that add up, and those with a regularizer."""
    case = CASES["gpt"]
    models = [case.build("float64") for _ in range(2)]
    x, y = case.batch(np.random.default_rng(0), BATCH_SIZE)
    tp_planner.parallelize(models[1], layout_map(case.rules), x, sequence_parallel=True)
    ways: dict[str, list[dict[str, np.ndarray]]] = {"by name": [], "added up": [], "read outside": []}
    for model in models:
        variables = {key: v for key, v in named_variables(model).items() if v.trainable}
        parameters = [v._value for v in variables.values()]

        def loss(model: keras.Model = model) -> torch.Tensor:
            return case.make_loss("float64")(y, model(torch.as_tensor(x), training=True))

        asked = torch.autograd.grad(loss(), parameters)
        ways["by name"].append(dict(zip(variables, map(_array, asked), strict=True)))
        for _ in range(2):
            loss().backward()
        ways["added up"].append({key: _array(v._value.grad) for key, v in variables.items()})
        model.zero_grad()
        norms = [v for key, v in variables.items() if "norm" in key]
        (loss() + sum((v.value**2).sum() for v in norms)).backward()
        ways["read outside"].append({key: _array(v._value.grad) for key, v in variables.items()})
        model.zero_grad()
    return {way: differences(found, expected, 1e-10) for way, (expected, found) in ways.items()}


def test_lengths_that_do_not_divide(pools: Pools) -> None:
    """A length that divides, others that do not, and one token: outputs and gradients are those of one device."""
    for each in pools(2).run(run_on_other_lengths, [16, 15, 24, 1, 16]):
        assert [error for error, _ in each if error > 1e-5] == []
        assert [{key: value for key, value in gradients.items() if value > 1e-5} for _, gradients in each] == [{}] * 5


def test_gradients_in_other_ways(pools: Pools) -> None:
    """``torch.autograd.grad``, two passes without ``zero_grad``, and a loss that reads weights itself."""
    for each in pools(2).run(gradients_in_other_ways):
        assert {way: {k: v for k, v in off.items() if "key/bias" not in k} for way, off in each.items()} == {
            "by name": {},
            "added up": {},
            "read outside": {},
        }


def train_replicas() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Any]:
    """Train a GPT alone, and as two replicas of two ranks; return both weights, and how collectives differ."""
    case = CASES["gpt"]
    batches = [case.batch(np.random.default_rng(seed), 8) for seed in range(3)]
    mesh = Mesh((("batch", 2), ("model", 2)))
    layout = Layout(
        mesh, tuple(LayoutRule(pattern, axes) for pattern, axes in case.rules.items()), sequence_parallel=True
    )
    single, sharded = case.build("float64"), case.build("float64", seed=dist.get_rank())
    plan = tp_planner.plan(
        sharded, layout, batches[0][0][:4], optimizer=keras.optimizers.AdamW(), loss=case.make_loss("float64")
    )
    tp_planner.parallelize(sharded, plan)
    place = dist.get_rank() // 2
    for model, rows in ((single, slice(None)), (sharded, slice(4 * place, 4 * place + 4))):
        model.compile(keras.optimizers.AdamW(0.01, epsilon=1e-3), case.make_loss("float64"), jit_compile=False)
        for x, y in batches:
            with Recorder() as recorder:
                model.train_on_batch(x[rows], y[rows])
    planned = [Ran(each.kind, each.bytes, each.group_size, each.phase) for each in plan.collectives]
    weights = [{key: _array(v._value) for key, v in named_variables(m).items()} for m in (single, sharded)]
    return weights[0], weights[1], mismatch(planned, recorder.ran)


def test_replicas(pools: Pools) -> None:
    """On a mesh of 2 x 2 summands are added over the model axis before replicas average what they come to."""
    for single, sharded, (missing, _) in pools(4).run(train_replicas):
        assert differences(sharded, single, 1e-10) == {}
        assert missing == {}


def train_under_keras_distribution() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], bool]:
    """Fit a GPT alone on all ranks, and under keras.distribution with the stream sharded."""
    case = CASES["gpt"]
    x, y = case.batch(np.random.default_rng(0), 8)
    single = case.build("float32")
    single.compile(keras.optimizers.AdamW(0.01, epsilon=1e-3), case.make_loss(), jit_compile=False)
    single.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    tp_planner.enable_keras_distribution()
    try:
        layouts = layout_map(case.rules)
        layouts.sequence_parallel = True
        keras.distribution.set_distribution(
            keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
        )
        model = case.build("float32")
        model.compile(keras.optimizers.AdamW(0.01, epsilon=1e-3), case.make_loss(), jit_compile=False)
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        applied = applied_to(model)
        assert applied is not None
        weights = [{key: _array(v._value) for key, v in named_variables(m).items()} for m in (single, model)]
        return weights[0], weights[1], applied.plan.shards_stream
    finally:
        keras.distribution.set_distribution(None)
        tp_planner.disable_keras_distribution()


def test_under_keras_distribution(pools: Pools) -> None:
    """The layout map's attribute says it where Keras has no argument."""
    for single, sharded, on_stream in pools(2).run(train_under_keras_distribution):
        assert on_stream
        assert differences(sharded, single, 1e-4) == {}


def replayed() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Any]:
    """Train by programs of calls; return the weights of both, and the collectives planned and run."""
    case = CASES["gpt"]
    batches = [case.batch(np.random.default_rng(seed), 4) for seed in range(4)]
    single, sharded = (case.build("float32") for _ in range(2))
    plan = tp_planner.plan(
        sharded, layout_map(case.rules), batches[0][0], optimizer="adamw", loss=case.make_loss(), sequence_parallel=True
    )
    tp_planner.parallelize(sharded, plan)
    for model in (single, sharded):
        model.compile(keras.optimizers.AdamW(0.01, epsilon=1e-3), case.make_loss(), jit_compile=model is sharded)
        for x, y in batches:
            with Recorder() as recorder:
                model.train_on_batch(x, y)
    planned = [Ran(each.kind, each.bytes, each.group_size, each.phase) for each in plan.collectives]
    weights = [{key: _array(v._value) for key, v in named_variables(m).items()} for m in (single, sharded)]
    return weights[0], weights[1], mismatch(planned, recorder.ran)


def test_replayed_calls(pools: Pools) -> None:
    """With jit_compile=True programs gather again in the backward pass, too."""
    for single, sharded, off in pools(2).run(replayed):
        assert differences(sharded, single, 1e-4) == {}
        assert off == ({}, {})


def test_what_cannot_follow_takes_the_stream_gathered() -> None:
    """Experts run on whole tokens, as their router does, and the attention between them on shards of the sequence."""
    family = FAMILIES["mixtral"]
    layout = replace(family.layout(2), sequence_parallel=True)
    plan = make_plan(family.build(), layout, family.batch(np.random.default_rng(0), 2)[0])
    assert plan.shards_stream
    layers = {each.path.rpartition("/")[2]: each for each in plan.layers if "transformer_layer_1" in each.path}
    (_, entering), *_ = layers["query"].inputs
    leaving = layers["attention_output"].output
    ((_, taken),) = layers["mixtral_sparse_moe_block_1"].inputs
    assert (entering.forward.collective, entering.backward.collective) == ("all_gather", "reduce_scatter")
    assert leaving is not None
    assert (leaving.forward.collective, leaving.backward.collective) == ("reduce_scatter", "all_gather")
    assert (taken.forward.collective, taken.backward.collective) == ("all_gather", None)  # experts sum the gradient


def join_sequences() -> float:
    """Return how far the output is off of two sequences that a model joins, each left in shards by a layer."""

    def build(seed: int) -> keras.Model:
        with building("float64"):
            inputs = [keras.Input((length, 8), name=name) for name, length in (("image", 4), ("text", 6))]
            ends = []
            for given in inputs:
                hidden = keras.layers.Dense(16, activation="relu", name=f"{given.name}_up")(given)
                ends.append(keras.layers.Dense(8, name=f"{given.name}_down")(hidden))
            joined = keras.layers.Concatenate(axis=1)(ends)
            return randomize(keras.Model(inputs, keras.layers.LayerNormalization()(joined) * joined), seed)

    rules = {".*_up/kernel": (None, "model"), ".*_up/bias": ("model",), ".*_down/kernel": ("model", None)}
    single, sharded = build(0), build(dist.get_rank())
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((2, length, 8)) for length in (4, 6)]
    tp_planner.parallelize(sharded, layout_map(rules), x, sequence_parallel=True)
    applied = applied_to(sharded)
    assert applied is not None
    assert applied.plan.shards_stream
    expected, found = (_array(model(x)) for model in (single, sharded))
    return float(np.max(np.abs(found - expected)))


def test_sequences_that_are_joined(pools: Pools) -> None:
    """They are gathered first: each rank's shards of one and of the other are no shard of both."""
    assert max(pools(2).run(join_sequences)) < 1e-12
