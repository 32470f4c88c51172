"""Equal blocks are planned and simulated once, and the plan is the one that running all of them gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import keras
import pytest

from tests.models import CASES
from tp_planner import planner
from tp_planner.frontend.blocks import Blocks, layer_signature
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.planner import make_plan


def layout_of(name: str) -> Layout:
    rules = tuple(LayoutRule(pattern, axes) for pattern, axes in CASES[name].rules.items())
    return Layout(Mesh((("model", 2),)), rules)


@pytest.mark.parametrize("name", ["gpt", "encoder", "encoder_mask_zero", "vit", "llama", "subclassed"])
def test_plan_is_that_of_all_blocks(name: str) -> None:
    """One block for all gives the same plan, simulated step included, as running each of them."""
    model = CASES[name].build()
    assert_equal_plans(model, layout_of(name))


def assert_equal_plans(model: keras.Model, layout: Layout, **options: Any) -> None:
    optimizer = keras.optimizers.AdamW(weight_decay=0.01)
    once = make_plan(model, layout, optimizer=optimizer, **options)
    with mock.patch.object(planner, "find_blocks", return_value=Blocks.none()):
        each = make_plan(model, layout, optimizer=optimizer, **options)
    assert once.to_json() == each.to_json()


def test_one_of_equal_blocks_runs() -> None:
    """Of four equal decoder layers only the first runs: in two traces, two proofs, and the simulated step."""
    model, runs = CASES["llama"].build(blocks=4), []
    call = type(model.get_layer("llama_backbone").transformer_layers[0]).call

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(self.name)
        return call(self, *args, **kwargs)

    with mock.patch.object(type(model.get_layer("llama_backbone").transformer_layers[0]), "call", counted):
        make_plan(model, layout_of("llama"))
    assert runs == ["transformer_layer_0"] * 5


class Block(keras.layers.Layer):
    """A dense layer, and an attribute that its call may depend on."""

    def __init__(self, note: Any, units: int = 4, activation: Any = "relu", **options: Any) -> None:
        super().__init__(**options)
        self.note = note
        self.dense = keras.layers.Dense(units, activation, name="dense")

    def build(self, shape: Any) -> None:
        self.dense.build(shape)

    def call(self, x: Any) -> Any:
        return self.dense(x)


def built(*args: Any, **kwargs: Any) -> Block:
    block = Block(*args, **kwargs)
    block.build((2, 4))
    return block


DIFFERENT: dict[str, tuple[Callable[[], Block], Callable[[], Block]]] = {
    "a number": (lambda: built(1), lambda: built(2)),
    "numbers in a list": (lambda: built([1, 2]), lambda: built([1, 3])),
    "an object": (lambda: built(object()), lambda: built(object())),
    "units": (lambda: built(0, units=4), lambda: built(0, units=5)),
    "activation": (lambda: built(0, activation="relu"), lambda: built(0, activation="gelu")),
    "dtype policy": (lambda: built(0), lambda: built(0, dtype="mixed_bfloat16")),
}


def test_equal_layers() -> None:
    """Layers that differ in their names only are equal."""
    assert layer_signature(built(1, name="a"), {}) == layer_signature(built(1, name="b"), {})


@pytest.mark.parametrize("difference", DIFFERENT)
def test_different_layers(difference: str) -> None:
    """Whatever a call may depend on tells layers apart."""
    one, other = DIFFERENT[difference]
    assert layer_signature(one(), {}) != layer_signature(other(), {})


def test_frozen_layers_are_different() -> None:
    frozen = built(1)
    frozen.trainable = False
    assert layer_signature(frozen, {}) != layer_signature(built(1), {})
