"""The GPT that every version computes: its sizes, its weights as plain arrays, and its Keras model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

Weights = Mapping[str, np.ndarray]

BLOCKS = 4
VOCABULARY = 256
# The blocks are sharded; embeddings, norms and head are replicated.
RULES: dict[str, tuple[str | None, ...]] = {
    "block_[0-9]+_attention/(query|key|value)/kernel": (None, "model", None),
    "block_[0-9]+_attention/(query|key|value)/bias": ("model", None),
    "block_[0-9]+_attention/attention_output/kernel": ("model", None, None),
    "block_[0-9]+_up/kernel": (None, "model"),
    "block_[0-9]+_up/bias": ("model",),
    "block_[0-9]+_down/kernel": ("model", None),
}
COLUMN = re.compile("block_[0-9]+_(attention/(query|key|value)|up)/(kernel|bias)")
ROW = re.compile("block_[0-9]+_(attention/attention_output|down)/kernel")


@dataclass(frozen=True, slots=True)
class Size:
    """What one model is as wide, long and many as. ``heads`` and ``hidden`` are those that one process holds."""

    name: str
    width: int
    length: int
    batch: int
    heads: int
    head_size: int
    hidden: int

    def divided(self, parts: int) -> Size:
        """Return the size of the shards that one of ``parts`` processes holds."""
        return Size(
            self.name,
            self.width,
            self.length,
            self.batch,
            self.heads // parts,
            self.head_size,
            self.hidden // parts,
        )


SIZES: dict[str, Size] = {
    size.name: size
    for size in (
        Size("tiny", width=32, length=32, batch=4, heads=4, head_size=8, hidden=128),
        Size("medium", width=256, length=64, batch=8, heads=8, head_size=32, hidden=1024),
        Size("large", width=512, length=256, batch=4, heads=8, head_size=64, hidden=2048),
    )
}


def draw_weights(size: Size, seed: int = 0) -> dict[str, np.ndarray]:
    """Return every weight by its Keras path, in float32; biases and norms are random too. Kernels are 2-D."""
    rng = np.random.default_rng(seed)
    width, inner = size.width, size.heads * size.head_size
    weights: dict[str, np.ndarray] = {}

    def embedding(path: str, rows: int) -> None:
        weights[f"{path}/embeddings"] = rng.standard_normal((rows, width))

    def norm(path: str) -> None:
        weights[f"{path}/gamma"] = 1.0 + 0.2 * rng.standard_normal(width)
        weights[f"{path}/beta"] = 0.3 * rng.standard_normal(width)

    def dense(path: str, inputs: int, outputs: int) -> None:
        weights[f"{path}/kernel"] = rng.standard_normal((inputs, outputs)) / inputs**0.5
        weights[f"{path}/bias"] = 0.3 * rng.standard_normal(outputs)

    embedding("token_embedding", VOCABULARY)
    embedding("position_embedding", size.length)
    for index in range(BLOCKS):
        block = f"block_{index}"
        norm(f"{block}_attention_norm")
        for name in ("query", "key", "value"):
            dense(f"{block}_attention/{name}", width, inner)
        dense(f"{block}_attention/attention_output", inner, width)
        norm(f"{block}_mlp_norm")
        dense(f"{block}_up", width, size.hidden)
        dense(f"{block}_down", size.hidden, width)
    norm("final_norm")
    dense("head", width, VOCABULARY)
    return {path: weight.astype("float32") for path, weight in weights.items()}


def own_weights(weights: Weights, rank: int, parts: int) -> dict[str, np.ndarray]:
    """Return the weights that process ``rank`` of ``parts`` holds, Megatron-style."""
    return {path: _own_part(path, weight, rank, parts) for path, weight in weights.items()}


def _own_part(path: str, weight: np.ndarray, rank: int, parts: int) -> np.ndarray:
    if COLUMN.fullmatch(path):
        return np.split(weight, parts, axis=-1)[rank]
    return np.split(weight, parts, axis=0)[rank] if ROW.fullmatch(path) else weight


def draw_batch(size: Size, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and labels, int32 of shape (batch, length)."""
    rng = np.random.default_rng(seed)
    tokens, labels = (rng.integers(0, VOCABULARY, (size.batch, size.length)).astype("int32") for _ in range(2))
    return tokens, labels


class AddPositions(keras.layers.Layer):
    """Adds one learned vector per position to (batch, positions, width)."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.embeddings = self.add_weight(shape=input_shape[1:], name="embeddings")

    def call(self, x: Any) -> Any:
        return x + self.embeddings


def keras_gpt(size: Size, weights: Weights, nested: bool = False, of_libraries: bool = False) -> keras.Model:
    """Return a causal GPT of flat Keras layers, norms before attention and feed-forward, logits per token.

    Where it is ``nested`` each block is a layer of its own; ``of_libraries`` it has no layer with code of its own.
    """
    tokens = keras.Input((size.length,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(VOCABULARY, size.width, name="token_embedding")(tokens)
    x = _with_positions(x, size) if of_libraries else AddPositions(name="position_embedding")(x)
    for index in range(BLOCKS):
        name = f"block_{index}"
        if nested:
            x = (inner_model(size, name) if of_libraries else Block(size, name))(x)
        else:
            x = _keras_block(x, name, size)
    x = keras.layers.LayerNormalization(name="final_norm")(x)
    model = keras.Model(tokens, keras.layers.Dense(VOCABULARY, name="head")(x), name="gpt")
    for variable in model.trainable_variables:
        variable.assign(weights[variable.path].reshape(variable.shape))
    return model


def _with_positions(x: Any, size: Size) -> Any:
    from keras_hub.layers import PositionEmbedding  # takes seconds

    positions = PositionEmbedding(size.length, name="position_embedding")(x)
    return keras.layers.Add(name="embeddings_sum")([x, positions])


class Block(keras.layers.Layer):
    """A block as a layer; its layers have the names that they have in a model of flat layers."""

    def __init__(self, size: Size, name: str) -> None:
        super().__init__(name=name)
        self.inner = inner_model(size, name)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.built = True

    def call(self, x: Any) -> Any:
        return self.inner(x)


def inner_model(size: Size, name: str) -> keras.Model:
    """Return a block as a model."""
    inputs = keras.Input((size.length, size.width))
    return keras.Model(inputs, _keras_block(inputs, name, size), name=f"{name}_inner")


def _keras_block(x: Any, name: str, size: Size) -> Any:
    y = keras.layers.LayerNormalization(name=f"{name}_attention_norm")(x)
    attention = keras.layers.MultiHeadAttention(size.heads, size.head_size, name=f"{name}_attention")
    x = keras.layers.Add(name=f"{name}_attention_residual")([x, attention(y, y, use_causal_mask=True)])
    y = keras.layers.LayerNormalization(name=f"{name}_mlp_norm")(x)
    y = keras.layers.Dense(size.hidden, activation="gelu", name=f"{name}_up")(y)
    y = keras.layers.Dense(size.width, name=f"{name}_down")(y)
    return keras.layers.Add(name=f"{name}_mlp_residual")([x, y])
