"""What the backward pass runs again runs as it did at first: under the same plan, with collectives of its own."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.utils.checkpoint

import tp_planner
from tests.dryrun.test_simulation import Measured, measure, metered_training, prepared
from tests.models import CASES
from tests.test_uses import PREFIXED, Written, between, built
from tests.workers import Pools, layout_map
from tp_planner.dryrun.collector import without_collector
from tp_planner.frontend.layer_tree import named_variables

layers, ops = keras.layers, keras.ops
Arrays = dict[str, np.ndarray]
RULES = PREFIXED | {
    "attention/(query|key|value)/kernel": (None, "model", None),
    "attention/(query|key|value)/bias": ("model", None),
    "attention/attention_output/kernel": ("model", None, None),
}


class Residual(layers.Layer):
    """``x + down(up(x))``, where what is added is computed by ``run``."""

    def __init__(self, run: Callable[..., Any], **options: Any) -> None:
        super().__init__(**options)
        self.up, self.down = layers.Dense(8, "relu", name="up"), layers.Dense(6, "tanh", name="down")
        self.run = run

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.up.build(input_shape)
        self.down.build((None, 8))

    def call(self, x: Any) -> Any:
        return x + self.run(self.added, x)

    def added(self, x: Any) -> Any:
        return self.down(self.up(x))


def by_name(function: Callable[..., Any], x: Any) -> Any:
    """Call torch's function as one that was imported by name before anything was planned."""
    if not isinstance(x, torch.Tensor):
        return function(x)
    checkpoint = torch.utils.checkpoint.checkpoint
    plain = checkpoint.__wrapped__ if hasattr(checkpoint, "wrapped_for_good") else checkpoint
    return plain(function, x, use_reentrant=False)


def residuals(run: Callable[..., Any]) -> keras.Model:
    inputs = keras.Input((6,))
    x = layers.Dense(6, name="first")(inputs)
    for index in range(3):
        x = Residual(run, name=f"block_{index}")(x)
    return keras.Model(inputs, x, name="residuals")


def at_once(function: Callable[..., Any], x: Any) -> Any:
    return function(x)


def by_keras(function: Callable[..., Any], x: Any) -> Any:
    return keras.remat(function)(x)


def by_torch(function: Callable[..., Any], x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return function(x)
    return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=True)


class Dropped(layers.Layer):
    """``x + down(dropout(up(x)))``; the code does not say whether it is training, and its masks are drawn anew."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.up, self.down = layers.Dense(8, "relu", name="up"), layers.Dense(6, "tanh", name="down")
        self.dropouts = [layers.Dropout(0.5, seed=3, name="first"), layers.Dropout(0.5, seed=4, name="second")]

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.up.build(input_shape)
        self.down.build((None, 8))

    def call(self, x: Any) -> Any:
        first, second = self.dropouts
        return x + second(self.down(first(self.up(x))))


def dropped() -> keras.Model:
    inputs = keras.Input((6,))
    x = layers.Dense(6, name="first")(inputs)
    for index in range(3):
        x = Dropped(name=f"block_{index}")(x)
    return keras.Model(inputs, x, name="dropped")


def attention() -> keras.Model:
    """A transformer block and all around it, each layer run again inside of the model that is run again."""
    inputs = keras.Input((6,))
    x = layers.Dense(8, name="embed")(layers.Reshape((3, 2))(inputs))
    x += layers.MultiHeadAttention(4, 2, name="attention")(x, x)
    y = layers.LayerNormalization(name="layer_norm")(x)
    x += layers.Dense(8, "tanh", name="down")(layers.Dense(8, "gelu", name="up")(y))
    return keras.Model(inputs, layers.Flatten()(x), name="model")


def in_groups(x: Any, weight: Any) -> Any:
    groups = ops.softmax(ops.reshape(x * weight, (-1, 4, 2)), axis=-1)
    return ops.reshape(groups * groups, (-1, 8))


def normalized(x: Any, weight: Any) -> Any:
    return x * ops.rsqrt(ops.sum(x * x, axis=-1, keepdims=True) + 1) * weight


class HalfAgain(layers.Layer):
    """A norm written by hand, of which the second half is run again: a sum over shards stands in either half."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.weight = self.add_weight(shape=(input_shape[-1],), name="weight")

    def call(self, x: Any) -> Any:
        mean = ops.sum(x * self.weight, axis=-1, keepdims=True) / 8
        return keras.remat(self.half)(x - mean)

    def half(self, x: Any) -> Any:
        return normalized(ops.tanh(x), self.weight)


MODELS: dict[str, Callable[[], keras.Model]] = {
    "model": attention,
    "blocks": lambda: residuals(at_once),
    "sizes in the code": lambda: between(Written(in_groups, name="written")),
    "sums at functions": lambda: between(Written(normalized, name="written")),
}
FUNCTIONS: dict[str, Callable[[], keras.Model]] = {
    "keras.remat": lambda: residuals(by_keras),
    "reentrant": lambda: residuals(by_torch),
    "half of a layer": lambda: between(HalfAgain(name="written")),
}


def in_scope(mode: str, name: str) -> keras.Model:
    with keras.RematScope(mode):
        return MODELS[name]()


# On the ranks


def step(model: keras.Model, plan: tp_planner.Plan | None = None, x: torch.Tensor | None = None) -> Arrays:
    """Return the output and all gradients; the collectives have to be those of the plan."""
    x = torch.as_tensor(np.random.default_rng(0).standard_normal((3, 6))) if x is None else x
    model.zero_grad()
    with tp_planner.record(model) if plan else torch.enable_grad() as recorder:
        output = model(x, training=True)
        output.sum().backward()
    if plan:
        plan.check(recorder.recording)
    gradients = {key: v.value.grad for key, v in named_variables(model).items() if v.trainable}
    found = {"output": output.detach()} | {key: each for key, each in gradients.items() if each is not None}
    return {key: (g.full_tensor() if hasattr(g, "full_tensor") else g).numpy().copy() for key, g in found.items()}


def both_to_the_end(build: str, mode: str) -> tuple[Arrays, Arrays, int]:
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        return both(build, mode)


def both(build: str, mode: str) -> tuple[Arrays, Arrays, int]:
    """Return the step of a single device, that of shards, and how many collectives the backward pass repeats."""
    make = FUNCTIONS[build] if not mode else lambda: in_scope(mode, build)
    models = [built(make) for _ in range(2)]
    plan = tp_planner.plan(models[1], layout_map(RULES), inputs=keras.InputSpec(shape=(3, 6), dtype="float64"))
    tp_planner.parallelize(models[1], plan)
    forward = {(each.layer, each.place) for each in plan.collectives if each.phase == "forward"}
    again = [each for each in plan.collectives if each.phase == "backward" and (each.layer, each.place) in forward]

    return step(models[0]), step(models[1], plan), len(again)


def check(results: list[tuple[Arrays, Arrays, int]], again: bool) -> None:
    for single, sharded, repeated in results:
        assert bool(repeated) == again
        assert single.keys() == sharded.keys()
        for key, value in single.items():
            np.testing.assert_allclose(sharded[key], value, rtol=1e-11, atol=1e-13, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_layers_in_a_remat_scope(pools: Pools, name: str) -> None:
    """Outputs and gradients are those of a single device; sums that are needed again run again, as planned."""
    check(pools(2).run(both, name, "full"), again=name != "sizes in the code")


def test_activations_in_a_remat_scope(pools: Pools) -> None:
    """Only activations run again, which communicate nothing."""
    check(pools(2).run(both, "model", "activations"), again=False)


def test_what_runs_again_to_its_end(pools: Pools) -> None:
    """A row-parallel layer that runs again to its end does what it did: its bias is added after the sum."""
    check(pools(2).run(both_to_the_end, "blocks", "full"), again=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_run_again(pools: Pools, name: str) -> None:
    """A part of a layer's code runs again, and its calls of torch's functions are counted on from where it began."""
    check(pools(2).run(both, name, ""), again=True)


def dropped_in_scope() -> keras.Model:
    with keras.RematScope("full"):
        return dropped()


def dropped_again() -> tuple[Arrays, Arrays]:
    """Return the step of a single device that keeps everything, and that of shards that run again."""
    single, again = built(dropped), built(dropped_in_scope)
    plan = tp_planner.plan(again, layout_map(RULES), inputs=keras.InputSpec(shape=(3, 6), dtype="float64"))
    tp_planner.parallelize(again, plan)
    return step(single), step(again, plan)


def test_what_runs_again_draws_the_same_seeds(pools: Pools) -> None:
    """Dropout has one mask forward and backward, and knows both times that it is training."""
    for single, sharded in pools(2).run(dropped_again):
        assert single.keys() == sharded.keys()
        for key, value in single.items():
            np.testing.assert_allclose(sharded[key], value, rtol=1e-11, atol=1e-13, err_msg=key)


def gradients_in_mixed_precision(recomputed: bool) -> Arrays:
    """Return all gradients of a batch."""
    case = CASES["llama"]
    x, y = case.batch(np.random.default_rng(2), 4)
    model = case.build("mixed_bfloat16", recomputed=recomputed)
    tp_planner.parallelize(model, tp_planner.plan(model, layout_map(case.rules), inputs=x))
    case.make_loss()(torch.as_tensor(y), model(x, training=True)).backward()
    return {key: whole_gradient(v) for key, v in named_variables(model).items() if v.value.grad is not None}


def whole_gradient(variable: keras.Variable) -> np.ndarray:
    gradient = variable.value.grad
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).numpy()


def test_mixed_precision(pools: Pools) -> None:
    """What runs again casts its weights as at first: the gradients are the same numbers."""
    again, kept = (pools(2).run(gradients_in_mixed_precision, recomputed) for recomputed in (True, False))
    for gradients, expected in zip(again, kept, strict=True):
        assert gradients.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(gradients[key], value, err_msg=key)


def refused_by_name() -> str:
    try:
        tp_planner.plan(built(lambda: residuals(by_name)), layout_map(RULES))
    except tp_planner.PlanError as error:
        return str(error)
    return "not refused"


def test_checkpoint_that_was_imported_by_name(pools: Pools) -> None:
    """It is not followed, which the error says; nothing is computed."""
    assert pools(2).run(refused_by_name)[0] == (
        "a training step of model 'residuals' cannot be simulated: ParallelRuntimeError: layer 'up' runs again in the "
        "backward pass, outside 'block_0', where its tensors are sharded; call torch's checkpoint by its full name, "
        "torch.utils.checkpoint.checkpoint, and not by one that was imported from there before the model was planned"
    )


@pytest.mark.slow
def test_a_block_is_let_go_before_the_next_runs_again(pools: Pools) -> None:
    """Also where Python's collector does not run by itself: reference cycles of Keras would keep all of them."""
    for planned, peak in pools(2).run(peak_without_collector):
        assert peak < 1.1 * planned


def peak_without_collector() -> tuple[int, int]:
    """Return the planned and the least measured peak memory of training a Llama of many blocks, in bytes."""
    case = CASES["llama"]
    x, y = case.batch(np.random.default_rng(2), 16)
    model = case.build("float32", recomputed=True, blocks=8)
    model.compile("sgd", case.make_loss(), jit_compile=False)
    plan = tp_planner.plan(model, layout_map(case.rules), inputs=x)
    tp_planner.parallelize(model, plan)
    model.train_on_batch(x, y)
    peaks = []
    for _ in range(3):
        gc.collect()
        with without_collector():
            peaks.append(metered_training(model, x, y).peak.total)
    return plan.step.memory.peak.total, min(peaks)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "mixed_bfloat16"])
def test_memory_of_blocks_that_are_computed_again(pools: Pools, dtype: str) -> None:
    """The simulated step is the real one to the byte, and keeps less than a step that computes nothing again."""
    for each, kept in pools(2).run(measure_again, dtype):
        assert each.same.memory == each.planned.memory
        assert each.planned.memory.largest.activations < kept.step.memory.largest.activations / 4


def measure_again(dtype: str) -> tuple[Measured, tp_planner.Plan]:
    """Return what a step takes that computes again, and the plan of one that keeps all."""
    return measure("llama", dtype, "AdamW", recomputed=True), prepared("llama", dtype, "AdamW")[0]


@pytest.mark.parametrize("on_sequence", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memory_of_layers_inside_of_others_that_are_computed_again(pools: Pools, on_sequence: bool) -> None:
    """A scope has each layer of a model, and the model, run again: what the inner ones are given the outer ones make.

    None of it is kept, neither shards that could be gathered again nor masks that are given by name.
    """
    for each, of_blocks in pools(2).run(measure_all_again, on_sequence):
        assert each.same.memory.peak.total == each.planned.memory.peak.total
        assert each.planned.memory.largest.activations < of_blocks.step.memory.largest.activations


def measure_all_again(on_sequence: bool) -> tuple[Measured, tp_planner.Plan]:
    """Return what a step takes that computes all again, and the plan of one that computes blocks again."""
    found = measure("llama", "float32", "AdamW", on_sequence, recomputed="all")
    return found, prepared("llama", "float32", "AdamW", on_sequence, recomputed=True)[0]


class Attending(layers.Layer):
    """``x + attention(x)``, where the mask comes with x."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.attention = layers.MultiHeadAttention(2, 3, use_bias=False, name="attention")
        self.supports_masking = True

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.attention.build(input_shape, input_shape)

    def call(self, x: Any) -> Any:
        return x + self.attention(x, x)


def masked() -> keras.Model:
    """Return a model of layers inside of others, where a mask comes with what they are given."""
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 6, mask_zero=True, name="tokens")(inputs)
    for index in range(2):
        x = Attending(name=f"block_{index}")(x)
    return keras.Model(inputs, layers.Dense(6, name="first")(x), name="masked")


def masked_in_scope() -> keras.Model:
    with keras.RematScope("full"):
        return masked()


def masked_again() -> tuple[Arrays, Arrays]:
    """Return the step of a single device that keeps everything, and that of shards that run again."""
    single, again = built(masked), built(masked_in_scope)
    rules = {f".*{pattern}": axes for pattern, axes in RULES.items() if pattern.endswith("kernel")}
    plan = tp_planner.plan(again, layout_map(rules), inputs=keras.InputSpec(shape=(3, 5), dtype="int32"))
    tp_planner.parallelize(again, plan)
    tokens = torch.tensor([[3, 5, 1, 0, 0], [2, 0, 0, 0, 0], [6, 1, 4, 4, 2]], dtype=torch.int32)
    return step(single, None, tokens), step(again, plan, tokens)


def test_masks_inside_of_what_runs_again(pools: Pools) -> None:
    """What the outer function makes again for the inner one has the mask that it had."""
    for single, sharded in pools(2).run(masked_again):
        assert single.keys() == sharded.keys()
        for key, value in single.items():
            np.testing.assert_allclose(sharded[key], value, rtol=1e-11, atol=1e-13, err_msg=key)
