"""Automatic: by Keras's default, calls of models whose code is Keras's are replayed, and do what eager code does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
from keras_hub.src.models.llama.llama_layernorm import LlamaLayerNorm

import tp_planner
from tests.families import FAMILIES
from tests.keras_distribution.test_model_parallel import model_parallel
from tests.layers.test_generation import prompts
from tests.models import randomize
from tests.workers import Pools, WorkerPool, layout_map
from tp_planner.frontend.layer_tree import named_layers
from tp_planner.replay import automatic, replay
from tp_planner.replay.automatic import foreign_code
from tp_planner.training.compiling import is_left_open

layers = keras.layers
RULES = {"(.*/)?up/kernel": (None, "model"), "(.*/)?up/bias": ("model",), "(.*/)?down/kernel": ("model", None)}


def library_model(*others: keras.Layer) -> keras.Model:
    inputs = keras.Input((16,), name="inputs")
    x = layers.Dense(32, "relu", name="up")(inputs)
    x = layers.Dense(16, name="down")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Dropout(0.1, seed=3, name="drop")(x)
    for each in others:
        x = each(x)
    return randomize(keras.Model(inputs, layers.Dense(8, name="head")(x), name="model"))


# On the ranks


@contextmanager
def counted() -> Iterator[list[int]]:
    """Inside, calls of the layer "head" on values are counted: those that a program does not make."""
    plain, count = layers.Dense.call, [0]

    @functools.wraps(plain)
    def call(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += self.name == "head" and type(x) is torch.Tensor and not x.is_meta
        return plain(self, x, *args, **kwargs)

    with mock.patch.object(layers.Dense, "call", call):
        yield count


def used(model: keras.Model, **options: Any) -> tuple[list[int], dict[str, np.ndarray]]:
    """Compile a parallel model and use it in all ways, changed now and then; return how often code ran, and results."""
    rng, counts, results = np.random.default_rng(5), [], {}
    x, y = rng.standard_normal((8, 16)).astype("float32"), rng.standard_normal((8, 8)).astype("float32")
    model.compile(keras.optimizers.SGD(0.01), "mse", **options)

    def train(steps: int) -> list[float]:
        return [float(model.train_on_batch(x, y)) for _ in range(steps)]

    with counted() as count:

        def note(name: str, result: Any) -> None:
            counts.append(count[0])
            count[0], results[name] = 0, np.asarray(result)

        note("losses", train(6))
        model.get_layer("norm").trainable = False
        note("losses with a layer that infers", train(6))
        model.get_layer("drop").rate = 0.5
        note("losses where more is dropped", train(6))
        hook = model.get_layer("head").register_forward_hook(lambda layer, args, output: 2 * output)
        note("losses with a hook", train(3))
        hook.remove()
        note("losses without the hook", train(2))
        note("another size", [float(model.train_on_batch(x[:4], y[:4])) for _ in range(5)])
        note("predictions", model.predict(np.tile(x, (5, 1)), batch_size=8, verbose=0))
        note("evaluation", model.evaluate(np.tile(x, (2, 1)), np.tile(y, (2, 1)), batch_size=8, verbose=0))
        model.run_eagerly = True
        note("eager losses", train(2))
        model.run_eagerly = False
    return counts, results | {each.path: keras.ops.convert_to_numpy(each) for each in model.variables}


def eagerly_and_by_default(way: str) -> tuple[list[int], list[int], dict[str, float]]:
    """Return how often code ran, eagerly and by default, and which results differ by how much."""
    with mock.patch.object(automatic, "PATIENCE", 1):
        eager, default = (_used_as(way, options) for options in ({"jit_compile": False}, {}))
    errors = {key: float(np.abs(default[1][key] - value).max()) for key, value in eager[1].items()}
    return eager[0], default[0], {key: error for key, error in errors.items() if error != 0}


def _used_as(way: str, options: dict[str, Any]) -> tuple[list[int], dict[str, np.ndarray]]:
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    if way == "parallelize":
        model = library_model()
        tp_planner.parallelize(model, layout_map(RULES))
        return used(model, **options)
    with model_parallel(RULES):
        return used(library_model(), **options)


def in_two_dtypes(jit_compile: Any) -> tuple[int, dict[str, np.ndarray]]:
    """Return how often code ran in a model of mixed precision with a head in float32, and what it trained to."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    inputs = keras.Input((16,), name="inputs")
    x = layers.Dense(32, "relu", name="up", dtype="mixed_bfloat16")(inputs)
    x = layers.Dense(16, name="down", dtype="mixed_bfloat16")(x)
    x = LlamaLayerNorm(name="norm", dtype="mixed_bfloat16")(x)  # it multiplies by a variable as such
    x = layers.LayerNormalization(name="wide_norm", dtype="float32")(x)
    model = randomize(keras.Model(inputs, layers.Dense(8, name="head", dtype="float32")(x), name="model"))
    model.dtype_policy = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=jit_compile)
    tp_planner.parallelize(model, layout_map(RULES | {"head/kernel": (None, "model"), "head/bias": ("model",)}))
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((8, 16)).astype("float32"), rng.standard_normal((8, 8)).astype("float32")
    with mock.patch.object(automatic, "PATIENCE", 1), counted() as count:
        losses = [float(model.train_on_batch(x, y)) for _ in range(6)]
    found = {each.path: keras.ops.convert_to_numpy(each) for each in model.variables}
    return count[0], found | {"losses": np.asarray(losses)}


def grown() -> list[np.ndarray]:
    """Return what a Sequential makes before and after it has got another layer, eagerly and by default."""
    x, made = np.random.default_rng(5).standard_normal((8, 16)).astype("float32"), []
    for options in ({"jit_compile": False}, {}):
        keras.utils.set_random_seed(1)
        stack = [layers.Dense(32, "relu", name="up"), layers.Dense(16, name="down")]
        model = keras.Sequential([keras.Input((16,)), *stack])
        tp_planner.parallelize(model, layout_map(RULES))
        model.compile("sgd", "mse", **options)
        with mock.patch.object(automatic, "PATIENCE", 1):
            for _ in range(4):
                before = model.predict_on_batch(x)
            model.add(layers.Activation("tanh"))
            made += [before, model.predict_on_batch(x)]
    return made


def left_open() -> list[bool]:
    """Return of two models, compiled by default and to run as they are written, whether that is left open."""
    models = [library_model(), library_model()]
    for model, options in zip(models, ({}, {"jit_compile": False}), strict=True):
        tp_planner.parallelize(model, layout_map(RULES))
        model.compile("sgd", "mse", **options)
    return list(map(is_left_open, models))


def generated_by_default() -> tuple[bool, int]:
    """Return whether replayed tokens are those of eager code, and how many programs were written."""
    model = FAMILIES["gpt2"].build()
    tp_planner.parallelize(model, FAMILIES["gpt2"].layout(dist.get_world_size()), inputs=prompts())
    tokens = []
    with mock.patch.object(automatic, "PATIENCE", 1), mock.patch.object(replay, "State") as state:
        state.return_value.is_set_aside.return_value = state.return_value.is_another.return_value = False
        for options in ({"jit_compile": False}, {}):
            model.compile(sampler="greedy", **options)
            for _ in range(4):
                tokens.append(model.generate(prompts(), stop_token_ids=None)["token_ids"])
    return all(np.array_equal(each, tokens[0]) for each in tokens), state.call_count


# In the parent


@pytest.mark.parametrize("way", [pytest.param("parallelize", marks=pytest.mark.slow), "distribution"])
def test_default_does_what_eager_code_does(pools: Pools, way: str) -> None:
    """Results are the same to the bit, whatever is changed in between; what was not changed is replayed."""
    for eager, default, errors in pools(2).run(eagerly_and_by_default, way):
        assert errors == {}
        assert eager == [6, 6, 6, 3, 2, 5, 5, 2, 2]
        assert default == [3, 4, 4, 3, 0, 3, 3, 0, 2]


def test_a_layer_that_is_added_is_called(pools: Pools) -> None:
    for before, after, *by_default in pools(2).run(grown):
        assert np.abs(after - before).max() > 0.01
        np.testing.assert_equal(by_default, [before, after])


def test_the_first_model_of_a_process_is_replayed_too() -> None:
    pool = WorkerPool(2)
    try:
        assert pool.run(left_open) == [[True, False]] * 2
    finally:
        pool.stop()


@pytest.mark.slow
def test_tokens_by_default(pools: Pools) -> None:
    for same, looked in pools(2).run(generated_by_default):
        assert same
        assert looked == 1


class Own(layers.Layer):
    def call(self, x: Any) -> Any:
        return x


class OwnStep(keras.Model):
    def train_step(self, data: Any) -> Any:
        return super().train_step(data)


def own_activation(x: Any) -> Any:
    return x


class OwnGraph(keras.Model):
    def call(self, x: Any) -> Any:
        return x


OwnGraph.__module__ = keras.Model.__module__  # as a library's


def hooked() -> keras.Model:
    model = library_model()
    model.get_layer("up").register_forward_pre_hook(lambda *_: None)
    return model


def patched() -> keras.Model:
    model = library_model()
    model.get_layer("up").call = lambda x: x
    return model


def stepping() -> keras.Model:
    model = library_model()
    return OwnStep(model.inputs, model.outputs, name="model")


MODELS: dict[str, tuple[Callable[[], keras.Model], str]] = {
    "library": (library_model, ""),
    "a step": (stepping, ""),
    "graph": (lambda: library_model(OwnGraph(name="own")), "model 'own' is called by code of its own"),
    "layer": (lambda: library_model(Own(name="own")), "layer 'own' has code of Own"),
    "activation": (
        lambda: library_model(layers.Dense(16, own_activation, name="own")),
        "layer 'own' has 'activation', which is not Keras's",
    ),
    "lambda": (
        lambda: library_model(layers.Lambda(lambda x: x, name="own")),
        "layer 'own' has 'function', which is not Keras's",
    ),
    "torch": (
        lambda: library_model(layers.TorchModuleWrapper(torch.nn.Identity(), output_shape=(None, 16), name="own")),
        "layer 'own' runs a torch module",
    ),
    "hook": (hooked, "layer 'up' has a hook"),
    "patch": (patched, "layer 'up' has 'call', which is not Keras's"),
}


@pytest.mark.parametrize("name", MODELS)
def test_code_of_a_users(name: str) -> None:
    """Whatever of a model a user wrote is noticed, but what runs around its calls."""
    build, reason = MODELS[name]
    assert foreign_code(named_layers(build())) == reason


def test_hooks_for_all_modules() -> None:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert foreign_code(named_layers(library_model())) == "torch calls hooks for all modules"
    finally:
        handle.remove()


def test_models_of_two_dtypes(workers: WorkerPool) -> None:
    """A replayed layer reads its variables in its own dtype, whatever the model's is; to read one may be to cast it."""
    for eager, default, asked in zip(*(workers.run(in_two_dtypes, jit) for jit in (False, "auto", True)), strict=True):
        assert (eager[0], default[0], asked[0]) == (6, 3, 2)
        for key, value in eager[1].items():
            np.testing.assert_array_equal(default[1][key], value, err_msg=key)
            np.testing.assert_allclose(asked[1][key], value, rtol=0.02, atol=0.02, err_msg=key)
