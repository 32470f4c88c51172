"""Models that nobody wrote: a few blocks, drawn by a seed, on sequences or on images.

Blocks are what people write: layers of Keras, branches that meet, layers with code of their own. Dims are small, some
of them odd, so that shards are uneven or empty.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from tests.models import Batch, building, randomize

CLASSES = 5
Block = Callable[[Any, random.Random, str], Any]


# Layers with code of their own


class Heads(layers.Layer):
    """Attention from one kernel for queries, keys and values."""

    def __init__(self, heads: int, dim: int, causal: bool, **options: Any) -> None:
        super().__init__(**options)
        self.heads, self.dim, self.causal = heads, dim, causal

    def build(self, shape: Any) -> None:
        self.packed = self.add_weight(shape=(shape[-1], 3 * self.heads * self.dim), name="packed")
        self.out = self.add_weight(shape=(self.heads * self.dim, shape[-1]), name="out")

    def call(self, x: Any) -> Any:
        steps = x.shape[1]
        packed = ops.reshape(ops.matmul(x, self.packed), (-1, steps, 3, self.heads, self.dim))
        q, k, v = (ops.transpose(packed[:, :, each], (0, 2, 1, 3)) for each in range(3))
        scores = ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))) / self.dim**0.5
        if self.causal:
            scores = ops.where(ops.tril(ops.ones((steps, steps), dtype="bool")), scores, -1e9)
        mixed = ops.transpose(ops.matmul(ops.softmax(scores), v), (0, 2, 1, 3))
        return x + ops.matmul(ops.reshape(mixed, (-1, steps, self.heads * self.dim)), self.out)


class Gated(layers.Layer):
    """A feed-forward block whose gate and values are halves of one product."""

    def __init__(self, hidden: int, **options: Any) -> None:
        super().__init__(**options)
        self.hidden = hidden

    def build(self, shape: Any) -> None:
        self.both = self.add_weight(shape=(shape[-1], 2 * self.hidden), name="both")
        self.bias = self.add_weight(shape=(2 * self.hidden,), name="bias")
        self.down = self.add_weight(shape=(self.hidden, shape[-1]), name="down")

    def call(self, x: Any) -> Any:
        gate, values = ops.split(ops.matmul(x, self.both) + self.bias, 2, axis=-1)
        return x + ops.einsum("...h,hd->...d", ops.silu(gate) * values, self.down)


class Experts(layers.Layer):
    """A soft mixture of experts, whose kernels are stacked."""

    def __init__(self, experts: int, hidden: int, **options: Any) -> None:
        super().__init__(**options)
        self.experts, self.hidden = experts, hidden

    def build(self, shape: Any) -> None:
        self.router = layers.Dense(self.experts, name="router")
        self.router.build(shape)
        self.up = self.add_weight(shape=(self.experts, shape[-1], self.hidden), name="up")
        self.down = self.add_weight(shape=(self.experts, self.hidden, shape[-1]), name="down")

    def call(self, x: Any) -> Any:
        weights = ops.softmax(self.router(x), axis=-1)
        hidden = ops.gelu(ops.einsum("btd,edh->bteh", x, self.up))
        return x + ops.sum(ops.einsum("bteh,ehd->bted", hidden, self.down) * weights[..., None], axis=2)


class Scaled(layers.Layer):
    """A running sum along the steps, and vectors that are read by slices and by place."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), name="scale")
        self.places = self.add_weight(shape=(shape[1] + 3, shape[-1]), name="places")

    def call(self, x: Any) -> Any:
        x = x * self.scale + self.places[: x.shape[1]]
        return ops.cumsum(x, axis=1) / x.shape[1] + ops.take(self.places, [1, 0], axis=0)[:1]


# Blocks of sequences, (batch, steps, dim)


def dense(x: Any, rng: random.Random, name: str) -> Any:
    activation = rng.choice(["gelu", "tanh", "softmax", None])
    return layers.Dense(rng.choice([6, 8, 12, 16]), activation, use_bias=rng.random() < 0.7, name=name)(x)


def feed_forward(x: Any, rng: random.Random, name: str) -> Any:
    hidden = layers.Dense(rng.choice([14, 16, 24]), rng.choice(["relu", "gelu", "swish"]), name=f"{name}_up")(x)
    if rng.random() < 0.3:
        hidden = layers.PReLU(shared_axes=[1], name=f"{name}_prelu")(hidden)
    return layers.Add(name=name)([x, layers.Dense(x.shape[-1], name=f"{name}_down")(hidden)])


def attention(x: Any, rng: random.Random, name: str) -> Any:
    heads, dim = rng.choice([2, 3, 4]), rng.choice([2, 4])
    if rng.random() < 0.3:
        layer = layers.GroupQueryAttention(dim, 4, 2, name=name)
    else:
        layer = layers.MultiHeadAttention(heads, dim, value_dim=rng.choice([None, 3]), name=name)
    mixed = layer(x, x, use_causal_mask=rng.random() < 0.5)
    return x + mixed if rng.random() < 0.8 else mixed


def heads(x: Any, rng: random.Random, name: str) -> Any:
    return Heads(rng.choice([2, 3, 4]), rng.choice([2, 4]), rng.random() < 0.5, name=name)(x)


def gated(x: Any, rng: random.Random, name: str) -> Any:
    return Gated(rng.choice([8, 10, 16]), name=name)(x)


def experts(x: Any, rng: random.Random, name: str) -> Any:
    return Experts(rng.choice([2, 3, 4]), rng.choice([6, 8]), name=name)(x)


def scaled(x: Any, rng: random.Random, name: str) -> Any:
    return Scaled(name=name)(x)


def norm(x: Any, rng: random.Random, name: str) -> Any:
    kinds = [layers.LayerNormalization, layers.RMSNormalization, layers.BatchNormalization]
    return rng.choice(kinds)(epsilon=1e-3, name=name)(x)


def recurrent(x: Any, rng: random.Random, name: str) -> Any:
    kind, units = rng.choice([layers.LSTM, layers.GRU, layers.SimpleRNN]), rng.choice([5, 6, 8])
    layer = kind(units, return_sequences=True, name=name)
    return layers.Bidirectional(layer, name=f"{name}_both")(x) if rng.random() < 0.3 else layer(x)


def convolved(x: Any, rng: random.Random, name: str) -> Any:
    kind = rng.choice([layers.Conv1D, layers.SeparableConv1D, layers.DepthwiseConv1D])
    options = {} if kind is layers.DepthwiseConv1D else {"filters": rng.choice([6, 8, 12])}
    return kind(kernel_size=3, padding="same", activation="relu", name=name, **options)(x)


def each_step(x: Any, rng: random.Random, name: str) -> Any:
    return layers.TimeDistributed(layers.Dense(rng.choice([6, 8]), name=f"{name}_dense"), name=name)(x)


def einsums(x: Any, rng: random.Random, name: str) -> Any:
    split = layers.EinsumDense("btd,dhk->bthk", (None, rng.choice([2, 4]), 3), bias_axes="hk", name=f"{name}_split")(x)
    merged = layers.EinsumDense("bthk,hkd->btd", (None, x.shape[-1]), bias_axes="d", name=f"{name}_merge")
    return x + merged(ops.tanh(split))


def twice(x: Any, rng: random.Random, name: str) -> Any:
    """One layer, called two times."""
    layer = layers.Dense(x.shape[-1], "tanh", name=name)
    return layer(layer(x)) + x


def branches(x: Any, rng: random.Random, name: str) -> Any:
    left = layers.Dense(rng.choice([4, 6]), "relu", name=f"{name}_left")(x)
    right = layers.Dense(rng.choice([4, 8]), name=f"{name}_right")(x)
    return layers.Concatenate(name=name)([left, right, x] if rng.random() < 0.3 else [left, right])


def nested(x: Any, rng: random.Random, name: str) -> Any:
    inner = [
        layers.Dense(rng.choice([8, 12]), "gelu", name=f"{name}_in"),
        layers.Dense(x.shape[-1], name=f"{name}_out"),
    ]
    return keras.Sequential(inner, name=name)(x) + x


def mixed_steps(x: Any, rng: random.Random, name: str) -> Any:
    """A dense layer along the steps, as MLP-Mixers have."""
    turned = layers.Dense(x.shape[1], "gelu", name=f"{name}_steps")(layers.Permute((2, 1), name=f"{name}_turn")(x))
    return x + layers.Permute((2, 1), name=f"{name}_back")(turned)


# Blocks of images, (batch, height, width, channels)


def image_conv(x: Any, rng: random.Random, name: str) -> Any:
    options = {"strides": rng.choice([1, 1, 2]), "padding": "same", "use_bias": rng.random() < 0.5}
    kind = rng.choice([layers.Conv2D, layers.SeparableConv2D, layers.Conv2DTranspose])
    return kind(rng.choice([6, 8, 12]), 3, name=name, **options)(x)


def image_groups(x: Any, rng: random.Random, name: str) -> Any:
    if rng.random() < 0.5:
        return layers.DepthwiseConv2D(3, padding="same", depth_multiplier=rng.choice([1, 2]), name=name)(x)
    x = layers.Conv2D(8, 1, name=f"{name}_in")(x)
    return layers.Conv2D(rng.choice([8, 12]), 3, groups=2, padding="same", name=name)(x)


def image_norm(x: Any, rng: random.Random, name: str) -> Any:
    if rng.random() < 0.3 and x.shape[-1] % 2 == 0:
        return layers.GroupNormalization(2, name=name)(x)
    return layers.ReLU(name=f"{name}_relu")(layers.BatchNormalization(name=name)(x))


def excitation(x: Any, rng: random.Random, name: str) -> Any:
    pooled = layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_pool")(x)
    inner = layers.Conv2D(4, 1, activation="relu", name=f"{name}_in")(pooled)
    return layers.Multiply(name=name)(
        [x, layers.Conv2D(x.shape[-1], 1, activation="sigmoid", name=f"{name}_out")(inner)]
    )


def bottleneck(x: Any, rng: random.Random, name: str) -> Any:
    inner = layers.Conv2D(rng.choice([6, 8]), 1, activation="relu", name=f"{name}_in")(x)
    inner = layers.Conv2D(inner.shape[-1], 3, padding="same", name=f"{name}_mid")(inner)
    inner = layers.BatchNormalization(name=f"{name}_norm")(inner)
    return layers.Add(name=name)([x, layers.Conv2D(x.shape[-1], 1, name=f"{name}_out")(inner)])


def image_dense(x: Any, rng: random.Random, name: str) -> Any:
    return layers.Dense(rng.choice([6, 8]), rng.choice(["relu", None]), name=name)(x)


SEQUENCES: tuple[Block, ...] = (
    *(dense, feed_forward, feed_forward, attention, heads, gated, experts, scaled, norm, norm, recurrent, convolved),
    *(each_step, einsums, twice, branches, nested, mixed_steps),
)
IMAGES: tuple[Block, ...] = (image_conv, image_groups, image_norm, image_norm, excitation, bottleneck, image_dense)


def random_model(seed: int, dtype: str = "float64") -> keras.Model:
    """Return the model of a seed, with random weights; half of them look up tokens, some take images."""
    rng = random.Random(seed)
    kind = rng.choice(["tokens", "tokens", "steps", "image"])
    with building(dtype):
        inputs, x = _entry(kind, rng)
        for number in range(rng.randint(2, 5)):
            x = rng.choice(IMAGES if kind == "image" else SEQUENCES)(x, rng, f"block{number}")
        if kind != "image" and rng.random() < 0.2:
            x = layers.Flatten(name="flat")(x)
        elif len(x.shape) == 4:
            x = layers.GlobalAveragePooling2D(name="pool")(x)
        elif rng.random() < 0.7:
            x = layers.GlobalAveragePooling1D(name="pool")(x)
        return randomize(keras.Model(inputs, layers.Dense(CLASSES, name="head")(x), name="random"), seed)


def _entry(kind: str, rng: random.Random) -> tuple[Any, Any]:
    if kind == "tokens":
        inputs = keras.Input((6,), dtype="int32", name="tokens")
        dim, masked = rng.choice([6, 8, 12]), rng.random() < 0.3
        return inputs, layers.Embedding(rng.choice([16, 21]), dim, mask_zero=masked, name="embedding")(inputs)
    if kind == "steps":
        inputs = keras.Input((6, 3), name="steps")
        return inputs, layers.Dense(rng.choice([8, 12]), name="entry")(inputs)
    inputs = keras.Input((8, 8, 3), name="pixels")
    return inputs, layers.Conv2D(rng.choice([6, 8]), 3, padding="same", name="entry")(inputs)


def random_batch(model: keras.Model, rng: np.random.Generator, size: int) -> Batch:
    """Return inputs for a random model, and numbers of the shape of its outputs."""
    given, made = model.inputs[0], model.outputs[0]
    shape = (size, *given.shape[1:])
    x = rng.integers(0, 16, shape).astype("int32") if given.dtype == "int32" else rng.standard_normal(shape)
    return x, rng.standard_normal((size, *made.shape[1:]))
