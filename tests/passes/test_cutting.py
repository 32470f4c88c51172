"""Convolutions over sharded channels: their inputs are cut where they are called, for their code counts groups."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import keras
import numpy as np
import pytest
import torch
from keras import layers

import tp_planner
from tests.test_uses import built, check, step
from tests.workers import WorkerPool, layout_map
from tp_planner import planner
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.placement import Shard

IN, OUT, VECTOR = (None, None, "model", None), (None, None, None, "model"), ("model",)
RULES = {
    "(first|half|narrow|narrower|depth|last)/kernel": IN,
    "(wide|wider)/kernel": OUT,
    "(wide|wider|depth)/bias": VECTOR,
}


def pictures() -> keras.Model:
    """Convolutions of whole inputs, cut over the channels that they take, and two regions of other widths."""
    images = keras.Input((6, 6, 8))
    x = layers.Conv2D(8, 3, padding="same", name="first")(images)
    x = layers.Conv2D(16, 3, strides=2, padding="same", name="half")(x)
    x = layers.Conv2D(8, 1, activation="relu", name="wide")(x)
    x = layers.Conv2D(8, 1, name="narrow")(x)
    x = layers.Conv2D(16, 1, activation="tanh", name="wider")(x)
    x = layers.Conv2D(8, 1, name="narrower")(x)
    x = layers.DepthwiseConv2D(2, padding="same", name="depth")(x)
    return keras.Model(images, layers.Conv2D(4, 1, name="last")(x), name="pictures")


def both() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    models = [built(pictures) for _ in range(2)]
    x = np.random.default_rng(0).standard_normal((3, 6, 6, 8))
    tp_planner.parallelize(models[1], layout_map(RULES), torch.tensor(x))
    single, sharded = (step(model, torch.tensor(x, requires_grad=True)) for model in models)
    return single, sharded


@pytest.mark.parametrize("ranks", [2, 4])
def test_convolutions_of_cut_inputs(pools: Callable[[int], WorkerPool], ranks: int) -> None:
    """Output and every gradient, those of the inputs too, are those of the single device."""
    check(pools(ranks).run(both))


def test_inputs_are_cut_where_a_convolution_is_called() -> None:
    """All at once, and sizes in code of one class are given to all layers of it: a second proof finds no more."""
    layout = Layout(Mesh((("model", 2),)), tuple(LayoutRule(*each) for each in RULES.items()))
    with mock.patch.object(planner, "prove", wraps=planner.prove) as proofs:
        plan = planner.make_plan(built(pictures), layout, keras.InputSpec(shape=(3, 6, 6, 8), dtype="float64"))
    assert proofs.call_count == 2
    plans = {each.layer: each for each in plan.layers}
    for name in ("first", "half", "depth"):
        assert [boundary.forward.target for _, boundary in plans[name].inputs] == [Shard(3)]
        assert not any(function.inputs for function in plans[name].functions)
    given = [each.layer for each in plan.layers if any(function.sizes for function in each.functions)]
    assert given == ["wide", "wider"]


def test_a_vector_is_gathered_before_the_kernel_that_its_shards_meet() -> None:
    """A scale in shards of a whole tensor makes shards, with which no convolution makes shards; whole, it does."""
    images = keras.Input((6, 6, 8))
    x = layers.BatchNormalization(name="norm")(images)
    x = layers.Conv2D(8, 1, use_bias=False, name="wide")(x)
    model = keras.Model(images, layers.Conv2D(8, 1, use_bias=False, name="narrow")(x), name="normalized")
    rules = {"norm/.*": VECTOR, "wide/kernel": OUT, "narrow/kernel": IN}
    layout = Layout(Mesh((("model", 2),)), tuple(LayoutRule(*each) for each in rules.items()))
    plan = planner.make_plan(model, layout, keras.InputSpec(shape=(3, 6, 6, 8), dtype="float32"))
    gathered = {each.layer for each in plan.layers if each.style == "gathered"}
    assert gathered == {"norm"}
    assert [each.kind for each in plan.collectives if each.layer == "narrow"] == ["all_reduce"]


def test_sizes_that_code_of_one_class_reads_are_mended_at_once() -> None:
    """Reshapes of shards of other lengths take one proof that finds the first of them, as one reshape does."""
    x = images = keras.Input((6, 6, 8))
    for number, width in enumerate((8, 16, 32)):
        x = layers.Conv2D(width, 1, use_bias=False, name=f"wide_{number}")(x)
        x = layers.Reshape((1, 1, width), name=f"again_{number}")(layers.GlobalAveragePooling2D()(x))
        x = layers.Conv2D(8, 1, use_bias=False, name=f"narrow_{number}")(x)
    rules = LayoutRule("wide_[0-9]/kernel", OUT), LayoutRule("narrow_[0-9]/kernel", IN)
    inputs = keras.InputSpec(shape=(3, 6, 6, 8), dtype="float32")
    with mock.patch.object(planner, "prove", wraps=planner.prove) as proofs:
        plan = planner.make_plan(keras.Model(images, x, name="reshaped"), Layout(Mesh((("model", 2),)), rules), inputs)
    assert proofs.call_count == 3
    assert [each.layer for each in plan.layers if each.sees_whole] == ["again_0", "again_1", "again_2"]
    assert {each.kind for each in plan.collectives} == {"all_reduce"}
