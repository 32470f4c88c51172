"""Models as other people write them, tiny: no layout was ever written for one, and none is like another here.

Each has something in its code that a search once got wrong: reads of one weight in every step of a recurrence, steps
that nothing comes of, a tensor that a layer reads whole and cut, reshapes that guess the batch, a check of sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from tests.models import Batch, Case, Shape, building, randomize

CLASSES = "SparseCategoricalCrossentropy"
WIDTH, HEADS, LENGTH = 16, 4, 8


class FusedAttention(layers.Layer):
    """Attention with one kernel for queries, keys and values, which its code takes apart by an index."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.qkv, self.proj = layers.Dense(3 * WIDTH, name="qkv"), layers.Dense(WIDTH, name="proj")

    def build(self, shape: Shape) -> None:
        self.qkv.build(shape)
        self.proj.build(shape)

    def call(self, x: Any) -> Any:
        parts = ops.reshape(self.qkv(x), (-1, LENGTH, 3, HEADS, WIDTH // HEADS))
        query, key, value = ops.unstack(ops.transpose(parts, (2, 0, 3, 1, 4)), 3)
        scores = ops.softmax(ops.matmul(query, ops.transpose(key, (0, 1, 3, 2))) / (WIDTH // HEADS) ** 0.5)
        mixed = ops.transpose(ops.matmul(scores, value), (0, 2, 1, 3))
        return self.proj(ops.reshape(mixed, (-1, LENGTH, WIDTH)))


def universal() -> keras.Model:
    """Return a universal transformer: one block, three times."""
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(32, WIDTH, name="table")(tokens)
    norms = [layers.LayerNormalization(name=name) for name in ("first_norm", "second_norm")]
    attention = FusedAttention(name="attention")
    up, down = layers.Dense(32, activation="relu", name="up"), layers.Dense(WIDTH, name="down")
    for _ in range(3):
        x = x + attention(norms[0](x))
        x = x + down(up(norms[1](x)))
    return keras.Model(tokens, layers.Dense(32, name="head")(x), name="universal")


class Routed(layers.Layer):
    """Gated experts, the two best of which count for each token."""

    def build(self, shape: Shape) -> None:
        self.router = self.add_weight(shape=(shape[-1], 4), name="router")
        self.up = self.add_weight(shape=(4, shape[-1], 32), name="up")
        self.gate = self.add_weight(shape=(4, shape[-1], 32), name="gate")
        self.down = self.add_weight(shape=(4, 32, shape[-1]), name="down")

    def call(self, x: Any) -> Any:
        best, at = ops.top_k(ops.einsum("bsd,de->bse", x, self.router), 2)
        share = ops.sum(ops.one_hot(at, 4, dtype=x.dtype) * ops.softmax(best, axis=-1)[..., None], axis=2)
        hidden = ops.silu(ops.einsum("bsd,edh->besh", x, self.gate)) * ops.einsum("bsd,edh->besh", x, self.up)
        return ops.einsum("besd,bse->bsd", ops.einsum("besh,ehd->besd", hidden, self.down), share)


def experts() -> keras.Model:
    """Return two blocks of experts."""
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(32, WIDTH, name="table")(tokens)
    for number in range(2):
        x = x + Routed(name=f"experts_{number}")(layers.RMSNormalization(name=f"norm_{number}")(x))
    return keras.Model(tokens, layers.Dense(32, name="head")(x), name="experts")


class Cross(layers.Layer):
    """A layer of a cross network, of low rank: it takes its input whole, and multiplies it."""

    def build(self, shape: Shape) -> None:
        self.inner = self.add_weight(shape=(shape[0][-1], 8), name="inner")
        self.outer = self.add_weight(shape=(8, shape[0][-1]), name="outer")
        self.bias = self.add_weight(shape=(shape[0][-1],), name="bias")

    def call(self, inputs: Any) -> Any:
        first, x = inputs
        return first * (ops.matmul(ops.matmul(x, self.inner), self.outer) + self.bias) + x


def cross_network() -> keras.Model:
    """Return tables and numbers, crossed and through layers side by side."""
    names = {"user": 64, "item": 50}
    inputs = [keras.Input((), dtype="int32", name=name) for name in names]
    inputs.append(keras.Input((8,), name="numbers"))
    tables = [layers.Embedding(size, WIDTH, name=f"{name}_table") for name, size in names.items()]
    parts = [table(each) for table, each in zip(tables, inputs, strict=False)]
    first = x = layers.Concatenate(name="features")([*parts, layers.Dense(WIDTH, name="bottom")(inputs[-1])])
    for number in range(2):
        x = Cross(name=f"cross_{number}")([first, x])
    deep = layers.Dense(64, activation="relu", name="deep")(first)
    score = layers.Dense(1, name="score")(layers.Concatenate(name="join")([x, deep]))
    return keras.Model(inputs, score, name="cross_network")


def sequences() -> keras.Model:
    """Return a GRU of a source, whose state begins that of a target, which attends to the source."""
    source, target = (keras.Input((LENGTH,), dtype="int32", name=name) for name in ("source", "target"))
    encoder = layers.GRU(WIDTH, return_sequences=True, return_state=True, name="encoder")
    read, state = encoder(layers.Embedding(32, WIDTH, name="source_table")(source))
    decoder = layers.GRU(WIDTH, return_sequences=True, name="decoder")
    written = decoder(layers.Embedding(24, WIDTH, name="target_table")(target), initial_state=state)
    context = layers.AdditiveAttention(name="attention")([written, read])
    mixed = layers.Dense(32, activation="tanh", name="mixed")(layers.Concatenate(name="join")([written, context]))
    return keras.Model([source, target], layers.Dense(24, name="head")(mixed), name="sequences")


def tagger() -> keras.Model:
    """Return an LSTM both ways over tokens, of which some are padding."""
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(32, WIDTH, mask_zero=True, name="table")(tokens)
    x = layers.Bidirectional(layers.LSTM(WIDTH, return_sequences=True), name="both_ways")(x)
    return keras.Model(tokens, layers.Dense(8, name="tags")(x), name="tagger")


class GraphConvolution(layers.Layer):
    """A mean over neighbours."""

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.of_others, self.of_self = layers.Dense(units, name="of_others"), layers.Dense(units, name="of_self")

    def build(self, shapes: Shape) -> None:
        self.of_others.build(shapes[0])
        self.of_self.build(shapes[0])

    def call(self, inputs: Any) -> Any:
        nodes, edges = inputs
        others = ops.matmul(edges, self.of_others(nodes)) / ops.sum(edges, axis=-1, keepdims=True)
        return ops.relu(others + self.of_self(nodes))


class GraphAttention(layers.Layer):
    """Attention of several heads along edges; their results are side by side, in as many batches as come out."""

    def build(self, shapes: Shape) -> None:
        self.kernel = self.add_weight(shape=(shapes[0][-1], HEADS, 8), name="kernel")
        self.source = self.add_weight(shape=(HEADS, 8), name="source")
        self.target = self.add_weight(shape=(HEADS, 8), name="target")

    def call(self, inputs: Any) -> Any:
        nodes, edges = inputs
        hidden = ops.einsum("bnd,dhu->bnhu", nodes, self.kernel)
        scores = (ops.sum(hidden * each, axis=-1) for each in (self.source, self.target))
        score = ops.leaky_relu(next(scores)[:, :, None] + next(scores)[:, None])
        weights = ops.softmax(ops.where(edges[..., None] > 0, score, -1e9), axis=2)
        return ops.reshape(ops.einsum("bnmh,bmhu->bnhu", weights, hidden), (-1, 6, HEADS * 8))


def graph_network() -> keras.Model:
    """Return convolutions along edges, and attention between them."""
    nodes, edges = keras.Input((6, 8), name="nodes"), keras.Input((6, 6), name="edges")
    x = GraphAttention(name="attention")([GraphConvolution(32, name="first")([nodes, edges]), edges])
    x = layers.GlobalMaxPooling1D(name="all")(GraphConvolution(WIDTH, name="second")([x, edges]))
    return keras.Model([nodes, edges], layers.Dense(4, name="head")(x), name="graph_network")


def video() -> keras.Model:
    """Return convolutions over time and space, and a recurrence of some, whose cell checks its input's shape."""
    frames = keras.Input((3, 8, 8, 2))
    x = layers.Conv3D(8, 3, padding="same", activation="relu", name="first")(frames)
    x = layers.ConvLSTM2D(4, 3, padding="same", name="recurrent")(layers.MaxPooling3D((1, 2, 2), name="pool")(x))
    x = layers.GlobalAveragePooling2D(name="all")(x)
    return keras.Model(frames, layers.Dense(4, name="head")(x), name="video")


def _tokens(classes: int, rng: np.random.Generator, size: int) -> Batch:
    read, wanted = (rng.integers(0, end, (size, LENGTH)).astype("int32") for end in (32, classes))
    return read, wanted


def _two_sequences(rng: np.random.Generator, size: int) -> Batch:
    source, target, wanted = (rng.integers(0, end, (size, LENGTH)).astype("int32") for end in (32, 24, 24))
    return [source, target], wanted


def _clicks(rng: np.random.Generator, size: int) -> Batch:
    names = [rng.integers(0, end, size).astype("int32") for end in (64, 50)]
    return [*names, rng.standard_normal((size, 8))], rng.standard_normal((size, 1))


def _graphs(rng: np.random.Generator, size: int) -> Batch:
    edges = np.maximum(rng.random((size, 6, 6)) < 0.5, np.eye(6)).astype("float64")
    return [rng.standard_normal((size, 6, 8)), edges], rng.standard_normal((size, 4))


def _frames(rng: np.random.Generator, size: int) -> Batch:
    return rng.standard_normal((size, 3, 8, 8, 2)), rng.integers(0, 4, size).astype("int32")


def _build(make: Callable[[], keras.Model], dtype: str = "float32", *, seed: int = 0) -> keras.Model:
    keras.utils.set_random_seed(seed)  # recurrent layers have seeds for dropout, which is none
    with building(dtype):
        return randomize(make(), seed)


OTHERS = {
    make.__name__: Case(make.__name__, partial(_build, make), batch, loss, {}, None)
    for make, batch, loss in (
        (universal, partial(_tokens, 32), CLASSES),
        (experts, partial(_tokens, 32), CLASSES),
        (cross_network, _clicks, "MeanSquaredError"),
        (sequences, _two_sequences, CLASSES),
        (tagger, partial(_tokens, 8), CLASSES),
        (graph_network, _graphs, "MeanSquaredError"),
        (video, _frames, CLASSES),
    )
}
