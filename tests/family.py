"""A model family of KerasHub, tiny: how to build and feed it, and the preset that shards it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import keras_hub
import numpy as np

from tests.models import Axes, Batch, Case, building, randomize
from tp_planner.frontend.layout_file import find_layout_file, read_layout_file
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh

Sizes = Mapping[str, Any]

VOCABULARY, LENGTH, CLASSES, WIDTH = 64, 12, 4, 32


@dataclass(frozen=True, slots=True)
class Part:
    """A model that a backbone is made of: its class in KerasHub, and sizes."""

    backbone: str
    sizes: Sizes

    def build(self, dtype: str, name: str) -> keras.Model:
        return getattr(keras_hub.models, self.backbone)(**self.sizes, dtype=dtype, name=name)


@dataclass(frozen=True, slots=True)
class Family:
    """One family: its backbone's class and tiny sizes, what makes a model of it, batches, and what shards it.

    ``sharded_by`` is the name of a preset, or gives the rules of a model whose layers have no names to write rules for.
    """

    name: str
    title: str
    backbone: str
    sizes: Sizes
    head: Callable[[keras.Model], keras.Model]
    batch: Callable[[np.random.Generator, int], Batch]
    sharded_by: str | Callable[[keras.Model], tuple[LayoutRule, ...]]
    loss: str = "SparseCategoricalCrossentropy"

    @property
    def preset(self) -> str:
        """Return the preset's name."""
        return self.sharded_by if isinstance(self.sharded_by, str) else "its paths"

    @property
    def case(self) -> Case:
        """Return the family as a case of the zoo, with the preset as its rules."""
        rules: dict[str, Axes] = {rule.pattern: rule.axes for rule in self.layout(1).rules}  # type: ignore[misc]
        return Case(self.name, self.build, self.batch, self.loss, rules, self.preset)

    def layout(self, parts: int) -> Layout:
        """Return its layout on a mesh of so many ranks."""
        mesh = Mesh((("batch", 1), ("model", parts)))
        if isinstance(self.sharded_by, str):
            return read_layout_file(find_layout_file(self.sharded_by)).on(mesh)
        with building("float32"):
            return Layout(mesh, self.sharded_by(self.make_backbone()))

    def build(self, dtype: str = "float32", *, seed: int = 0, **sizes: Any) -> keras.Model:
        """Return the model with its head and random weights; ``sizes`` replace those of the backbone."""
        with building(dtype):
            backbone = self.make_backbone(dtype, **sizes)
            model = randomize(self.head(backbone), seed)
        for variable in model.non_trainable_variables:
            if variable.name.endswith("embeddings"):  # positions that are not trained, random in each build
                variable.assign(np.random.default_rng(seed).standard_normal(tuple(variable.shape)))
        return model

    def make_backbone(self, dtype: str = "float32", **sizes: Any) -> keras.Model:
        """Return the backbone alone, as KerasHub initialises it."""
        given = {
            key: size.build(dtype, key) if isinstance(size, Part) else size
            for key, size in {**self.sizes, **sizes}.items()
        }
        return getattr(keras_hub.models, self.backbone)(**given, dtype=dtype, name=self.name)


# Heads


def causal_lm(backbone: keras.Model) -> keras.Model:
    """Return KerasHub's task of the backbone's family: logits per token."""
    task = getattr(keras_hub.models, type(backbone).__name__.replace("Backbone", "CausalLM"))
    return task(backbone=backbone, preprocessor=None, name=f"{backbone.name}_lm")


def text_classifier(backbone: keras.Model) -> keras.Model:
    """Return KerasHub's task of the backbone's family: logits per class."""
    task = getattr(keras_hub.models, type(backbone).__name__.replace("Backbone", "TextClassifier"))
    return task(
        backbone=backbone, num_classes=CLASSES, preprocessor=None, dropout=0.0, name=f"{backbone.name}_classifier"
    )


def image_classifier(backbone: keras.Model) -> keras.Model:
    """Return KerasHub's task of the backbone's family: logits per class."""
    return keras_hub.models.ViTImageClassifier(
        backbone=backbone, num_classes=CLASSES, preprocessor=None, name=f"{backbone.name}_classifier"
    )


def tied_logits(backbone: keras.Model) -> keras.Model:
    """Return the model that multiplies the decoder's output by the token embedding, as these families do."""
    logits = backbone.token_embedding(backbone.output["decoder_sequence_output"], reverse=True)
    return keras.Model(backbone.input, logits, name=f"{backbone.name}_lm")


# Batches


def text(rng: np.random.Generator, size: int, prefix: str = "") -> dict[str, np.ndarray]:
    """Return tokens and padding mask; each row has two real positions or more, row 0 some padding."""
    lengths = rng.integers(2, LENGTH + 1, size)
    lengths[0] = min(lengths[0], LENGTH - 1)
    mask = np.arange(LENGTH) < lengths[:, None]
    return {
        f"{prefix}token_ids": integers(rng, VOCABULARY, size, LENGTH),
        f"{prefix}padding_mask": mask.astype("int32"),
    }


def language_batch(rng: np.random.Generator, size: int) -> Batch:
    return text(rng, size), integers(rng, VOCABULARY, size, LENGTH)


def text_class_batch(rng: np.random.Generator, size: int) -> Batch:
    return text(rng, size), integers(rng, CLASSES, size)


def segment_batch(rng: np.random.Generator, size: int) -> Batch:
    segments = {"segment_ids": integers(rng, 2, size, LENGTH)}
    return {**text(rng, size), **segments}, integers(rng, CLASSES, size)


def image_batch(rng: np.random.Generator, size: int) -> Batch:
    return rng.standard_normal((size, 8, 8, 3)).astype("float32"), integers(rng, CLASSES, size)


def translation_batch(rng: np.random.Generator, size: int) -> Batch:
    texts = {**text(rng, size, "encoder_"), **text(rng, size, "decoder_")}
    return texts, integers(rng, VOCABULARY, size, LENGTH)


def speech_batch(rng: np.random.Generator, size: int) -> Batch:
    features = {"encoder_features": rng.standard_normal((size, 16, 8)).astype("float32")}
    return {**features, **text(rng, size, "decoder_")}, integers(rng, VOCABULARY, size, LENGTH)


def integers(rng: np.random.Generator, end: int, *shape: int) -> np.ndarray:
    return rng.integers(0, end, shape).astype("int32")
