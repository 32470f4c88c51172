"""Boundaries at the torch functions inside a layer's code, and the sizes of shards it is given.

That such models are the same function as on one device is tested with the rest of the zoo, whose "handwritten" and
"gemma" need it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch

import tp_planner
from tests.models import CASES, building, randomize
from tests.workers import Pools, layout_map
from tp_planner.frontend.trace import trace
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.plan import LayerPlan
from tp_planner.planner import make_plan
from tp_planner.readable_plan import Plan
from tp_planner.storage.variables import whole_tensor

Rules = dict[str, tuple[str | None, ...]]

WIDTH, HEADS, LENGTH = 16, 4, 6
UP: Rules = {"up/kernel": (None, "model"), "up/bias": ("model",)}
DOWN: Rules = {**UP, "down/kernel": ("model", None)}


class Code(keras.layers.Layer):
    """Two Dense layers, up and down, with a piece of code between them; ``extra`` is a weight for it."""

    def __init__(self, between: Callable[..., Any], extra: tuple[int, ...] = (), **options: Any) -> None:
        super().__init__(**options)
        self.between, self.extra_shape = between, extra
        self.flag = False
        self.up = keras.layers.Dense(2 * WIDTH, name="up", dtype=self.dtype_policy)
        self.down = keras.layers.Dense(WIDTH, name="down", dtype=self.dtype_policy)

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], 2 * WIDTH))
        self.extra = self.add_weight(shape=self.extra_shape, name="extra") if self.extra_shape else None

    def call(self, x: Any, training: bool = False) -> Any:
        return self.down(self.between(self.up(x), self, training))


def build(between: Callable[..., Any], extra: tuple[int, ...] = (), dtype: str = "float32") -> keras.Model:
    with building(dtype):
        x = keras.Input((LENGTH, WIDTH), name="x")
        return randomize(keras.Model(x, Code(between, extra, name="code", dtype=dtype)(x), name="model"))


def planned(model: keras.Model, rules: Rules, parts: int = 2) -> Plan:
    wanted = tuple(LayoutRule(f"(.*/)?{pattern}", axes) for pattern, axes in rules.items())
    return make_plan(model, Layout(Mesh((("model", parts),)), wanted))


def layer_of(plan: Plan, name: str) -> LayerPlan:
    return next(layer for layer in plan.layers if layer.layer.endswith(name))


def changes(plan: Plan) -> list[str]:
    """Return what changes at the functions of the code, as text."""
    found = []
    for function in [each for layer in plan.layers if layer.layer.endswith("code") for each in layer.functions]:
        found += [f"{function} in {each.forward} {each.backward}" for _, each in function.inputs]
        found += [f"{function} size {whole}->{local}" for _, whole, local in function.sizes]
        if function.output is not None:
            found.append(f"{function} out {function.output.forward} {function.output.backward}")
    return found


# The pieces of code


def heads_in_numbers(x: Any, layer: Code, training: bool) -> Any:
    split = keras.ops.reshape(x, (-1, LENGTH, HEADS, 2 * WIDTH // HEADS))
    return keras.ops.reshape(keras.ops.softmax(split), (-1, LENGTH, 2 * WIDTH))


def heads_from_shapes(x: Any, layer: Code, training: bool) -> Any:
    split = keras.ops.reshape(x, (-1, LENGTH, x.shape[-1] // 8, 8))
    return keras.ops.reshape(keras.ops.softmax(split), x.shape)


def scale_of_each(x: Any, layer: Code, training: bool) -> Any:
    return x * keras.ops.tanh(layer.extra)


def scale_of_each_and_places(x: Any, layer: Code, training: bool) -> Any:
    if layer.flag:  # as code does that writes into a cache
        places = torch.arange(3) * torch.tensor(2)
        x = keras.ops.slice_update(x, [0, places[1] * 1, 0], x[:, 2:3])
    return x * keras.ops.tanh(layer.extra)


def norm_of_heads(x: Any, layer: Code, training: bool) -> Any:
    heads = keras.ops.reshape(x, (-1, LENGTH, HEADS, 2 * WIDTH // HEADS))
    scaled = heads * keras.ops.rsqrt(keras.ops.mean(heads * heads, axis=-1, keepdims=True) + 1e-6) * layer.extra
    return keras.ops.reshape(scaled, (-1, LENGTH, 2 * WIDTH))


def whole_meets_shards(x: Any, layer: Code, training: bool) -> Any:
    return x * keras.ops.sum(keras.ops.tanh(layer.extra))


def sum_over_features(x: Any, layer: Code, training: bool) -> Any:
    return keras.ops.broadcast_to(keras.ops.sum(x * x, axis=-1, keepdims=True), (*x.shape[:-1], 2 * WIDTH))


def large_sum(x: Any, layer: Code, training: bool) -> Any:
    longer = keras.ops.concatenate([x] * 10, axis=1)
    scores = keras.ops.einsum("ble,mke->blmk", longer, longer)
    return x * keras.ops.mean(scores)


def another_number_in_training(x: Any, layer: Code, training: bool) -> Any:
    if training:
        x = keras.ops.reshape(x, (-1, LENGTH * 2, WIDTH))
        x = keras.ops.reshape(x, (-1, LENGTH, 2 * WIDTH))
    return heads_in_numbers(x, layer, training)


def another_path_by_flag(x: Any, layer: Code, training: bool) -> Any:
    return x if layer.flag else heads_in_numbers(x, layer, training)


@keras.saving.register_keras_serializable("test_functions")
class Falling(keras.layers.Layer):
    """Makes less of each feature the later it is among all, as attention with linear biases does of heads."""

    def call(self, x: Any) -> Any:
        features = keras.ops.shape(x)[-1]
        return x * keras.ops.convert_to_tensor([1.0 / (1 + number) for number in range(features)], dtype=x.dtype)


def falling(dtype: str = "float32") -> keras.Model:
    """Return two Dense layers, with one between them that reads how many features there are."""
    with building(dtype):
        x = keras.Input((LENGTH, WIDTH), name="x")
        hidden = Falling(name="falling")(keras.layers.Dense(2 * WIDTH, name="up")(x))
        return randomize(keras.Model(x, keras.layers.Dense(WIDTH, name="down")(hidden), name="model"))


def reshaped() -> keras.Model:
    """Return two Dense layers, with Keras's Reshape to heads and back between them, and a Softmax over heads."""
    with building("float32"):
        x = keras.Input((LENGTH, WIDTH), name="x")
        hidden = keras.layers.Dense(2 * WIDTH, name="up")(x)
        hidden = keras.layers.Reshape((LENGTH, HEADS, 2 * WIDTH // HEADS), name="split")(hidden)
        hidden = keras.layers.Reshape((LENGTH, 2 * WIDTH), name="joined")(keras.layers.Softmax(name="softmax")(hidden))
        return randomize(keras.Model(x, keras.layers.Dense(WIDTH, name="down")(hidden), name="model"))


@pytest.mark.parametrize(
    ("between", "extra", "expected"),
    [
        (heads_in_numbers, (), ["reshape 1 size 4->2", "reshape 2 size 32->16"]),
        (heads_from_shapes, (), []),
        (scale_of_each, (2 * WIDTH,), ["mul 1 in R->S(0) S(0)->R"]),
        (whole_meets_shards, (1,), ["mul 1 in R P->R"]),
        (sum_over_features, (), ["sum 1 out P->R R"]),
    ],
)
def test_changes_inside_a_layer(between: Callable[..., Any], extra: tuple[int, ...], expected: list[str]) -> None:
    """What a layer's own code needs to run on shards, and no more."""
    plan = planned(build(between, extra), DOWN)
    assert changes(plan) == expected


def test_a_vector_is_gathered_rather_than_a_region_ends() -> None:
    """Where shards of heads meet those of what scales each head, the scale is gathered, and heads stay in shards."""
    plan = planned(build(norm_of_heads, (2 * WIDTH // HEADS,)), {**DOWN, "extra": ("model",)})
    assert layer_of(plan, "up").output is None
    (use,) = layer_of(plan, "code").uses
    assert str(use.boundary.forward) == "S(0)->R"
    assert [(each.kind, each.phase) for each in plan.collectives] == [
        ("all_gather", "forward"),
        ("all_reduce", "forward"),
        ("reduce_scatter", "backward"),
    ]


def test_a_sum_larger_than_its_shards_is_not_taken() -> None:
    """Where to sum would move more than to gather what is summed, the shards are gathered."""
    plan = planned(build(large_sum), UP)
    assert changes(plan) == []
    assert layer_of(plan, "up").output is not None
    assert "would communicate more than it takes to gather its inputs" in layer_of(plan, "up").reason


def test_code_that_differs_in_training_is_given_nothing() -> None:
    """The functions of a layer are counted; where training and inference count differently, nothing can change."""
    plan = planned(build(another_number_in_training), UP)
    assert changes(plan) == []
    assert "gathered" in layer_of(plan, "up").reason


def test_functions_are_recorded_only_where_something_is_in_the_way() -> None:
    """A trace without them is quicker; its ops are the same."""
    model = build(heads_in_numbers)
    plain, recorded = trace(model), trace(model, functions=True)
    assert plain.functions is None
    assert recorded.functions is not None
    assert recorded.ops == plain.ops
    assert [each.number for each in recorded.functions if each.name == "reshape"] == [1, 2]


@pytest.mark.parametrize(("make", "layers"), [(falling, ["falling"]), (reshaped, ["split", "joined"])])
def test_code_that_reads_sizes_sees_the_whole(make: Callable[[], keras.Model], layers: list[str]) -> None:
    """No region ends at a layer that would be wrong by the sizes of its shards: it sees those of the whole."""
    plan = planned(make(), DOWN)
    assert layer_of(plan, "up").output is None
    assert [layer.layer for layer in plan.layers if layer.sees_whole] == layers
    assert [each.kind for each in plan.collectives] == ["all_reduce"]
    assert str(plan).count("sees sizes of the whole") == len(layers)
    assert Plan.from_json(plan.to_json()) == plan


def test_code_reads_sizes_of_shards_where_that_is_right() -> None:
    plan = planned(build(heads_from_shapes), DOWN)
    assert not any(layer.sees_whole for layer in plan.layers)


# On the ranks


def train_falling(jit_compile: bool) -> tuple[float, int]:
    return train_two([falling("float64") for _ in range(2)], DOWN, jit_compile)


def train_with_scale_in_shards() -> tuple[float, int]:
    models = [build(norm_of_heads, (2 * WIDTH // HEADS,), "float64") for _ in range(2)]
    return train_two(models, {**DOWN, "extra": ("model",)}, False)


def train_two(models: list[keras.Model], patterns: Rules, jit_compile: bool) -> tuple[float, int]:
    """Return how far outputs and weights are from the single device's, at most, and of how many."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((4, LENGTH, WIDTH)), rng.standard_normal((4, LENGTH, WIDTH))
    rules = {f"(.*/)?{pattern}": axes for pattern, axes in patterns.items()}
    tp_planner.parallelize(models[1], layout_map(rules), inputs=x)
    for model in models:
        model.compile("sgd", "mse", jit_compile=jit_compile)
        for _ in range(4):
            model.train_on_batch(x, y)
    weights = [[keras.ops.convert_to_numpy(whole_tensor(each)) for each in model.variables] for model in models]
    outputs = [[model.predict_on_batch(x)] for model in models]
    pairs = [*zip(*weights, strict=True), *zip(*outputs, strict=True)]
    return max(float(np.abs(one - other).max()) for one, other in pairs), len(pairs)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_code_that_sees_the_whole_trains_as_one_device(pools: Pools, jit_compile: bool) -> None:
    for error, compared in pools(2).run(train_falling, jit_compile):
        assert compared == 5  # two kernels, two biases, what is predicted
        assert error < 1e-12


@pytest.mark.parametrize("parts", [2, 4])
def test_a_gathered_vector_trains_as_one_device(pools: Pools, parts: int) -> None:
    for error, compared in pools(parts).run(train_with_scale_in_shards):
        assert compared == 6  # two kernels, two biases, the scale, what is predicted
        assert error < 1e-12


def call_by_another_path() -> str:
    model = build(another_path_by_flag)
    code = next(layer for layer in model.layers if layer.name == "code")
    rules = {f"(.*/)?{pattern}": axes for pattern, axes in UP.items()}
    tp_planner.parallelize(model, layout_map({**rules, "(.*/)?down/kernel": ("model", None)}))
    x = keras.ops.ones((2, LENGTH, WIDTH))
    model(x)
    code.flag = True
    try:
        model(x)
    except tp_planner.ParallelRuntimeError as error:
        message = str(error)
    code.flag = False
    model(x)  # nothing is left of the call that failed
    return message


def test_another_path_through_the_code_is_refused(pools: Pools) -> None:
    """A layer that leaves out a function at which something changes fails, on every rank, and can be called again."""
    message = (
        "layer 'code' runs other code than was planned: its call 1 of torch's reshape is another one; call it as in "
        "the traced call, or tp_planner.restore(model) first"
    )
    assert [message in found for found in pools(2).run(call_by_another_path)] == [True, True]


def outputs_by_a_path_with_places() -> list[np.ndarray]:
    models = [build(scale_of_each_and_places, (2 * WIDTH,), "float64") for _ in range(2)]
    rules = {f"(.*/)?{pattern}": axes for pattern, axes in DOWN.items()}
    tp_planner.parallelize(models[1], layout_map(rules))
    x = np.random.default_rng(0).standard_normal((2, LENGTH, WIDTH))
    outputs = []
    for model in models:
        model.get_layer("code").flag = True
        outputs.append(keras.ops.convert_to_numpy(model(keras.ops.convert_to_tensor(x))))
    return outputs


def test_what_only_works_out_places_is_not_counted(pools: Pools) -> None:
    """Code that also multiplies whole numbers, which it did not in the traced call, has its own product changed."""
    plan = planned(build(scale_of_each_and_places, (2 * WIDTH,)), DOWN)
    assert changes(plan) == ["mul 1 in R->S(0) S(0)->R"]
    for one, other in pools(2).run(outputs_by_a_path_with_places):
        np.testing.assert_allclose(other, one, rtol=1e-12, atol=1e-12)


def test_plan_says_what_its_code_is_given() -> None:
    """The reason of a layer whose code writes sizes, and the cells of the table."""
    case = CASES["handwritten"]
    layout = Layout(Mesh((("model", 2),)), tuple(LayoutRule(*rule) for rule in case.rules.items()))
    text = str(make_plan(case.build(blocks=1), layout))
    assert "reshape 1 size 4->2" in text
    assert "sum 1 out P->R" in text
    assert "with boundaries at functions inside; its code is given the sizes of" in text
