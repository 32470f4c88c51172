"""Plans are plain data: JSON there and back, the styles that a layout means."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import keras
import pytest

import tp_planner
from tests.models import CASES, usual
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.planner import make_plan
from tp_planner.readable_plan import Plan


@cache
def plan_case(name: str, parts: int = 2) -> Plan:
    rules = tuple(LayoutRule(pattern, axes) for pattern, axes in CASES[name].rules.items())
    return make_plan(CASES[name].build(), Layout(Mesh((("model", parts),)), rules))


def plan_layers(layers: list[keras.Layer], rules: dict[str, Any], shape: tuple[int, ...] = (8,)) -> Plan:
    inputs = keras.Input(shape)
    outputs = inputs
    for layer in layers:
        outputs = layer(outputs)
    model = keras.Model(inputs, outputs, name="chain")
    named = tuple(LayoutRule(pattern, axes) for pattern, axes in rules.items())
    return make_plan(model, Layout(Mesh((("model", 2),)), named))


def styles(plan: Plan) -> dict[str, str]:
    return {layer.layer: layer.style for layer in plan.layers}


def kinds(plan: Plan) -> list[str]:
    return [f"{each.phase} {each.kind} {each.layer}" for each in plan.collectives]


@pytest.mark.parametrize("parts", [2, *(pytest.param(parts, marks=pytest.mark.slow) for parts in (1, 4))])
@pytest.mark.parametrize("name", usual(CASES))
def test_json_there_and_back(name: str, parts: int) -> None:
    plan = plan_case(name, parts)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).hash == plan.hash


def test_a_plan_that_is_read_or_changed_can_be_written() -> None:
    """It is a plan as users hold it, like that which was made; two of one content are equal."""
    plan = plan_case("gpt")
    for other in (Plan.from_json(plan.to_json()), replace(plan)):
        assert (type(other), other) == (tp_planner.Plan, plan)
        assert (other.to_json(), str(other)) == (plan.to_json(), str(plan))


@pytest.mark.parametrize("blocks", [1, 3])
def test_transformer_blocks_cost_four_all_reduces(blocks: int) -> None:
    """Two forward and two backward for each block, and nothing inside it besides."""
    model = CASES["encoder"].build(blocks=blocks)
    rules = tuple(LayoutRule(pattern, axes) for pattern, axes in CASES["encoder"].rules.items())
    plan = make_plan(model, Layout(Mesh((("model", 2),)), rules))
    for phase in ("forward", "backward"):
        assert [each.kind for each in plan.collectives if each.phase == phase] == ["all_reduce"] * 2 * blocks


def test_column_then_row_is_one_region() -> None:
    plan = plan_layers(
        [keras.layers.Dense(8, "gelu", name="up"), keras.layers.Dense(8, name="down")],
        {"up/kernel": (None, "model"), "up/bias": ("model",), "down/kernel": ("model", None)},
    )
    assert styles(plan) == {"up": "column", "down": "row"}
    assert kinds(plan) == ["forward all_reduce down"]  # the model's input needs no gradient


def test_an_op_that_mixes_the_sharded_dim_closes_the_region() -> None:
    """A normalization over the sharded dim gets the gathered tensor, and the plan says which op asked for it."""
    plan = plan_layers(
        [
            keras.layers.Dense(8, name="up", use_bias=False),
            keras.layers.LayerNormalization(name="norm"),
            keras.layers.Dense(8, name="down"),
        ],
        {"up/kernel": (None, "model"), "down/kernel": ("model", None)},
    )
    assert styles(plan) == {"up": "column", "norm": "replicated", "down": "row"}
    assert kinds(plan) == [
        "forward all_gather up",
        "forward all_reduce down",
        "backward all_gather down",
    ]
    reason = next(layer.reason for layer in plan.layers if layer.layer == "up")
    assert "aten.native_layer_norm.default in 'norm' needs communication between the shards" in reason


def test_softmax_over_the_sharded_dim_runs_after_the_gather() -> None:
    plan = plan_layers([keras.layers.Dense(8, "softmax", name="head")], {"head/kernel": (None, "model")})
    (layer,) = [each for each in plan.layers if each.layer == "head"]
    assert layer.epilogue_after_output == "activation"


def reshaped(width: int, heads: tuple[int, ...]) -> Plan:
    return plan_layers(
        [
            keras.layers.Dense(width, name="up"),
            keras.layers.Reshape(heads, name="heads"),
            keras.layers.Reshape((width,), name="flat"),
            keras.layers.Dense(8, name="down"),
        ],
        {"up/kernel": (None, "model"), "up/bias": ("model",), "down/kernel": ("model", None)},
    )


def test_a_reshape_to_sizes_of_the_whole_is_told_those() -> None:
    """Each rank has whole heads, so the region goes on: the shards are reshaped to this rank's part of the sizes."""
    plan = reshaped(8, (4, 2))
    assert [each.layer for each in plan.layers if each.output is not None] == ["down"]
    assert [each.layer for each in plan.layers if each.sees_whole] == ["heads", "flat"]
    assert kinds(plan) == ["forward all_reduce down"]


def test_a_reshape_that_cuts_shards_across_is_not_trusted() -> None:
    """Of three heads two ranks have one and a half each, so the region ends before it."""
    plan = reshaped(12, (3, 4))
    (layer,) = [each for each in plan.layers if each.layer == "up"]
    assert layer.output is not None
    assert "'heads'" in layer.reason


def test_a_reshape_straight_into_a_row_layer_is_told_the_sizes_of_shards() -> None:
    """One that infers a dim would keep the number of heads on shards, where it has to shrink."""
    plan = plan_layers(
        [
            keras.layers.Dense(8, name="up"),
            keras.layers.Reshape((4, -1), name="heads"),
            keras.layers.EinsumDense("bhd,hdo->bo", 8, name="down"),
        ],
        {"up/kernel": (None, "model"), "down/kernel": ("model", None, None)},
    )
    assert [each.layer for each in plan.layers if each.output is not None] == ["down"]
    (heads,) = [each for each in plan.layers if each.layer == "heads"]
    assert heads.sees_whole
    assert [function.sizes for function in heads.functions] == [((2, 4, 2),)]


def test_uneven_dims_are_gathered_and_said_so() -> None:
    layers = [keras.layers.Dense(7, name="up"), keras.layers.Dense(3, name="head")]
    plan = plan_layers(layers, {"up/kernel": (None, "model"), "head/kernel": (None, "model")})
    layer, head = plan.layers
    assert (head.style, head.reason) == (
        "column",
        "an output dim of the weight is sharded; gathered: ranks have 2, 1 of 3",
    )
    assert (layer.style, layer.reason) == (
        "gathered",
        "stored sharded, gathered at use: 'up/kernel' of shape (8, 7) does not divide evenly by 2",
    )
    (kernel,) = [variable for variable in plan.variables if variable.key == "up/kernel"]
    assert kernel.local_shape == (8, 4)
    assert "7 does not divide by 2, so ranks hold 4, 3" in kernel.reason


def test_unequal_shards_of_a_bias_alone_are_gathered() -> None:
    """Its layer computes whole: parts of the output are those of the kernel."""
    (layer,) = plan_layers(
        [keras.layers.EinsumDense("bc,cde->bde", (7, 4), bias_axes="de", name="query")],
        {"query/bias": ("model", None)},
    ).layers
    reason = "stored sharded, gathered at use: 'query/bias' of shape (7, 4) does not divide evenly by 2"
    assert (layer.style, layer.reason) == ("gathered", reason)


def test_a_rule_on_an_output_keeps_it_whole() -> None:
    """``<layer path>/output`` with no axis ends the region at that layer."""
    layers = [keras.layers.Dense(8, name="up"), keras.layers.Dense(8, name="down")]
    rules = {"up/kernel": (None, "model"), "down/kernel": ("model", None), "up/output": (None, None)}
    plan = plan_layers(layers, rules)
    (layer,) = [each for each in plan.layers if each.layer == "up"]
    assert "rule 'up/output' -> (None, None) keeps its output whole" in layer.reason
    assert layer.output is not None


def test_rules_without_effect_are_noted() -> None:
    plan = plan_layers(
        [keras.layers.Dense(8, name="up")], {"up/kernel": (None, "model"), "gate/kernel": (None, "model")}
    )
    assert plan.notes == ("layout rule 'gate/kernel' matches no variable; closest: 'up/kernel'",)


def test_a_mesh_of_one_device_shards_nothing() -> None:
    plan = plan_case("gpt", parts=1)
    assert not plan.collectives
    assert {str(variable.placement) for variable in plan.variables} == {"R"}


def test_planning_inside_a_subpackage_is_public() -> None:
    """``tp_planner.plan`` takes a LayoutMap and needs no process group."""
    mesh = keras.distribution.DeviceMesh((1, 8), ("batch", "model"), [f"cuda:{rank}" for rank in range(8)])
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map["up/kernel"] = (None, "model")
    plan = tp_planner.plan(CASES["mlp"].build(), layout_map)
    assert (plan.axis, plan.axis_size) == ("model", 8)
