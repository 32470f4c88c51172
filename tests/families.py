"""KerasHub's model families, tiny, with the presets that shard them, and published sizes.

The models are KerasHub's own tasks where it has one, so that the output head is there too. Each has heads,
key-value heads and experts enough for four ranks. What a block of each communicates is a table in plans/README.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import keras
import numpy as np

from tests.family import (
    LENGTH,
    VOCABULARY,
    WIDTH,
    Family,
    Sizes,
    causal_lm,
    image_batch,
    image_classifier,
    language_batch,
    segment_batch,
    speech_batch,
    text_class_batch,
    text_classifier,
    tied_logits,
    translation_batch,
)
from tests.more_families import MORE, PUBLISHED_OF_MORE
from tp_planner.ir.plan import Plan
from tp_planner.ir.step import Collective
from tp_planner.planner import make_plan

SECOND_BLOCK = re.compile(r"(?P<stack>.*?)([_/](layers?|blocks?|encoder)_1|_1_inner_layer_0)(/.*|$)")
TABLE_HEAD = ("| family | preset | forward | backward |", "|---|---|---|---|")


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
        Family("gpt2", "GPT-2", "GPT2Backbone", {**_PLAIN, **_POSITIONS}, causal_lm, language_batch, "gpt2"),
        Family("opt", "OPT", "OPTBackbone", {**_PLAIN, **_POSITIONS}, causal_lm, language_batch, "opt"),
        Family("bert", "BERT", "BertBackbone", {**_PLAIN, **_POSITIONS}, text_classifier, segment_batch, "bert"),
        Family(
            "roberta",
            "RoBERTa",
            "RobertaBackbone",
            {**_PLAIN, **_POSITIONS},
            text_classifier,
            text_class_batch,
            "roberta",
        ),
        Family("vit", "ViT", "ViTBackbone", _VIT, image_classifier, image_batch, "vit"),
        Family("llama3", "Llama 3", "Llama3Backbone", _GROUPED, causal_lm, language_batch, "llama"),
        Family(
            "mistral",
            "Mistral",
            "MistralBackbone",
            {**_GROUPED, "sliding_window": 4},
            causal_lm,
            language_batch,
            "mistral",
        ),
        Family("phi3", "Phi-3", "Phi3Backbone", _GROUPED, causal_lm, language_batch, "phi3"),
        Family("qwen2.5", "Qwen 2.5", "QwenBackbone", _GROUPED, causal_lm, language_batch, "qwen"),
        Family("qwen3", "Qwen 3", "Qwen3Backbone", {**_GROUPED, "head_dim": 8}, causal_lm, language_batch, "qwen3"),
        Family("gemma", "Gemma", "GemmaBackbone", {**_GROUPED, "head_dim": 8}, causal_lm, language_batch, "gemma"),
        Family(
            "gemma2",
            "Gemma 2",
            "GemmaBackbone",
            {**_GROUPED, "head_dim": 8, **_GEMMA_2},
            causal_lm,
            language_batch,
            "gemma",
        ),
        Family(
            "gemma3",
            "Gemma 3",
            "Gemma3Backbone",
            {**_GROUPED, "head_dim": 8, **_GEMMA_3},
            causal_lm,
            language_batch,
            "gemma",
        ),
        Family("t5", "T5", "T5Backbone", _PLAIN, tied_logits, translation_batch, "t5"),
        Family("whisper", "Whisper", "WhisperBackbone", {**_PLAIN, **_WHISPER}, tied_logits, speech_batch, "whisper"),
        Family(
            "mixtral",
            "Mixtral",
            "MixtralBackbone",
            {**_GROUPED, "num_experts": 4},
            causal_lm,
            language_batch,
            "mixtral",
        ),
        Family(
            "qwen3_moe",
            "Qwen 3 MoE",
            "Qwen3MoeBackbone",
            {**_GROUPED, "head_dim": 8, "num_experts": 4, "top_k": 2, "moe_intermediate_dim": WIDTH},
            causal_lm,
            language_batch,
            "qwen3_moe",
        ),
    )
}


EVERY = {**FAMILIES, **MORE}  # also those of which only the layout and the training are tested


# What a block communicates


@cache
def plan_of(name: str, parts: int) -> Plan:
    """Return the tiny family's plan by its preset on so many ranks; any process plans for all of them."""
    family = EVERY[name]
    inputs, _ = family.batch(np.random.default_rng(0), 2)
    return make_plan(family.build(), family.layout(parts), inputs)


def table_rows(family: Family, plan: Plan) -> Iterator[str]:
    """Yield the family's rows of the table in plans/README.md: collectives of a block, one row for each stack."""
    stacks: dict[str, list[Collective]] = {}
    for each in plan.collectives:
        if block := SECOND_BLOCK.match(each.layer):
            stacks.setdefault(block["stack"], []).append(each)
    for stack, collectives in sorted(stacks.items(), reverse=True):
        title = family.title if len(stacks) == 1 else f"{family.title} {_apart(stack, list(stacks))}"
        forward, backward = (_counted(collectives, phase) for phase in ("forward", "backward"))
        yield f"| {title} | `{family.preset}` | {forward} | {backward} |"


def _apart(stack: str, stacks: list[str]) -> str:
    """Return the words of a stack's name that not all stacks have."""
    words = {each: each.rpartition("/")[2].split("_") for each in stacks}
    return " ".join(word for word in words[stack] if not all(word in others for others in words.values()))


def _counted(collectives: list[Collective], phase: str) -> str:
    """Return how many of each kind there are, those of activations before those for weights."""
    kinds = Counter((not each.of_activation, each.kind) for each in collectives if each.phase == phase)
    return (
        "-"
        if not kinds
        else ", ".join(
            f"{count} {kind.replace('_', '-')}{' for weights' if for_weights else ''}"
            for (for_weights, kind), count in sorted(
                kinds.items(), key=lambda item: (item[0][0], item[0][1] != "all_reduce")
            )
        )
    )


# Published sizes: dims of the checkpoints that KerasHub has of each family, but for the number of layers.

_PLAIN_KEYS = ("num_heads", "hidden_dim", "intermediate_dim", "vocabulary_size")
_GROUPED_KEYS = ("num_query_heads", "num_key_value_heads", "hidden_dim", "intermediate_dim", "vocabulary_size")
_HEAD_KEYS = (*_GROUPED_KEYS, "head_dim")

PUBLISHED: dict[str, tuple[tuple[str, ...], dict[str, tuple[Any, ...]]]] = {
    "gpt2": (
        _PLAIN_KEYS,
        {
            "base": (12, 768, 3072, 50257),
            "medium": (16, 1024, 4096, 50257),
            "large": (20, 1280, 5120, 50257),
            "extra large": (25, 1600, 6400, 50257),
        },
    ),
    "opt": (
        _PLAIN_KEYS,
        {
            "125M": (12, 768, 3072, 50272),
            "1.3B": (32, 2048, 8192, 50272),
            "2.7B": (32, 2560, 10240, 50272),
            "6.7B": (32, 4096, 16384, 50272),
        },
    ),
    "bert": (
        _PLAIN_KEYS,
        {
            "tiny": (2, 128, 512, 30522),
            "small": (8, 512, 2048, 30522),
            "medium": (8, 512, 2048, 30522),
            "base": (12, 768, 3072, 30522),
            "base, cased": (12, 768, 3072, 28996),
            "base, Chinese": (12, 768, 3072, 21128),
            "base, multilingual": (12, 768, 3072, 119547),
            "large": (16, 1024, 4096, 30522),
            "large, cased": (16, 1024, 4096, 28996),
        },
    ),
    "roberta": (_PLAIN_KEYS, {"base": (12, 768, 3072, 50265), "large": (16, 1024, 4096, 50265)}),
    "vit": (
        ("num_heads", "hidden_dim", "mlp_dim", "patch_size", "image_shape"),
        {
            "base": (12, 768, 3072, 16, (224, 224, 3)),
            "large": (16, 1024, 4096, 16, (384, 384, 3)),
            "huge": (16, 1280, 5120, 14, (224, 224, 3)),
        },
    ),
    "llama3": (
        (*_GROUPED_KEYS, "tie_word_embeddings"),
        {
            "8B": (32, 8, 4096, 14336, 128256, False),
            "70B": (64, 8, 8192, 28672, 128256, False),
            "405B": (128, 8, 16384, 53248, 128256, False),
            "3.2 1B": (32, 8, 2048, 8192, 128256, True),
            "3.2 3B": (24, 8, 3072, 8192, 128256, True),
        },
    ),
    "mistral": (
        _HEAD_KEYS,
        {
            "7B": (32, 8, 4096, 14336, 32000, 128),
            "7B 0.3": (32, 8, 4096, 14336, 32768, 128),
            "NeMo 12B": (32, 8, 5120, 14336, 131072, 128),
            "Small 24B": (32, 8, 5120, 32768, 131072, 128),
        },
    ),
    "phi3": (_GROUPED_KEYS, {"mini": (32, 32, 3072, 8192, 32064), "medium": (40, 10, 5120, 17920, 32064)}),
    "qwen2.5": (
        (*_GROUPED_KEYS, "tie_word_embeddings"),
        {
            "0.5B": (14, 2, 896, 4864, 151936, True),
            "1.5B": (12, 2, 1536, 8960, 151936, True),
            "3B": (16, 2, 2048, 11008, 151936, True),
            "7B": (28, 4, 3584, 18944, 152064, False),
            "14B": (40, 8, 5120, 13824, 152064, False),
            "32B": (40, 8, 5120, 27648, 152064, False),
            "72B": (64, 8, 8192, 29568, 152064, False),
        },
    ),
    "qwen3": (
        (*_HEAD_KEYS, "tie_word_embeddings"),
        {
            "0.6B": (16, 8, 1024, 3072, 151936, 128, True),
            "1.7B": (16, 8, 2048, 6144, 151936, 128, True),
            "4B": (32, 8, 2560, 9728, 151936, 128, True),
            "8B": (32, 8, 4096, 12288, 151936, 128, False),
            "14B": (40, 8, 5120, 17408, 151936, 128, False),
            "32B": (64, 8, 5120, 25600, 151936, 128, False),
        },
    ),
    "gemma": (_HEAD_KEYS, {"2B": (8, 1, 2048, 32768, 256000, 256), "7B": (16, 16, 3072, 49152, 256000, 256)}),
    "gemma2": (
        _HEAD_KEYS,
        {
            "2B": (8, 4, 2304, 18432, 256000, 256),
            "9B": (16, 8, 3584, 28672, 256000, 256),
            "27B": (32, 16, 4608, 73728, 256000, 128),
        },
    ),
    "gemma3": (
        _HEAD_KEYS,
        {
            "270M": (4, 1, 640, 2048, 262144, 256),
            "1B": (4, 1, 1152, 6912, 262144, 256),
            "4B": (8, 4, 2560, 10240, 262144, 256),
            "12B": (16, 8, 3840, 15360, 262144, 256),
            "27B": (32, 16, 5376, 21504, 262144, 128),
        },
    ),
    "t5": (
        (*_PLAIN_KEYS, "key_value_dim", "use_gated_activation"),
        {
            "small": (8, 512, 2048, 32128, 64, False),
            "base": (12, 768, 3072, 32128, 64, False),
            "large": (16, 1024, 4096, 32128, 64, False),
            "1.1 small": (6, 512, 1024, 32128, 64, True),
            "1.1 base": (12, 768, 2048, 32128, 64, True),
            "1.1 large": (16, 1024, 2816, 32128, 64, True),
            "1.1 XL": (32, 2048, 5120, 32128, 64, True),
            "1.1 XXL": (64, 4096, 10240, 32128, 64, True),
        },
    ),
    "whisper": (
        _PLAIN_KEYS,
        {
            "tiny": (6, 384, 1536, 51865),
            "base": (8, 512, 2048, 51865),
            "small": (12, 768, 3072, 51865),
            "small, English": (12, 768, 3072, 51864),
            "medium": (16, 1024, 4096, 51865),
            "large": (20, 1280, 5120, 51865),
        },
    ),
    "mixtral": (
        (*_GROUPED_KEYS, "num_experts"),
        {"8x7B": (32, 8, 4096, 14336, 32000, 8), "8x22B": (48, 8, 6144, 16384, 32768, 8)},
    ),
    "qwen3_moe": (
        (*_HEAD_KEYS, "moe_intermediate_dim", "num_experts"),
        {
            "30B": (32, 4, 2048, 6144, 151936, 128, 768, 128),
            "235B": (64, 4, 4096, 12288, 151936, 128, 1536, 128),
        },
    ),
    **PUBLISHED_OF_MORE,
}


# As wide as they are published

LENGTH_OF_TEXT = 512
_TEXT: dict[str, Sizes] = {
    "gpt2": {"max_sequence_length": LENGTH_OF_TEXT},
    "opt": {"max_sequence_length": LENGTH_OF_TEXT},
    "bert": {"max_sequence_length": LENGTH_OF_TEXT},
    "roberta": {"max_sequence_length": LENGTH_OF_TEXT},
    "mistral": {"sliding_window": LENGTH_OF_TEXT},
    "gemma2": {"sliding_window_size": LENGTH_OF_TEXT},
    "gemma3": {"sliding_window_size": LENGTH_OF_TEXT},
    "whisper": {"max_encoder_sequence_length": LENGTH_OF_TEXT, "max_decoder_sequence_length": LENGTH_OF_TEXT},
}


def published(name: str, batch: int = 8, blocks: int = 2) -> tuple[keras.Model, Any]:
    """Return blocks of a family with its head, as wide as its first published size, on meta, and specs of a batch."""
    keys, rows = PUBLISHED[name]
    sizes = dict(zip(keys, next(iter(rows.values())), strict=True))
    family = FAMILIES[name]
    with keras.device("meta"):
        model = family.head(family.make_backbone(**sizes, **_TEXT.get(name, {}), num_layers=blocks))
    specs = {
        each.name: keras.InputSpec(
            shape=(batch, *(LENGTH_OF_TEXT if size is None else size for size in each.shape[1:])), dtype=each.dtype
        )
        for each in model.inputs
    }
    return model, specs if isinstance(model.input, dict) else specs[model.inputs[0].name]
