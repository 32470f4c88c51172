"""Weights that replicas store in parts, and that the code of other layers reads than those that own them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
import torch.distributed as dist

import tp_planner
from tests.models import building, randomize
from tests.replicas import relative, share, weights
from tests.workers import Pools
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh

WIDTH, LENGTH, VOCABULARY = 8, 5, 12


class Tied(keras.Model):
    """A model whose own code multiplies by the transpose of an embedding."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.embedding = keras.layers.Embedding(VOCABULARY, WIDTH, name="embedding")
        self.up = keras.layers.Dense(WIDTH, "tanh", name="up")

    def call(self, tokens: Any) -> Any:
        hidden = self.up(self.embedding(tokens))
        return keras.ops.matmul(hidden, keras.ops.transpose(self.embedding.embeddings))


def tied() -> keras.Model:
    model = Tied(name="tied")
    model(np.zeros((2, LENGTH), "int32"))
    return model


def sequence(layer: Callable[[], keras.layers.Layer]) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        tokens = keras.Input((LENGTH,), dtype="int32", name="tokens")
        hidden = keras.layers.Embedding(VOCABULARY, WIDTH, name="embedding")(tokens)
        head = keras.layers.Dense(VOCABULARY, name="head")
        return keras.Model(tokens, head(layer()(hidden)), name="model")

    return build


MODELS: dict[str, Callable[[], keras.Model]] = {
    "tied": tied,
    "each step": sequence(lambda: keras.layers.TimeDistributed(keras.layers.Dense(6), name="each")),
    "lstm": sequence(lambda: keras.layers.LSTM(6, return_sequences=True, name="lstm")),
    "gru both ways": sequence(
        lambda: keras.layers.Bidirectional(keras.layers.GRU(4, return_sequences=True), name="both")
    ),
}


# On the ranks


def train(name: str, model_ranks: int) -> dict[str, float]:
    """Compare a step with its plan, and the weights after three with those of one process."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (6, LENGTH)).astype("int32")
    targets = rng.standard_normal((6, LENGTH, VOCABULARY))
    models = []
    for _ in range(2):
        keras.utils.clear_session()
        with building("float64"):
            models.append(randomize(MODELS[name]()))
    mesh = Mesh((("batch", 2), ("model", model_ranks)))
    rules = (LayoutRule("(.*/)?(embeddings|kernel)", ("model", None)),) if model_ranks > 1 else ()
    layout = replace(Layout(mesh, rules).across("batch"), zero=3)
    replica = dist.get_rank() // model_ranks
    batches = [(tokens, targets), (share(tokens, replica, 2), share(targets, replica, 2))]
    for model in models:
        model.compile(keras.optimizers.AdamW(0.01, epsilon=1e-3), "mse", jit_compile=False)
    plan = tp_planner.plan(models[1], layout, batches[1][0], batch_axis="batch")
    tp_planner.parallelize(models[1], plan)
    for model, batch in zip(models, batches, strict=True):
        for _ in range(2):
            model.train_on_batch(*batch)
    with tp_planner.record(models[1]) as recorder:
        models[1].train_on_batch(*batches[1])
    plan.check(recorder.recording)
    models[0].train_on_batch(*batches[0])
    expected, found = map(weights, models)
    errors = {key: relative(found[key], expected[key]) for key in expected if "seed_generator" not in key}
    return errors | {"prediction": relative(*(model.predict(tokens, verbose=0) for model in models))}


# In the parent


@pytest.mark.parametrize("model_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_trains_as_one_process(pools: Pools, name: str, model_ranks: int) -> None:
    """The plan has every gathering of them, and weights and predictions are those of one process."""
    for errors in pools(2 * model_ranks).run(train, name, model_ranks):
        assert {key: error for key, error in errors.items() if not error <= 1e-11} == {}
