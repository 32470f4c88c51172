"""More of KerasHub's families: their layouts and training are tested as those of the others are, in the slow suite.

Of several encoders each is built with sizes of its own. Flux's layers have automatic names, which change with what was
built before: its rules are for the paths that its layers have.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT

from tests.family import (
    CLASSES,
    LENGTH,
    VOCABULARY,
    WIDTH,
    Family,
    Part,
    Sizes,
    causal_lm,
    integers,
    language_batch,
    segment_batch,
    text,
    text_class_batch,
    text_classifier,
    tied_logits,
    translation_batch,
)
from tests.models import Batch
from tp_planner.ir.layout import LayoutRule

# Heads


def _classes_of_first(backbone: keras.Model) -> keras.Model:
    """Return the model that makes logits per class of the first token."""
    logits = keras.layers.Dense(CLASSES, name="head")(backbone.output[:, 0])
    return keras.Model(backbone.input, logits, name=f"{backbone.name}_classifier")


def _classes_of_mean(backbone: keras.Model) -> keras.Model:
    """Return the model that makes logits per class of the mean of all patches."""
    logits = keras.layers.Dense(CLASSES, name="head")(keras.ops.mean(backbone.output, 1))
    return keras.Model(backbone.input, logits, name=f"{backbone.name}_classifier")


def _classes_without_mask(backbone: keras.Model) -> keras.Model:
    """Return the classifier by the first token; what stands for masked tokens is used in pretraining alone."""
    masks = backbone.get_layer("encoder_block_attn_mask_layer")
    masks.trainable = False
    masks.mask_emb.assign(keras.ops.zeros_like(masks.mask_emb))
    return _classes_of_first(backbone)


def _texts_of_images(backbone: keras.Model) -> keras.Model:
    """Return the model of the logits of each text for each image."""
    return keras.Model(backbone.input, backbone.output["vision_logits"], name=f"{backbone.name}_contrast")


def _itself(backbone: keras.Model) -> keras.Model:
    return backbone


# Batches


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype("float32")


def _pairs(rng: np.random.Generator, size: int) -> Batch:
    texts = {"images": _normal(rng, size, 8, 8, 3), "token_ids": integers(rng, VOCABULARY, size, LENGTH)}
    return texts, np.arange(size, dtype="int32")


def _matches(rng: np.random.Generator, size: int) -> Batch:
    x, places = _pairs(rng, size)
    return x, np.eye(size, dtype="float32")[places]


def _image_and_text(rng: np.random.Generator, size: int) -> Batch:
    x, y = language_batch(rng, size)
    return {**x, "images": _normal(rng, size, 8, 8, 3), "response_mask": integers(rng, 2, size, LENGTH)}, y


def _text_with_images(rng: np.random.Generator, size: int) -> Batch:
    places = np.tile(np.arange(2, 6, dtype="int32"), (size, 1))
    mask = np.isin(np.arange(LENGTH), places[0]).astype("int32")
    images = {
        "images": _normal(rng, size, 1, 8, 8, 3),
        "vision_indices": places,
        "vision_mask": np.tile(mask, (size, 1)),
    }
    return {**text(rng, size), **images}, integers(rng, VOCABULARY, size, LENGTH)


def _noise(rng: np.random.Generator, size: int) -> Batch:
    latent = {"latent": _normal(rng, size, 8, 8, 4), "timestep": rng.random((size, 1)).astype("float32")}
    context = {"context": _normal(rng, size, 5, 16), "pooled_projection": _normal(rng, size, 16)}
    return {**latent, **context}, _normal(rng, size, 8, 8, 4)


def _flux_noise(rng: np.random.Generator, size: int) -> Batch:
    image = {"image": _normal(rng, size, 6, 16), "image_ids": _normal(rng, size, 6, 3)}
    words = {"text": _normal(rng, size, 5, 16), "text_ids": _normal(rng, size, 5, 3), "y": _normal(rng, size, 16)}
    times = {name: rng.random(size).astype("float32") for name in ("timesteps", "guidance")}
    return {**image, **words, **times}, _normal(rng, size, 6, 16)


def _large_images(rng: np.random.Generator, size: int) -> Batch:
    return _normal(rng, size, 16, 16, 3), integers(rng, CLASSES, size)


def _named_images(rng: np.random.Generator, size: int) -> Batch:
    return {"images": _normal(rng, size, 8, 8, 3)}, integers(rng, CLASSES, size)


# Layouts


def flux_rules(backbone: keras.Model) -> tuple[LayoutRule, ...]:
    """Return the rules for Flux, each for the very path of one of its layers' variables."""
    rules: dict[str, tuple[str | None, ...]] = {}

    def pair(up: keras.layers.Dense, down: keras.layers.Dense) -> None:
        rules[up.kernel.path], rules[down.kernel.path] = (None, "model"), ("model", None)
        if up.use_bias:
            rules[up.bias.path] = ("model",)

    for block in backbone.double_blocks:
        pair(block.image_attn.qkv, block.image_attn.proj)
        pair(block.text_attn.qkv, block.text_attn.proj)
        pair(block.image_mlp.layers[0], block.image_mlp.layers[2])
        pair(block.text_mlp.layers[0], block.text_mlp.layers[2])
    for block in backbone.single_blocks:
        pair(block.linear1, block.linear2)
    return tuple(LayoutRule(path, axes) for path, axes in rules.items())


# The registry

_SIZES: Sizes = {"vocabulary_size": VOCABULARY, "num_layers": 2, "hidden_dim": WIDTH, "intermediate_dim": 2 * WIDTH}
_PLAIN: Sizes = {**_SIZES, "num_heads": 4}
_POSITIONS: Sizes = {"max_sequence_length": LENGTH}
_GROUPED: Sizes = {**_SIZES, "num_query_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
_PATCHES: Sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": WIDTH, "intermediate_dim": 2 * WIDTH, "patch_size": 4}
_PICTURE: Sizes = {"image_shape": (8, 8, 3)}
_VIT: Sizes = {"vit_num_layers": 2, "vit_num_heads": 4, "vit_hidden_dim": WIDTH, "vit_intermediate_dim": 2 * WIDTH}
_ALBERT: Sizes = {"num_layers": 4, "num_groups": 2, "embedding_dim": 16}
_GEMMA_3: Sizes = {
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
    "sliding_window_size": 4,
}
_EYES: Sizes = {**_PATCHES, "patch_size": 2, "image_size": 8, "output_dim": WIDTH, "pool_size": 2}
_DIFFUSER: Sizes = {
    "patch_size": 2,
    "hidden_dim": WIDTH,
    "num_layers": 3,
    "num_heads": 4,
    "position_size": 8,
    "latent_shape": (8, 8, 4),
    "context_shape": (None, 16),
    "pooled_projection_shape": (16,),
}
_FLUX: Sizes = {
    "input_channels": 16,
    "hidden_size": WIDTH,
    "mlp_ratio": 2.0,
    "num_heads": 4,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 2, 2],
    "theta": 10000,
    "use_bias": True,
    "guidance_embed": True,
    "image_shape": (6, 16),
    "text_shape": (5, 16),
    "image_ids_shape": (6, 3),
    "text_ids_shape": (5, 3),
    "y_shape": (16,),
}
_SWIN: Sizes = {
    "image_shape": (16, 16, 3),
    "embed_dim": 16,
    "depths": (1, 2),
    "num_heads": (4, 4),
    "window_size": 2,
    "patch_size": 2,
    "drop_path": 0.0,
}
_DINO: Sizes = {**_PATCHES, **_PICTURE, "position_embedding_shape": (8, 8, 3), "use_mask_token": False}


def _encoders(name: str) -> Sizes:
    """Return the two encoders of a model of images and texts, of the family that the name begins with."""
    words = {**_PLAIN, **_POSITIONS, "embedding_dim": WIDTH}
    return {
        "vision_encoder": Part(f"{name}VisionEncoder", {**_PATCHES, **_PICTURE}),
        "text_encoder": Part(f"{name}TextEncoder", words),
    }


class _Diffuser(Family):
    """A family whose backbone has no public name: the part of Stable Diffusion that is trained."""

    def make_backbone(self, dtype: str = "float32", **sizes: Any) -> keras.Model:
        return MMDiT(**{**self.sizes, **sizes}, dtype=dtype, name=self.name)


MORE: dict[str, Family] = {
    family.name: family
    for family in (
        Family("bloom", "Bloom", "BloomBackbone", _PLAIN, causal_lm, language_batch, "bloom"),
        Family(
            "falcon",
            "Falcon",
            "FalconBackbone",
            {**_SIZES, "num_attention_heads": 4},
            causal_lm,
            language_batch,
            "falcon",
        ),
        Family(
            "deberta",
            "DeBERTa",
            "DebertaV3Backbone",
            {**_PLAIN, **_POSITIONS, "bucket_size": 8, "dropout": 0.0},
            text_classifier,
            text_class_batch,
            "deberta",
        ),
        Family(
            "albert",
            "ALBERT",
            "AlbertBackbone",
            {**_PLAIN, **_POSITIONS, **_ALBERT},
            text_classifier,
            segment_batch,
            "albert",
        ),
        Family(
            "bart",
            "BART",
            "BartBackbone",
            {**_PLAIN, **_POSITIONS, "dropout": 0.0},
            tied_logits,
            translation_batch,
            "bart",
        ),
        Family(
            "gpt_oss",
            "GPT-OSS",
            "GptOssBackbone",
            {**_GROUPED, "num_experts": 4, "sliding_window": 4},
            causal_lm,
            language_batch,
            "gpt_oss",
        ),
        Family(
            "clip",
            "CLIP",
            "CLIPBackbone",
            {**_encoders("CLIP"), "projection_dim": 16},
            _texts_of_images,
            _pairs,
            "clip",
        ),
        Family(
            "siglip",
            "SigLIP",
            "SigLIPBackbone",
            _encoders("SigLIP"),
            _texts_of_images,
            _matches,
            "siglip",
            "BinaryCrossentropy",
        ),
        Family(
            "pali_gemma",
            "PaliGemma",
            "PaliGemmaBackbone",
            {**_GROUPED, **_VIT, "image_size": 8, "vit_patch_size": 4, "vit_name": "vit"},
            causal_lm,
            _image_and_text,
            "pali_gemma",
        ),
        Family(
            "gemma3_vision",
            "Gemma 3 with images",
            "Gemma3Backbone",
            {**_GROUPED, **_GEMMA_3, "image_size": 8, "vision_encoder": Part("Gemma3VisionEncoder", _EYES)},
            causal_lm,
            _text_with_images,
            "gemma3_vision",
        ),
        _Diffuser(
            "stable_diffusion_3",
            "Stable Diffusion 3",
            "MMDiT",
            _DIFFUSER,
            _itself,
            _noise,
            "stable_diffusion_3",
            "MeanSquaredError",
        ),
        _Diffuser(
            "stable_diffusion_3.5",
            "Stable Diffusion 3.5",
            "MMDiT",
            {**_DIFFUSER, "qk_norm": "rms_norm", "dual_attention_indices": (0, 1)},
            _itself,
            _noise,
            "stable_diffusion_3",
            "MeanSquaredError",
        ),
        Family("flux", "Flux", "FluxBackbone", _FLUX, _itself, _flux_noise, flux_rules, "MeanSquaredError"),
        Family("xlnet", "XLNet", "XLNetBackbone", _PLAIN, _classes_without_mask, segment_batch, "xlnet"),
        Family("swin", "Swin", "SwinTransformerBackbone", _SWIN, _classes_of_mean, _large_images, "swin"),
        Family("dinov2", "DINOv2", "DINOV2Backbone", _DINO, _classes_of_first, _named_images, "dinov2"),
        Family(
            "dinov2_giant",
            "DINOv2 giant",
            "DINOV2Backbone",
            {**_DINO, "use_swiglu_ffn": True, "num_register_tokens": 2},
            _classes_of_first,
            _named_images,
            "dinov2",
        ),
    )
}

# Published sizes: dims of the checkpoints that KerasHub has of each family, but for the number of layers.

_PLAIN_KEYS = ("num_heads", "hidden_dim", "intermediate_dim", "vocabulary_size")

PUBLISHED_OF_MORE: dict[str, tuple[tuple[str, ...], dict[str, tuple[Any, ...]]]] = {
    "bloom": (
        _PLAIN_KEYS,
        {
            "560M": (16, 1024, 4096, 250880),
            "1.1B": (16, 1536, 6144, 250880),
            "1.7B": (16, 2048, 8192, 250880),
            "3B": (32, 2560, 10240, 250880),
        },
    ),
    "falcon": (
        ("num_attention_heads", "hidden_dim", "intermediate_dim", "vocabulary_size"),
        {"1B": (32, 2048, 8192, 50304)},
    ),
    "deberta": (
        _PLAIN_KEYS,
        {
            "extra small": (6, 384, 1536, 128100),
            "small, base": (12, 768, 3072, 128100),
            "large": (16, 1024, 4096, 128100),
        },
    ),
    "albert": (
        (*_PLAIN_KEYS, "embedding_dim", "num_groups"),
        {
            "base": (12, 768, 3072, 30000, 128, 1),
            "large": (16, 1024, 4096, 30000, 128, 1),
            "extra large": (16, 2048, 8192, 30000, 128, 1),
            "extra extra large": (64, 4096, 16384, 30000, 128, 1),
        },
    ),
    "bart": (_PLAIN_KEYS, {"base": (12, 768, 3072, 50265), "large": (16, 1024, 4096, 50265)}),
}
