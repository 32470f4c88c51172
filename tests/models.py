"""The zoo: small Keras models of every family, with a batch, a loss and a Megatron-style layout each.

Every layer is named and Keras' counters of automatic names start afresh in each build, so a builder called
twice gives the same variable paths. Weights are random, biases and norms too: an error in any of them shows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import keras
import keras_hub
import numpy as np
import pytest
import torch
from keras.src.backend.common import dtypes, global_state
from keras_hub.src.models.gemma import rms_normalization
from keras_hub.src.models.llama import llama_decoder, llama_layernorm

Batch = tuple[Any, np.ndarray]
Axes = tuple[str | None, ...]
Shape = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One model of the zoo: how to build and feed it, and the layout that shards it Megatron-style.

    ``build`` takes ``dtype`` and the sizes of its builder. ``batch`` takes a generator and a batch size.
    ``loss`` is a class name of ``keras.losses``. ``rules`` maps patterns to mesh axes per dim, as a LayoutMap
    does; ``preset`` is the preset that shards the model just so, or None.
    """

    name: str
    build: Callable[..., keras.Model]
    batch: Callable[[np.random.Generator, int], Batch]
    loss: str
    rules: Mapping[str, Axes]
    preset: str | None

    def make_loss(self, dtype: str = "float32") -> keras.losses.Loss:
        """Return the loss, computed in ``dtype``: by its name alone Keras would compute it in float32."""
        options = {"from_logits": True} if "Crossentropy" in self.loss else {}
        loss: keras.losses.Loss = getattr(keras.losses, self.loss)(dtype=dtype, **options)
        return loss


def randomize(model: keras.Model, seed: int = 0) -> keras.Model:
    """Draw every trainable weight anew from ``seed``, activations staying near 1, and return the model."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        noise = rng.standard_normal(tuple(variable.shape))
        if variable.name in ("gamma", "scale"):
            variable.assign(1.0 + 0.2 * noise)
        elif variable.name in ("beta", "bias"):
            variable.assign(0.3 * noise)
        else:
            # The fourth root of the size is about the root of the fan-in, for kernels of any rank.
            variable.assign(1.5 * noise / max(noise.size, 1) ** 0.25)
    return model


@contextmanager
def building(dtype: str, exact: bool = True) -> Iterator[None]:
    """Make ``dtype`` the default policy, and number automatic names from 0, for the layers built inside.

    Unless ``exact``, float64 is what it is to users of Keras: rounded to float32 in the middle.
    """
    if dtype == "float64" and exact:
        _compute_in_float64()
    policy = keras.config.dtype_policy()
    names = global_state.get_global_attribute("object_name_uids")
    keras.config.set_dtype_policy(dtype)
    global_state.set_global_attribute("object_name_uids", defaultdict(int))
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)
        global_state.set_global_attribute("object_name_uids", names)


def _compute_in_float64() -> None:
    """Let float64 models compute in float64, for the rest of this process; other dtypes are as they were.

    Keras on torch, like JAX by default, promotes float64 to float32 in matmuls and other ops, and KerasHub
    computes Llama's and Gemma's norms and the silu of Llama's gate in float32 whatever the dtype of the model.
    Rounding to float32 in the middle would hide the errors that a comparison in float64 is there to find.
    """
    dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
    for module in (llama_decoder, llama_layernorm, rms_normalization):
        module.ops = _OpsKeepingFloat64()


class _OpsKeepingFloat64:
    """``keras.ops``, but casts to float32 leave float64 tensors as they are."""

    def __getattr__(self, name: str) -> Any:
        return getattr(keras.ops, name)

    @staticmethod
    def cast(x: Any, dtype: Any) -> Any:
        narrows = dtype == "float32" and keras.backend.standardize_dtype(x.dtype) == "float64"
        return x if narrows else keras.ops.cast(x, dtype)


# Layers


@keras.saving.register_keras_serializable("zoo")
class AddPositions(keras.layers.Layer):
    """Adds one learned vector per position to (batch, positions, width)."""

    def build(self, input_shape: Shape) -> None:
        self.supports_masking = True
        self.embeddings = self.add_weight(shape=input_shape[1:], initializer="normal", name="embeddings")

    def call(self, x: Any) -> Any:
        return x + self.embeddings


@keras.saving.register_keras_serializable("zoo")
class ClassToken(keras.layers.Layer):
    """Puts one learned vector before the others of (batch, positions, width)."""

    def build(self, input_shape: Shape) -> None:
        self.token = self.add_weight(shape=(1, 1, input_shape[-1]), initializer="normal", name="token")

    def call(self, x: Any) -> Any:
        token = keras.ops.broadcast_to(self.token, (keras.ops.shape(x)[0], 1, x.shape[-1]))
        return keras.ops.concatenate([token, x], axis=1)


@keras.saving.register_keras_serializable("zoo")
class FirstToken(keras.layers.Layer):
    """Takes (batch, width), the first vector of (batch, positions, width), and drops its mask."""

    def build(self, input_shape: Shape) -> None:
        self.supports_masking = True

    def call(self, x: Any) -> Any:
        return x[:, 0]

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        return None


@keras.saving.register_keras_serializable("zoo")
class PreNormBlock(keras.layers.Layer):
    """A transformer block as one composite layer, its norms before attention and feed-forward."""

    def __init__(self, heads: int, hidden: int, **options: Any) -> None:
        super().__init__(**options)
        self.heads = heads
        self.hidden = hidden

    def build(self, input_shape: Shape) -> None:
        width, policy = input_shape[-1], {"dtype": self.dtype_policy}
        self.attention_norm = keras.layers.LayerNormalization(name="attention_norm", **policy)
        self.attention = keras.layers.MultiHeadAttention(self.heads, width // self.heads, name="attention", **policy)
        self.mlp_norm = keras.layers.LayerNormalization(name="mlp_norm", **policy)
        self.up = keras.layers.Dense(self.hidden, activation="gelu", name="up", **policy)
        self.down = keras.layers.Dense(width, name="down", **policy)
        self.attention_norm.build(input_shape)
        self.attention.build(input_shape, input_shape)
        self.mlp_norm.build(input_shape)
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], self.hidden))

    def call(self, x: Any) -> Any:
        y = self.attention_norm(x)
        x = x + self.attention(y, y)
        return x + self.down(self.up(self.mlp_norm(x)))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "heads": self.heads, "hidden": self.hidden}


@keras.saving.register_keras_serializable("zoo")
class GatedBlock(keras.layers.Layer):
    """A gated feed-forward with a norm before it and a residual around it: ``x + down(silu(gate) * up)``."""

    def __init__(self, hidden: int, **options: Any) -> None:
        super().__init__(**options)
        self.hidden = hidden

    def build(self, input_shape: Shape) -> None:
        policy = {"dtype": self.dtype_policy}
        self.norm = keras.layers.RMSNormalization(name="norm", **policy)
        self.gate = keras.layers.Dense(self.hidden, name="gate", **policy)
        self.up = keras.layers.Dense(self.hidden, name="up", **policy)
        self.down = keras.layers.Dense(input_shape[-1], name="down", **policy)
        for layer in (self.norm, self.gate, self.up):
            layer.build(input_shape)
        self.down.build((*input_shape[:-1], self.hidden))

    def call(self, x: Any) -> Any:
        y = self.norm(x)
        return x + self.down(keras.ops.silu(self.gate(y)) * self.up(y))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "hidden": self.hidden}


@keras.saving.register_keras_serializable("zoo")
class HandwrittenAttention(keras.layers.Layer):
    """Causal attention in plain ops, as people write it: heads are numbers in the code, weights have no rank of heads.

    Query heads share key-value heads, and each head has a learned slope for distances.
    """

    def __init__(self, heads: int, kv_heads: int, **options: Any) -> None:
        super().__init__(**options)
        self.heads, self.kv_heads = heads, kv_heads

    def build(self, input_shape: Shape) -> None:
        _, self.length, self.width = input_shape
        self.size = self.width // self.heads
        policy = {"dtype": self.dtype_policy}
        self.query = keras.layers.Dense(self.width, name="query", **policy)
        self.key = keras.layers.Dense(self.kv_heads * self.size, name="key", **policy)
        self.value = keras.layers.Dense(self.kv_heads * self.size, name="value", **policy)
        self.merge = keras.layers.Dense(self.width, name="merge", **policy)
        for layer in (self.query, self.key, self.value, self.merge):
            layer.build(input_shape)
        self.slopes = self.add_weight(shape=(self.heads,), initializer="normal", name="slopes")

    def call(self, x: Any) -> Any:
        ops = keras.ops
        query = ops.reshape(self.query(x), (-1, self.length, self.heads, self.size))
        key, value = (
            ops.reshape(each(x), (-1, self.length, self.kv_heads, self.size)) for each in (self.key, self.value)
        )
        key, value = (ops.repeat(each, self.heads // self.kv_heads, axis=2) for each in (key, value))
        query, key, value = (ops.transpose(each, (0, 2, 1, 3)) for each in (query, key, value))
        position = ops.arange(self.length)
        query = ops.multiply(query, ops.cast(self.size**-0.5, query.dtype))
        distance = ops.cast(position[None, :] - position[:, None], query.dtype)
        scores = ops.matmul(query, ops.swapaxes(key, 2, 3))
        scores = scores + ops.tanh(self.slopes)[:, None, None] * distance
        scores = scores - 1e9 * ops.cast(distance > 0, scores.dtype)
        attended = ops.einsum("bhqk,bhkd->bqhd", ops.softmax(scores, axis=-1), value)
        return self.merge(ops.reshape(attended, (-1, self.length, self.width)))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "heads": self.heads, "kv_heads": self.kv_heads}


@keras.saving.register_keras_serializable("zoo")
class Experts(keras.layers.Layer):
    """Every expert works on every token; the router says how much each counts."""

    def __init__(self, experts: int, hidden: int, **options: Any) -> None:
        super().__init__(**options)
        self.experts, self.hidden = experts, hidden

    def build(self, input_shape: Shape) -> None:
        width = input_shape[-1]
        self.router = keras.layers.Dense(self.experts, name="router", dtype=self.dtype_policy)
        self.router.build(input_shape)
        self.up = self.add_weight(shape=(self.experts, width, self.hidden), name="up")
        self.bias = self.add_weight(shape=(self.experts, self.hidden), name="bias")
        self.down = self.add_weight(shape=(self.experts, self.hidden, width), name="down")

    def call(self, x: Any) -> Any:
        ops = keras.ops
        share = ops.softmax(self.router(x))
        hidden = ops.gelu(ops.einsum("bld,edh->belh", x, self.up) + self.bias[:, None, :])
        made = ops.einsum("belh,ehd->beld", hidden, self.down)
        return ops.sum(made * ops.transpose(share, (0, 2, 1))[..., None], axis=1)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "experts": self.experts, "hidden": self.hidden}


@keras.saving.register_keras_serializable("zoo")
class GatedModel(keras.Model):
    """A subclassed model of gated blocks, with a train step written in torch's style."""

    def __init__(self, width: int, hidden: int, blocks: int, outputs: int, **options: Any) -> None:
        super().__init__(**options)
        self.sizes = {"width": width, "hidden": hidden, "blocks": blocks, "outputs": outputs}
        policy = {"dtype": self.dtype_policy}
        self.stem = keras.layers.Dense(width, name="stem", **policy)
        self.blocks = [GatedBlock(hidden, name=f"block_{index}", **policy) for index in range(blocks)]
        self.head = keras.layers.Dense(outputs, name="head", **policy)

    def call(self, x: Any) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        self.zero_grad()
        y_pred = self(x, training=True)
        loss = self.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
        loss.backward()
        gradients = [variable.value.grad for variable in self.trainable_weights]
        with torch.no_grad():
            self.optimizer.apply(gradients, self.trainable_weights)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.sizes}


# Models


def mlp(dtype: str = "float32", *, inputs: int = 16, width: int = 32, outputs: int = 8, seed: int = 0) -> keras.Model:
    """Three Dense layers: up (relu), down (gelu) and head."""
    with building(dtype):
        features = keras.Input((inputs,), name="features")
        x = keras.layers.Dense(2 * width, activation="relu", name="up")(features)
        x = keras.layers.Dense(width, activation="gelu", name="down")(x)
        x = keras.layers.Dense(outputs, name="head")(x)
        return randomize(keras.Model(features, x, name="mlp"), seed)


def gpt(
    dtype: str = "float32",
    *,
    vocabulary: int = 64,
    length: int = 16,
    width: int = 32,
    heads: int = 4,
    hidden: int | None = None,
    blocks: int = 2,
    dropout: float = 0.0,
    seed: int = 0,
) -> keras.Model:
    """A GPT of flat Keras layers: causal, norms before attention and feed-forward, logits per token.

    ``hidden`` is the feed-forward width, 4 times ``width`` by default. ``dropout`` is that of the attention
    scores and of both residual branches, with fixed seeds.
    """
    with building(dtype):
        tokens = keras.Input((length,), dtype="int32", name="tokens")
        x = keras.layers.Embedding(vocabulary, width, name="token_embedding")(tokens)
        x = AddPositions(name="position_embedding")(x)
        for index in range(blocks):
            x = _gpt_block(x, f"block_{index}", heads, hidden or 4 * width, dropout)
        x = keras.layers.LayerNormalization(name="final_norm")(x)
        logits = keras.layers.Dense(vocabulary, name="head")(x)
        return randomize(keras.Model(tokens, logits, name="gpt"), seed)


def _gpt_block(x: Any, name: str, heads: int, hidden: int, dropout: float) -> Any:
    width = x.shape[-1]
    y = keras.layers.LayerNormalization(name=f"{name}_attention_norm")(x)
    attention = keras.layers.MultiHeadAttention(
        heads, width // heads, dropout=dropout, seed=1, name=f"{name}_attention"
    )
    y = attention(y, y, use_causal_mask=True)
    x = keras.layers.Add(name=f"{name}_attention_residual")([x, _dropped(y, dropout, f"{name}_attention_dropout")])
    y = keras.layers.LayerNormalization(name=f"{name}_mlp_norm")(x)
    y = keras.layers.Dense(hidden, activation="gelu", name=f"{name}_up")(y)
    y = keras.layers.Dense(width, name=f"{name}_down")(y)
    return keras.layers.Add(name=f"{name}_mlp_residual")([x, _dropped(y, dropout, f"{name}_mlp_dropout")])


def _dropped(x: Any, rate: float, name: str) -> Any:
    return keras.layers.Dropout(rate, seed=2, name=name)(x) if rate else x


def encoder(
    dtype: str = "float32",
    *,
    mask: str = "input",
    vocabulary: int = 64,
    length: int = 16,
    width: int = 32,
    heads: int = 4,
    blocks: int = 2,
    classes: int = 4,
    seed: int = 0,
) -> keras.Model:
    """A BERT-like classifier of flat Keras layers, norms after attention and feed-forward.

    Padded positions are hidden from attention: ``mask="input"`` takes an explicit ``padding_mask`` input,
    ``mask="zero"`` lets Keras carry the mask of ``Embedding(mask_zero=True)`` along with the tensors.
    """
    with building(dtype):
        inputs = {"tokens": keras.Input((length,), dtype="int32", name="tokens")}
        attention_mask = None
        if mask == "input":
            inputs["padding_mask"] = keras.Input((length,), dtype="bool", name="padding_mask")
            attention_mask = keras.layers.Reshape((1, length), name="mask")(inputs["padding_mask"])
        embedding = keras.layers.Embedding(vocabulary, width, mask_zero=mask == "zero", name="token_embedding")
        x = AddPositions(name="position_embedding")(embedding(inputs["tokens"]))
        x = keras.layers.LayerNormalization(name="embedding_norm")(x)
        for index in range(blocks):
            x = _encoder_block(x, f"block_{index}", heads, attention_mask)
        x = FirstToken(name="first_token")(x)
        x = keras.layers.Dense(width, activation="tanh", name="pooler")(x)
        return randomize(keras.Model(inputs, keras.layers.Dense(classes, name="head")(x), name="encoder"), seed)


def _encoder_block(x: Any, name: str, heads: int, attention_mask: Any) -> Any:
    width = x.shape[-1]
    attention = keras.layers.MultiHeadAttention(heads, width // heads, name=f"{name}_attention")
    x = keras.layers.Add(name=f"{name}_attention_residual")([x, attention(x, x, attention_mask=attention_mask)])
    x = keras.layers.LayerNormalization(name=f"{name}_attention_norm")(x)
    y = keras.layers.Dense(4 * width, activation="gelu", name=f"{name}_up")(x)
    y = keras.layers.Dense(width, name=f"{name}_down")(y)
    x = keras.layers.Add(name=f"{name}_mlp_residual")([x, y])
    return keras.layers.LayerNormalization(name=f"{name}_mlp_norm")(x)


def vit(
    dtype: str = "float32",
    *,
    image: int = 16,
    patch: int = 4,
    width: int = 32,
    heads: int = 4,
    blocks: int = 2,
    classes: int = 10,
    seed: int = 0,
) -> keras.Model:
    """A vision transformer: convolved patches, class token, composite layers as blocks, class logits."""
    with building(dtype):
        pixels = keras.Input((image, image, 3), name="pixels")
        x = keras.layers.Conv2D(width, patch, strides=patch, name="patch_embedding")(pixels)
        x = keras.layers.Reshape(((image // patch) ** 2, width), name="patches")(x)
        x = ClassToken(name="class_token")(x)
        x = AddPositions(name="position_embedding")(x)
        for index in range(blocks):
            x = PreNormBlock(heads, 4 * width, name=f"block_{index}")(x)
        x = keras.layers.LayerNormalization(name="final_norm")(x)
        x = FirstToken(name="first_token")(x)
        return randomize(keras.Model(pixels, keras.layers.Dense(classes, name="head")(x), name="vit"), seed)


def llama(
    dtype: str = "float32",
    *,
    vocabulary: int = 64,
    length: int = 16,
    width: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 64,
    blocks: int = 2,
    tied: bool = False,
    dropout: float = 0.0,
    recomputed: bool | Literal["all"] = False,
    seed: int = 0,
) -> keras.Model:
    """KerasHub's Llama with grouped-query attention and its reverse embedding: logits per token.

    ``recomputed`` blocks are run again in the backward pass; of "all" layers, also those inside of others.
    """
    names = [f"transformer_layer_{index}" for index in range(blocks)] if recomputed else []
    with building(dtype), keras.RematScope("full" if recomputed == "all" else "list_of_layers", layer_names=names):
        backbone = keras_hub.models.LlamaBackbone(
            vocabulary_size=vocabulary,
            num_layers=blocks,
            num_query_heads=heads,
            num_key_value_heads=kv_heads,
            hidden_dim=width,
            intermediate_dim=hidden,
            tie_word_embeddings=tied,
            dropout=dropout,
            dtype=dtype,
            name="llama_backbone",
        )
        inputs = {
            "token_ids": keras.Input((length,), dtype="int32", name="token_ids"),
            "padding_mask": keras.Input((length,), dtype="int32", name="padding_mask"),
        }
        logits = backbone.token_embedding(backbone(inputs), reverse=True)
        return randomize(keras.Model(inputs, logits, name="llama"), seed)


def gemma(
    dtype: str = "float32",
    *,
    vocabulary: int = 64,
    length: int = 16,
    width: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 16,
    hidden: int = 64,
    blocks: int = 2,
    seed: int = 0,
) -> keras.Model:
    """KerasHub's Gemma, whose kernels have the heads first, with its tied embedding: logits per token."""
    with building(dtype):
        backbone = keras_hub.models.GemmaBackbone(
            vocabulary_size=vocabulary,
            num_layers=blocks,
            num_query_heads=heads,
            num_key_value_heads=kv_heads,
            hidden_dim=width,
            intermediate_dim=2 * hidden,  # of gate and up together
            head_dim=head_size,
            dtype=dtype,
            name="gemma_backbone",
        )
        for block in backbone.transformer_layers:
            block.attention.softmax.dtype_policy = keras.DTypePolicy(dtype)  # float32 in KerasHub
        inputs = {
            "token_ids": keras.Input((length,), dtype="int32", name="token_ids"),
            "padding_mask": keras.Input((length,), dtype="int32", name="padding_mask"),
        }
        logits = backbone.token_embedding(backbone(inputs), reverse=True)
        return randomize(keras.Model(inputs, logits, name="gemma"), seed)


def convnet(
    dtype: str = "float32", *, image: int = 16, channels: int = 8, classes: int = 10, blocks: int = 2, seed: int = 0
) -> keras.Model:
    """Residual blocks of convolutions, with batch normalization, up and down again in space: one logit per class."""
    with building(dtype):
        layers = keras.layers
        images = keras.Input((image, image, 3), name="images")
        x = layers.Conv2D(channels, 3, strides=2, padding="same", name="stem")(images)
        for block in range(blocks):
            y = layers.Conv2D(2 * channels, 3, padding="same", use_bias=False, name=f"block_{block}_wide")(x)
            y = layers.Activation("gelu")(layers.BatchNormalization(name=f"block_{block}_norm")(y))
            y = layers.DepthwiseConv2D(3, padding="same", name=f"block_{block}_depthwise")(y)
            x = x + layers.Conv2D(channels, 1, name=f"block_{block}_narrow")(y)
        y = layers.Conv2D(2 * channels, 3, strides=2, groups=4, name="grouped_wide")(x)
        x = layers.Conv2DTranspose(channels, 2, strides=2, name="narrow_transposed")(y)
        y = layers.MaxPooling2D()(layers.Conv2DTranspose(2 * channels, 3, name="wide_transposed")(x))
        x = layers.GlobalAveragePooling2D()(layers.Conv2D(channels, 3, use_bias=False, name="last_narrow")(y))
        return randomize(keras.Model(images, layers.Dense(classes, name="head")(x), name="convnet"), seed)


def handwritten(
    dtype: str = "float32",
    *,
    vocabulary: int = 64,
    length: int = 16,
    width: int = 32,
    heads: int = 4,
    kv_heads: int = 4,
    experts: int = 4,
    hidden: int = 16,
    blocks: int = 2,
    seed: int = 0,
) -> keras.Model:
    """A decoder with experts whose layers are written in plain ops: logits per token."""
    with building(dtype):
        tokens = keras.Input((length,), dtype="int32", name="tokens")
        x = keras.layers.Embedding(vocabulary, width, name="token_embedding")(tokens)
        for block in range(blocks):
            normed = keras.layers.LayerNormalization(name=f"block_{block}_attention_norm")(x)
            x = x + HandwrittenAttention(heads, kv_heads, name=f"block_{block}_attention")(normed)
            normed = keras.layers.LayerNormalization(name=f"block_{block}_experts_norm")(x)
            x = x + Experts(experts, hidden, name=f"block_{block}_experts")(normed)
        logits = keras.layers.Dense(vocabulary, name="head")(x)
        return randomize(keras.Model(tokens, logits, name="handwritten"), seed)


def subclassed(
    dtype: str = "float32",
    *,
    inputs: int = 16,
    width: int = 32,
    hidden: int = 64,
    blocks: int = 2,
    outputs: int = 8,
    seed: int = 0,
) -> keras.Model:
    """A subclassed model of gated feed-forward blocks with its own train step."""
    with building(dtype):
        model = GatedModel(width, hidden, blocks, outputs, name="subclassed")
        model(np.zeros((1, inputs), "float32"))
        return randomize(model, seed)


def tied(
    dtype: str = "float32",
    *,
    vocabulary: int = 64,
    length: int = 16,
    width: int = 32,
    hidden: int = 64,
    repeats: int = 2,
    seed: int = 0,
) -> keras.Model:
    """A model that shares weights: one feed-forward called ``repeats`` times, a tied embedding."""
    with building(dtype):
        tokens = keras.Input((length,), dtype="int32", name="tokens")
        embedding = keras.layers.ReversibleEmbedding(vocabulary, width, name="token_embedding")
        norm = keras.layers.LayerNormalization(name="norm")
        up = keras.layers.Dense(hidden, activation="gelu", name="up")
        down = keras.layers.Dense(width, name="down")
        x = embedding(tokens)
        for index in range(repeats):
            x = keras.layers.Add(name=f"residual_{index}")([x, down(up(norm(x)))])
        return randomize(keras.Model(tokens, embedding(x, reverse=True), name="tied"), seed)


# Batches, for the builders' default sizes. Features are float32, so that every dtype sees the same numbers.


def _regression_batch(rng: np.random.Generator, size: int) -> Batch:
    return _normal(rng, size, 16), _normal(rng, size, 8)


def _token_batch(rng: np.random.Generator, size: int) -> Batch:
    return _integers(rng, 64, size, 16), _integers(rng, 64, size, 16)


def _encoder_batch(rng: np.random.Generator, size: int) -> Batch:
    mask = _padding_mask(rng, size)
    tokens = np.where(mask, 1 + _integers(rng, 63, size, 16), 0).astype("int32")
    return {"tokens": tokens, "padding_mask": mask}, _integers(rng, 4, size)


def _mask_zero_batch(rng: np.random.Generator, size: int) -> Batch:
    x, y = _encoder_batch(rng, size)
    return {"tokens": x["tokens"]}, y


def _image_batch(rng: np.random.Generator, size: int) -> Batch:
    return _normal(rng, size, 16, 16, 3), _integers(rng, 10, size)


def _llama_batch(rng: np.random.Generator, size: int) -> Batch:
    tokens, targets = _token_batch(rng, size)
    return {"token_ids": tokens, "padding_mask": _padding_mask(rng, size).astype("int32")}, targets


def _padding_mask(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return (size, 16) of bool: each row has two real positions or more, row 0 some padding."""
    lengths = rng.integers(2, 17, size)
    lengths[0] = min(lengths[0], 15)
    return np.arange(16) < lengths[:, None]


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype("float32")


def _integers(rng: np.random.Generator, end: int, *shape: int) -> np.ndarray:
    return rng.integers(0, end, shape).astype("int32")


# The registry


_BLOCK_RULES: dict[str, Axes] = {
    "block_[0-9]+.attention/(query|key|value)/kernel": (None, "model", None),
    "block_[0-9]+.attention/(query|key|value)/bias": ("model", None),
    "block_[0-9]+.attention/attention_output/kernel": ("model", None, None),
    "block_[0-9]+.up/kernel": (None, "model"),
    "block_[0-9]+.up/bias": ("model",),
    "block_[0-9]+.down/kernel": ("model", None),
}
_FEED_FORWARD_RULES: dict[str, Axes] = {
    "up/kernel": (None, "model"),
    "up/bias": ("model",),
    "down/kernel": ("model", None),
}
_GPT_RULES: dict[str, Axes] = {
    "token_embedding/embeddings": ("model", None),
    **_BLOCK_RULES,
    "head/kernel": (None, "model"),
    "head/bias": ("model",),
}
_LLAMA_RULES: dict[str, Axes] = {
    "token_embedding/embeddings": ("model", None),
    "token_embedding/reverse_embeddings": (None, "model"),
    "transformer_layer_[0-9]+/self_attention/(query|key|value)/kernel": (None, "model", None),
    "transformer_layer_[0-9]+/self_attention/attention_output/kernel": ("model", None, None),
    "transformer_layer_[0-9]+/feedforward_(gate|intermediate)_dense/kernel": (None, "model"),
    "transformer_layer_[0-9]+/feedforward_output_dense/kernel": ("model", None),
}
_GEMMA_RULES: dict[str, Axes] = {
    "token_embedding/embeddings": ("model", None),
    "decoder_block_[0-9]+/attention/(query|key|value)/kernel": ("model", None, None),
    "decoder_block_[0-9]+/attention/attention_output/kernel": ("model", None, None),
    "decoder_block_[0-9]+/ffw_gating(_2)?/kernel": (None, "model"),
    "decoder_block_[0-9]+/ffw_linear/kernel": ("model", None),
}
_CONVNET_RULES: dict[str, Axes] = {
    ".*wide/kernel": (None, None, None, "model"),
    ".*wide_transposed/kernel": (None, None, "model", None),
    ".*(wide|wide_transposed|depthwise)/bias": ("model",),
    ".*_norm/.*": ("model",),
    ".*(depthwise|[0-9]_narrow|last_narrow)/kernel": (None, None, "model", None),
    "narrow_transposed/kernel": (None, None, None, "model"),
}
_HANDWRITTEN_RULES: dict[str, Axes] = {
    "token_embedding/embeddings": ("model", None),
    ".*_attention/(query|key|value)/kernel": (None, "model"),
    ".*_attention/(query|key|value)/bias": ("model",),
    ".*_attention/merge/kernel": ("model", None),
    ".*_experts/(up|down)": ("model", None, None),
    ".*_experts/bias": ("model", None),
    "head/kernel": (None, "model"),
    "head/bias": ("model",),
}
_SUBCLASSED_RULES: dict[str, Axes] = {
    "subclassed/block_[0-9]+/(gate|up)/kernel": (None, "model"),
    "subclassed/block_[0-9]+/(gate|up)/bias": ("model",),
    "subclassed/block_[0-9]+/down/kernel": ("model", None),
}
_TIED_RULES: dict[str, Axes] = {"token_embedding/embeddings": ("model", None), **_FEED_FORWARD_RULES}

_CROSSENTROPY = "SparseCategoricalCrossentropy"

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("mlp", mlp, _regression_batch, "MeanSquaredError", _FEED_FORWARD_RULES, "mlp"),
        Case("gpt", gpt, _token_batch, _CROSSENTROPY, _GPT_RULES, "gpt"),
        Case("encoder", encoder, _encoder_batch, _CROSSENTROPY, _BLOCK_RULES, "encoder"),
        Case(
            "encoder_mask_zero",
            partial(encoder, mask="zero"),
            _mask_zero_batch,
            _CROSSENTROPY,
            _BLOCK_RULES,
            "encoder",
        ),
        Case("vit", vit, _image_batch, _CROSSENTROPY, _BLOCK_RULES, "vit"),
        Case("llama", llama, _llama_batch, _CROSSENTROPY, _LLAMA_RULES, "llama"),
        Case("gemma", gemma, _llama_batch, _CROSSENTROPY, _GEMMA_RULES, "gemma"),
        Case("convnet", convnet, _image_batch, _CROSSENTROPY, _CONVNET_RULES, None),
        Case("handwritten", handwritten, _token_batch, _CROSSENTROPY, _HANDWRITTEN_RULES, None),
        Case("subclassed", subclassed, _regression_batch, "MeanSquaredError", _SUBCLASSED_RULES, None),
        Case("tied", tied, _token_batch, _CROSSENTROPY, _TIED_RULES, None),
    )
}

# What `make test` takes of the zoo where each model costs seconds: one of each kind. `make sweep` takes all of them.
USUAL = frozenset(
    {
        "convnet",
        "encoder_mask_zero",
        "gpt",
        "gpt with dropout",
        "handwritten",
        "llama",
        "llama with tied embeddings and one head for keys",
        "subclassed",
        "tied",
    }
)


def usual(names: Iterable[str], those: Set[str] = USUAL) -> list[Any]:
    """Return the names as parameters of a test, but for ``those`` marked as slow."""
    return [name if name in those else pytest.param(name, marks=pytest.mark.slow) for name in names]
