"""The GPT of the demonstration: plain Keras, for every backend."""

from __future__ import annotations

from typing import Any

import keras

BYTES, LENGTH, WIDTH, HEADS, BLOCKS = 256, 64, 64, 8, 2

RULES = {
    "token_embedding/embeddings": ("model", None),
    ".*attention/(query|key|value)/kernel": (None, "model", None),
    ".*attention/attention_output/kernel": ("model", None, None),
    "(.*_up|head)/kernel": (None, "model"),
    "(.*_up|head)/bias": ("model",),
    ".*_down/kernel": ("model", None),
}


class AddPositions(keras.layers.Layer):
    """Adds one learned vector per position to (batch, positions, width)."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.embeddings = self.add_weight(shape=input_shape[1:], initializer="uniform", name="embeddings")

    def call(self, x: Any) -> Any:
        return x + self.embeddings


def build_gpt() -> keras.Model:
    """Return a GPT over bytes: int32 of (batch, positions) to logits.

    Attention has no biases: softmax does not depend on the key's, so Adam would train it on rounding errors.
    """
    tokens = keras.Input((LENGTH,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(BYTES, WIDTH, name="token_embedding")(tokens)
    x = AddPositions(name="position_embedding")(x)
    for index in range(BLOCKS):
        x = gpt_block(x, f"block_{index}")
    x = keras.layers.LayerNormalization(name="final_norm")(x)
    return keras.Model(tokens, keras.layers.Dense(BYTES, name="head")(x), name="gpt")


def gpt_block(x: Any, name: str) -> Any:
    """Return ``x`` after causal attention and a feed-forward network."""
    y = keras.layers.LayerNormalization(name=f"{name}_attention_norm")(x)
    attention = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS, use_bias=False, name=f"{name}_attention")
    x = keras.layers.Add(name=f"{name}_attention_residual")([x, attention(y, y, use_causal_mask=True)])
    y = keras.layers.LayerNormalization(name=f"{name}_mlp_norm")(x)
    y = keras.layers.Dense(4 * WIDTH, activation="gelu", name=f"{name}_up")(y)
    return keras.layers.Add(name=f"{name}_mlp_residual")([x, keras.layers.Dense(WIDTH, name=f"{name}_down")(y)])
