"""Other ways in than a call of the whole model: layers and sub-models called alone, extractors, KerasHub's methods."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
import torch

import tp_planner
from tests.models import building, randomize
from tests.workers import Pools, layout_map

RULES = {
    ".*(fc1|up)/kernel": (None, "model"),
    ".*(fc1|up)/bias": ("model",),
    ".*(fc2|down)/kernel": ("model", None),
}
X = np.random.default_rng(0).standard_normal((4, 16))


# On the ranks


def nested() -> keras.Model:
    with building("float64"):
        inside = keras.Input((16,), name="inside")
        hidden = keras.layers.Dense(32, "gelu", name="fc1")(inside)
        inner = keras.Model(inside, keras.layers.Dense(16, name="fc2")(hidden), name="inner")
        outside = keras.Input((16,), name="outside")
        y = keras.layers.Dense(24, "tanh", name="up")(inner(outside))
        return randomize(keras.Model(outside, keras.layers.Dense(8, name="down")(y), name="outer"), 0)


def inner(model: keras.Model) -> keras.Model:
    return model.get_layer("inner")


def by_hand(model: keras.Model) -> Any:
    return model.get_layer("down")(model.get_layer("up")(inner(model)(X)))


ENTRIES: dict[str, Callable[[keras.Model], Any]] = {
    "a column-parallel layer": lambda model: model.get_layer("up")(X),
    "a row-parallel layer": lambda model: model.get_layer("down")(np.ones((4, 24))),
    "a sub-model": lambda model: inner(model)(X),
    "a layer of a sub-model": lambda model: inner(model).get_layer("fc1")(X),
    "layer by layer": by_hand,
    "an extractor": lambda model: keras.Model(model.input, model.get_layer("up").output)(X),
    "an extractor of a sub-model": lambda model: keras.Model(
        inner(model).input, inner(model).get_layer("fc1").output
    ).predict(X, verbose=0),
    "a stack of its layers": lambda model: keras.Sequential([inner(model), model.get_layer("up")])(X),
    "the model": lambda model: model(X),
    "the model's own call": lambda model: model.call(keras.ops.convert_to_tensor(X)),
}


@contextlib.contextmanager
def used(way: str, build: Callable[[], Any], rules: Any) -> Iterator[Any]:
    """Yield a model in one of the ways of use: parallelized, distributed, or distributed and called before."""
    if way == "parallelize":
        yield tp_planner.parallelize(build(), layout_map(rules))
        return
    tp_planner.enable_keras_distribution()
    try:
        layout = layout_map(rules)
        with keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch").scope():
            model = build()
            if way == "called":
                model(model.input_example())
            yield model
    finally:
        tp_planner.disable_keras_distribution()


class Nested:
    """Makes the nested model, with inputs to call it on."""

    def __call__(self) -> keras.Model:
        model = nested()
        model.input_example = lambda: X
        return model


def enter(way: str) -> dict[str, tuple[Any, Any]]:
    """Return what each entry gives for one device and here: outputs, and gradients of all weights."""
    found = {}
    alone = nested()
    with used(way, Nested(), RULES) as model:
        for name, entry in ENTRIES.items():
            found[name] = result(entry, alone), result(entry, model)
    return found


def result(entry: Callable[[keras.Model], Any], model: keras.Model) -> list[np.ndarray]:
    output = entry(model)
    arrays = [keras.ops.convert_to_numpy(output)]
    if isinstance(output, torch.Tensor) and output.requires_grad:
        output.square().sum().backward()
        for variable in model.trainable_variables:
            gradient = variable.value.grad
            if gradient is not None:
                arrays.append((gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).numpy())
                variable.value.grad = None
    return arrays


def causal_lm() -> Any:
    keras.utils.set_random_seed(1)
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=64,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=16,
        intermediate_dim=64,
        head_dim=8,
    )
    model = keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)
    model.input_example = lambda: {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    return model


IDS = np.random.default_rng(0).integers(1, 64, (2, 12)).astype("int32")
GEMMA = {
    "token_embedding/embeddings": ("model", None),
    ".*decoder_block.*attention.*(query|key|value).kernel": ("model", None, None),
    ".*decoder_block.*attention_output.kernel": ("model", None, None),
    ".*decoder_block.*ffw_gating.*kernel": (None, "model"),
    ".*decoder_block.*ffw_linear.kernel": ("model", None),
}


def generate(model: Any) -> list[list[int]]:
    mask = np.ones_like(IDS)
    mask[:, 6:] = 0
    tokens = model.generate({"token_ids": IDS, "padding_mask": mask}, stop_token_ids=None)["token_ids"]
    return np.asarray(tokens).tolist()


def score(model: Any) -> list[Any]:
    return keras.ops.convert_to_numpy(model.score(IDS)).tolist()


def use_causal_lm(way: str) -> list[Any]:
    """Generate and score, and train a step between."""
    alone = causal_lm()
    found = []
    with used(way, causal_lm, GEMMA) as model:
        for each in (alone, model):
            results = [generate(each), score(each)]
            each.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
            keras.Model.train_on_batch(each, each.input_example(), IDS)
            found.append([*results, generate(each), score(each)])
    return found


def second_model(first: str) -> list[Any]:
    """Call two models under one distribution, of which rules name one; return outputs, alone and here."""
    with used("distribution", Nested(), RULES) as model:
        x = keras.Input((16,))
        teacher = keras.Model(x, keras.layers.Dense(4, name="teacher", dtype="float64")(x))
        models = (model, teacher) if first == "named" else (teacher, model)
        found = {each.name: keras.ops.convert_to_numpy(each(X)) for each in models}
        kernel = teacher.get_layer("teacher").kernel.numpy()
    expected = keras.ops.convert_to_numpy(nested()(X))
    return [found["outer"], expected, found[teacher.name], X @ kernel]


def unnamed_model() -> str:
    """Return why a model is refused under rules that match in no model of the distribution."""
    with used("distribution", Nested(), {"head/kernel": (None, "model")}) as model:
        try:
            model(X)
        except tp_planner.PlanError as error:
            return str(error)
    return ""


def train_compiled(way: str, what: str) -> list[list[float]]:
    """Return the losses of a loop of one's own on one device, and here under ``torch.compile`` of the model or step."""
    alone = nested()
    with used(way, Nested(), RULES) as model:
        return [loop(alone, lambda plain: plain, ""), loop(model, torch.compile, what)]


def loop(model: keras.Model, compiled: Callable[..., Any], what: str) -> list[float]:
    optimizer, x = torch.optim.SGD(model.parameters(), 0.01), torch.from_numpy(X)
    called = compiled(model) if what == "model" else model

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (called(x) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    made = compiled(step) if what == "step" else step
    return [float(made()) for _ in range(3)]


# In the parent

WAYS = ("parallelize", "distribution", "called")


@pytest.mark.parametrize(("ranks", "way"), [*((2, way) for way in WAYS), (4, "parallelize")])
def test_entries(pools: Pools, ranks: int, way: str) -> None:
    """Whatever part of a model is called, and whether it is planned by then, it computes what one device does."""
    for found in pools(ranks).run(enter, way):
        for name, (expected, here) in found.items():
            assert len(expected) == len(here), name
            for array, other in zip(expected, here, strict=True):
                np.testing.assert_allclose(other, array, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "way", [each if each == "distribution" else pytest.param(each, marks=pytest.mark.slow) for each in WAYS]
)
def test_generating_and_scoring(pools: Pools, way: str) -> None:
    """KerasHub's own methods give one device's tokens and scores: before the first call, after it, after training."""
    for alone, here in pools(2).run(use_causal_lm, way):
        assert (here[0], here[2]) == (alone[0], alone[2])
        for place in (1, 3):
            np.testing.assert_allclose(here[place], alone[place], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["named", "other"])
def test_a_second_model_that_no_rule_names(pools: Pools, first: str) -> None:
    for found, expected, whole, expected_whole in pools(2).run(second_model, first):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(whole, expected_whole, rtol=1e-6, atol=1e-6)


def test_rules_that_match_in_no_model(pools: Pools) -> None:
    assert pools(2).run(unnamed_model) == ["layout rule 'head/kernel' matches no variable; closest: 'down/kernel'"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "step"])
@pytest.mark.parametrize("way", WAYS[:2])
def test_under_torch_compile(pools: Pools, way: str, what: str) -> None:
    """A parallel model runs as it is in what a user compiles, also where its first call there plans it."""
    for expected, losses in pools(2).run(train_compiled, way, what):
        assert losses[2] < losses[0]
        np.testing.assert_allclose(losses, expected, rtol=1e-10)
