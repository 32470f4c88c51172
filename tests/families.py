"""KerasHub's model families, tiny: how to build and feed each, and the preset that shards it.

The models are KerasHub's own tasks where it has one, so that the output head is there too. Each has heads,
key-value heads and experts enough for four ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import keras_hub
import numpy as np

from tests.models import Axes, Batch, Case, building, randomize
from tp_planner.frontend.layout_file import find_layout_file, read_layout_file

Sizes = Mapping[str, Any]

VOCABULARY, LENGTH, CLASSES, WIDTH = 64, 12, 4, 32


@dataclass(frozen=True, slots=True)
class Family:
    """One family: its backbone's class and tiny sizes, what makes a model of it, batches, and its preset."""

    name: str
    backbone: str
    sizes: Sizes
    head: Callable[[keras.Model], keras.Model]
    batch: Callable[[np.random.Generator, int], Batch]
    preset: str

    @property
    def case(self) -> Case:
        """Return the family as a case of the zoo, with the preset as its rules."""
        return Case(self.name, self.build, self.batch, "SparseCategoricalCrossentropy", self.rules, self.preset)

    @property
    def rules(self) -> dict[str, Axes]:
        rules = read_layout_file(find_layout_file(self.preset)).rules
        return {rule.pattern: rule.axes for rule in rules}  # type: ignore[misc]  # no preset lists axes

    def build(self, dtype: str = "float32", *, seed: int = 0, **sizes: Any) -> keras.Model:
        """Return the model with its head and random weights; ``sizes`` replace those of the backbone."""
        with building(dtype):
            return randomize(self.head(self.make_backbone(dtype, **sizes)), seed)

    def make_backbone(self, dtype: str = "float32", **sizes: Any) -> keras.Model:
        """Return the backbone alone, as KerasHub initialises it."""
        return getattr(keras_hub.models, self.backbone)(**{**self.sizes, **sizes}, dtype=dtype, name=self.name)


# Heads


def _causal_lm(backbone: keras.Model) -> keras.Model:
    """Return KerasHub's task of the backbone's family: logits per token."""
    task = getattr(keras_hub.models, type(backbone).__name__.replace("Backbone", "CausalLM"))
    return task(backbone=backbone, preprocessor=None, name=f"{backbone.name}_lm")


def _text_classifier(backbone: keras.Model) -> keras.Model:
    """Return KerasHub's task of the backbone's family: logits per class."""
    task = getattr(keras_hub.models, type(backbone).__name__.replace("Backbone", "TextClassifier"))
    return task(
        backbone=backbone, num_classes=CLASSES, preprocessor=None, dropout=0.0, name=f"{backbone.name}_classifier"
    )


def _image_classifier(backbone: keras.Model) -> keras.Model:
    """Return KerasHub's task of the backbone's family: logits per class."""
    return keras_hub.models.ViTImageClassifier(
        backbone=backbone, num_classes=CLASSES, preprocessor=None, name=f"{backbone.name}_classifier"
    )


def _tied_logits(backbone: keras.Model) -> keras.Model:
    """Return the model that multiplies the decoder's output by the token embedding, as these families do."""
    logits = backbone.token_embedding(backbone.output["decoder_sequence_output"], reverse=True)
    return keras.Model(backbone.input, logits, name=f"{backbone.name}_lm")


# Batches


def _text(rng: np.random.Generator, size: int, prefix: str = "") -> dict[str, np.ndarray]:
    """Return tokens and padding mask; each row has two real positions or more, row 0 some padding."""
    lengths = rng.integers(2, LENGTH + 1, size)
    lengths[0] = min(lengths[0], LENGTH - 1)
    mask = np.arange(LENGTH) < lengths[:, None]
    return {f"{prefix}token_ids": _integers(rng, VOCABULARY, size, LENGTH), f"{prefix}padding_mask": mask.astype("int32")}


def _language_batch(rng: np.random.Generator, size: int) -> Batch:
    return _text(rng, size), _integers(rng, VOCABULARY, size, LENGTH)


def _text_class_batch(rng: np.random.Generator, size: int) -> Batch:
    return _text(rng, size), _integers(rng, CLASSES, size)


def _segment_batch(rng: np.random.Generator, size: int) -> Batch:
    segments = {"segment_ids": _integers(rng, 2, size, LENGTH)}
    return {**_text(rng, size), **segments}, _integers(rng, CLASSES, size)


def _image_batch(rng: np.random.Generator, size: int) -> Batch:
    return rng.standard_normal((size, 8, 8, 3)).astype("float32"), _integers(rng, CLASSES, size)


def _translation_batch(rng: np.random.Generator, size: int) -> Batch:
    texts = {**_text(rng, size, "encoder_"), **_text(rng, size, "decoder_")}
    return texts, _integers(rng, VOCABULARY, size, LENGTH)


def _speech_batch(rng: np.random.Generator, size: int) -> Batch:
    features = {"encoder_features": rng.standard_normal((size, 16, 8)).astype("float32")}
    return {**features, **_text(rng, size, "decoder_")}, _integers(rng, VOCABULARY, size, LENGTH)


def _integers(rng: np.random.Generator, end: int, *shape: int) -> np.ndarray:
    return rng.integers(0, end, shape).astype("int32")


# The registry

_SIZES: Sizes = {"vocabulary_size": VOCABULARY, "num_layers": 2, "hidden_dim": WIDTH, "intermediate_dim": 2 * WIDTH}
_PLAIN: Sizes = {**_SIZES, "num_heads": 4, "dropout": 0.0}
_GROUPED: Sizes = {**_SIZES, "num_query_heads": 8, "num_key_value_heads": 4}
_POSITIONS = {"max_sequence_length": LENGTH}
_GEMMA_2 = {
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "attention_logit_soft_cap": 50.0,
    "final_logit_soft_cap": 30.0,
    "use_sliding_window_attention": True,
    "sliding_window_size": 4,
}
_GEMMA_3 = {
    "image_size": None,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
    "sliding_window_size": 4,
}
_VIT = {"image_shape": (8, 8, 3), "patch_size": 4, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
_WHISPER = {"num_mels": 8, "max_encoder_sequence_length": 16, "max_decoder_sequence_length": LENGTH}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("gpt2", "GPT2Backbone", {**_PLAIN, **_POSITIONS}, _causal_lm, _language_batch, "gpt2"),
        Family("opt", "OPTBackbone", {**_PLAIN, **_POSITIONS}, _causal_lm, _language_batch, "opt"),
        Family("bert", "BertBackbone", {**_PLAIN, **_POSITIONS}, _text_classifier, _segment_batch, "bert"),
        Family("roberta", "RobertaBackbone", {**_PLAIN, **_POSITIONS}, _text_classifier, _text_class_batch, "roberta"),
        Family("vit", "ViTBackbone", _VIT, _image_classifier, _image_batch, "vit"),
        Family("llama3", "Llama3Backbone", _GROUPED, _causal_lm, _language_batch, "llama"),
        Family("mistral", "MistralBackbone", {**_GROUPED, "sliding_window": 4}, _causal_lm, _language_batch, "mistral"),
        Family("phi3", "Phi3Backbone", _GROUPED, _causal_lm, _language_batch, "phi3"),
        Family("qwen2.5", "QwenBackbone", _GROUPED, _causal_lm, _language_batch, "qwen"),
        Family("qwen3", "Qwen3Backbone", {**_GROUPED, "head_dim": 8}, _causal_lm, _language_batch, "qwen3"),
        Family("gemma", "GemmaBackbone", {**_GROUPED, "head_dim": 8}, _causal_lm, _language_batch, "gemma"),
        Family("gemma2", "GemmaBackbone", {**_GROUPED, "head_dim": 8, **_GEMMA_2}, _causal_lm, _language_batch, "gemma"),
        Family("gemma3", "Gemma3Backbone", {**_GROUPED, "head_dim": 8, **_GEMMA_3}, _causal_lm, _language_batch, "gemma"),
        Family("t5", "T5Backbone", _PLAIN, _tied_logits, _translation_batch, "t5"),
        Family("whisper", "WhisperBackbone", {**_PLAIN, **_WHISPER}, _tied_logits, _speech_batch, "whisper"),
        Family("mixtral", "MixtralBackbone", {**_GROUPED, "num_experts": 4}, _causal_lm, _language_batch, "mixtral"),
        Family(
            "qwen3_moe",
            "Qwen3MoeBackbone",
            {**_GROUPED, "head_dim": 8, "num_experts": 4, "top_k": 2, "moe_intermediate_dim": WIDTH},
            _causal_lm,
            _language_batch,
            "qwen3_moe",
        ),
    )
}
