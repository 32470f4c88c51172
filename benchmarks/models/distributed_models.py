"""The models that vs_keras_nightly.py trains, each with its layouts; sizes and the GPT are those of gpt.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from models.gpt import BLOCKS, RULES, VOCABULARY, Size, draw_batch, draw_weights, keras_gpt
from processes.one_script import hub_layout, with_logits

Layout = Callable[[keras.distribution.DeviceMesh], keras.distribution.LayoutMap]
Batch = tuple[Any, np.ndarray]


@dataclass(frozen=True, slots=True)
class Case:
    """A model of any size with a layout, the batch it is trained on and its loss."""

    build: Callable[[Size], keras.Model]
    layout: Layout
    batch: Callable[[Size], Batch]
    loss: Callable[[], keras.losses.Loss]


def by_rules(rules: Mapping[str, tuple[str | None, ...]]) -> Layout:
    """Return the layout of these rules on any mesh."""

    def layout(mesh: keras.distribution.DeviceMesh) -> keras.distribution.LayoutMap:
        layout_map = keras.distribution.LayoutMap(mesh)
        for pattern, axes in rules.items():
            layout_map[pattern] = axes
        return layout_map

    return layout


def mlp(size: Size) -> keras.Model:
    """Return as many pairs of Dense layers as the GPT has blocks."""
    x = inputs = keras.Input((size.width,), name="x")
    for index in range(BLOCKS):
        x = keras.layers.Dense(size.hidden, activation="gelu", name=f"up_{index}")(x)
        x = keras.layers.Dense(size.width, name=f"down_{index}")(x)
    return keras.Model(inputs, x, name="mlp")


def rows(size: Size) -> Batch:
    """Return as many rows as a batch of the others has tokens, and what they are to become."""
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal((size.batch * size.length, size.width)).astype("float32") for _ in range(2))
    return x, y


def llama(size: Size) -> keras.Model:
    from keras_hub.models import LlamaBackbone

    return with_logits(
        LlamaBackbone(
            vocabulary_size=VOCABULARY,
            num_layers=BLOCKS,
            num_query_heads=size.heads,
            num_key_value_heads=size.heads // 2,
            hidden_dim=size.width,
            intermediate_dim=size.hidden,
        )
    )


def llama_unfused(size: Size) -> keras.Model:
    """Return the Llama computing attention by einsum and softmax, as KerasHub does where torch has no fused op."""
    from keras_hub.src.models.llama import llama_attention

    llama_attention.fused_attention_op_available = lambda: False
    return llama(size)


def gemma(size: Size) -> keras.Model:
    from keras_hub.models import GemmaBackbone

    return with_logits(
        GemmaBackbone(
            vocabulary_size=VOCABULARY,
            num_layers=BLOCKS,
            num_query_heads=size.heads,
            num_key_value_heads=size.heads // 2,
            hidden_dim=size.width,
            intermediate_dim=2 * size.hidden,
            head_dim=size.head_size,
        )
    )


def padded_batch(size: Size) -> Batch:
    tokens, labels = draw_batch(size)
    return {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}, labels


def cross_entropy() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def hub_map(name: str) -> Layout:
    """Return the layout that KerasHub has for a model of this name."""
    return lambda mesh: hub_layout(name, mesh)


MLP_RULES = {"up_.*/kernel": (None, "model"), "up_.*/bias": ("model",), "down_.*/kernel": ("model", None)}
# Those of KerasHub as Megatron-LM shards their blocks; embeddings are replicated.
LLAMA_RULES = {
    ".*attention/(query|key|value)/kernel": (None, "model", None),
    ".*attention/attention_output/kernel": ("model", None, None),
    ".*feedforward_(gate|intermediate)_dense/kernel": (None, "model"),
    ".*feedforward_output_dense/kernel": ("model", None),
}
GEMMA_RULES = {
    ".*attention/(query|key|value)/kernel": ("model", None, None),
    ".*attention/attention_output/kernel": ("model", None, None),
    ".*ffw_gating(_2)?/kernel": (None, "model"),
    ".*ffw_linear/kernel": ("model", None),
}

CASES: Mapping[str, Case] = {
    "MLP": Case(mlp, by_rules(MLP_RULES), rows, keras.losses.MeanSquaredError),
    "GPT": Case(lambda size: keras_gpt(size, draw_weights(size)), by_rules(RULES), draw_batch, cross_entropy),
    "Llama": Case(llama, by_rules(LLAMA_RULES), padded_batch, cross_entropy),
    "Llama, unfused": Case(llama_unfused, by_rules(LLAMA_RULES), padded_batch, cross_entropy),
    "Llama, its own map": Case(llama, hub_map("llama"), padded_batch, cross_entropy),
    "Gemma": Case(gemma, by_rules(GEMMA_RULES), padded_batch, cross_entropy),
    "Gemma, its own map": Case(gemma, hub_map("gemma"), padded_batch, cross_entropy),
}
