"""Gradients of inputs are summed while those of weights are computed: the same ones, and other ops run meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tp_planner
from tests.models import CASES
from tests.replicas import relative, whole
from tests.workers import Pools
from tp_planner.frontend.hardware_file import find_hardware_file, read_hardware_file
from tp_planner.frontend.layer_tree import named_layers, named_variables
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.plan import Plan
from tp_planner.ir.step import Collective
from tp_planner.passes import reduce_behind
from tp_planner.passes.estimate_time import estimate_time

Prepare = Callable[[keras.Model], object]


TOLERANCE = {"float64": 1e-11, "float32": 2e-6}  # Keras makes LoRA's kernels in float32 in every model


def plan_behind(model: keras.Model, name: str, least: int = 0, **options: Any) -> Plan:
    """Plan a case with the sums of its gradients behind those of weights, however small they are."""
    with mock.patch.object(reduce_behind, "LEAST_BYTES", least):
        return tp_planner.plan(model, on_two_ranks(CASES[name].rules), **options)


def on_two_ranks(rules: Mapping[str, tuple[str | None, ...]]) -> Layout:
    return Layout(Mesh((("model", 2),)), tuple(LayoutRule(pattern, axes) for pattern, axes in rules.items()))


def nothing(model: keras.Model) -> None:
    pass


def freeze_kernels(model: keras.Model) -> None:
    for key, variable in named_variables(model).items():
        if key.endswith(("query/kernel", "block_1_up/kernel")):
            variable.trainable = False


def tune_by_lora(model: keras.Model) -> None:
    for name, layer in named_layers(model).items():
        if name.endswith(("query", "_up")):
            layer.enable_lora(2)
            for variable in (layer.lora_kernel_a, layer.lora_kernel_b):
                variable.assign(np.random.default_rng(3).standard_normal(variable.shape))


# Case, sizes, what is done before planning, options of the plan, and whether calls are replayed.
WAYS: Mapping[str, tuple[str, Mapping[str, Any], Prepare, Mapping[str, Any], bool]] = {
    "heads": ("gpt", {}, nothing, {}, False),
    "gates, on shards of the sequence": ("llama", {}, nothing, {"sequence_parallel": True}, False),
    "gathered once": ("gpt", {}, nothing, {"sequence_parallel": True, "gather_again": False}, False),
    "computed again": ("llama", {"recomputed": True}, nothing, {"sequence_parallel": True}, False),
    "code of one's own": ("handwritten", {}, nothing, {}, False),
    "frozen in part": ("gpt", {}, freeze_kernels, {}, False),
    "LoRA": ("gpt", {}, tune_by_lora, {}, False),
    "replayed": ("gpt", {}, nothing, {}, True),
    "replayed, on shards of the sequence": ("llama", {}, nothing, {"sequence_parallel": True}, True),
}


class Between(TorchDispatchMode):
    """Counts the matrix products between the start of each collective of a backward pass and the wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[str, int]] = []
        self._open: dict[int, int] = {}  # by storage, the place of what is not waited for

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.__name__.partition(".")[0]
        if name in ("all_reduce", "all_reduce_", "reduce_scatter_tensor", "all_gather_into_tensor_out"):
            self._open[result.untyped_storage()._cdata] = len(self.products)
            self.products.append((name, 0))
        elif name == "wait_tensor":
            self._open.pop(args[0].untyped_storage()._cdata, None)
        elif name in ("mm", "bmm"):
            for place in self._open.values():
                kind, count = self.products[place]
                self.products[place] = kind, count + 1
        return result


def steps(way: str) -> tuple[dict[str, float], dict[str, float], list[tuple[str, int]], str]:
    """Return how far gradients are off, left in variables or by name; what ran meanwhile; a broken plan."""
    name, sizes, prepare, options, replayed = WAYS[way]
    case = CASES[name]
    x, y = case.batch(np.random.default_rng(0), 4)
    x = keras.tree.map_structure(torch.as_tensor, x)
    models = [case.build("float64", **sizes) for _ in range(2)]
    for model in models:
        prepare(model)
    plan = plan_behind(models[1], name, inputs=x, **options)
    tp_planner.parallelize(models[1], plan)
    found: list[dict[str, np.ndarray]] = []
    asked: list[dict[str, np.ndarray]] = []
    for model in models:
        model.compile(jit_compile=replayed and model is models[1])
        variables = {key: v for key, v in named_variables(model).items() if v.trainable}

        def loss(model: keras.Model = model) -> torch.Tensor:
            return case.make_loss("float64")(y, model(x, training=True))

        for _ in range(3 if replayed else 1):
            model.zero_grad()
            loss().backward()
        value = loss()
        with Between() as between:  # what was there before is added to
            value.backward()
        found.append({key: whole(v._value.grad) for key, v in variables.items()})
        gradients = torch.autograd.grad(loss(), [v._value for v in variables.values()])
        asked.append(dict(zip(variables, map(whole, gradients), strict=True)))
    with tp_planner.record(models[1]) as recorder:
        loss().backward()
    ran = [each for each in recorder.recording.collectives if each.phase != "update"]
    planned = [each for each in plan.collectives if each.phase != "update"]
    try:
        replace(plan, collectives=tuple(planned)).check(replace(recorder.recording, collectives=tuple(ran)))
        said = ""
    except tp_planner.ContractError as error:
        said = str(error)
    return off(*found), off(*asked), between.products, said


def off(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> dict[str, float]:
    errors = {key: relative(found[key], array) for key, array in expected.items() if "key/bias" not in key}
    return {key: error for key, error in errors.items() if not error <= TOLERANCE[str(expected[key].dtype)]}


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=() if way in ("heads", "replayed, on shards of the sequence") else pytest.mark.slow)
        for way in WAYS
    ],
)
def test_gradients_are_those_of_one_device_and_products_run_behind_their_sums(pools: Pools, way: str) -> None:
    """A GPT's block has two sums behind which three products of weights run, and one; gathers run before them."""
    for left, asked, products, said in pools(2).run(steps, way):
        assert left == asked == {}
        assert said == ""
        sums = [count for kind, count in products if kind != "all_gather_into_tensor_out"]
        # where LoRA's products meet, sums are of other gradients, too; blocks that run again sum what they put out
        alone = {"LoRA": 4, "computed again": 3}.get(way, 2)
        assert sum(count > 0 for count in sums) >= len(sums) - alone > 0
        if way == "heads":
            assert [count for count in sums if count] == [1, 1, 3, 1, 3]  # head, and two blocks


def test_a_plan_says_what_runs_behind_which_sum() -> None:
    """Products of weights behind each, products of inputs behind what is gathered again; an estimate hides them."""
    model, options = CASES["gpt"].build(), {"optimizer": "adamw", "sequence_parallel": True}
    behind, plain = (plan_behind(model, "gpt", least, **options) for least in (0, 2**40))

    def of(plan: Plan, kind: str) -> list[Collective]:
        return [each for each in plan.collectives if each.phase == "backward" and each.kind == kind and each.early]

    tokens, width, hidden, inner, vocabulary = 2 * 16, 32, 64, 16, 32  # inner, hidden and vocabulary of a rank
    block = [tokens * width * hidden, 3 * tokens * width * inner]
    expected = [2 * size for size in (tokens * width * vocabulary, *block, *block)]
    assert [dict(each.behind)["float32"] for each in of(behind, "reduce_scatter")] == expected
    assert [dict(each.behind)["float32"] for each in of(behind, "all_gather")] == expected
    assert not any(each.early for each in plain.collectives)
    assert tp_planner.Plan.from_json(behind.to_json()) == behind
    times = [
        estimate_time(plan, read_hardware_file(find_hardware_file("h100"))).phases[1].communication
        for plan in (behind, plain)
    ]
    assert times[0].low < times[1].low
    assert times[0].high == times[1].high


def test_what_layers_read_that_lie_apart_is_waited_for_at_once() -> None:
    """Keys and values of all decoder layers read one encoder's output: the first would wait for the last."""
    inputs, memory = keras.Input((8, 16)), keras.Input((8, 16))
    read = keras.layers.LayerNormalization(name="norm")(memory)
    x = inputs
    for number in range(2):
        x = keras.layers.MultiHeadAttention(2, 8, name=f"cross_{number}")(x, read)
    rules = {"cross_./(query|key|value)/kernel": (None, "model", None)}
    model = keras.Model([inputs, memory], x)
    with mock.patch.object(reduce_behind, "LEAST_BYTES", 0):
        plan = tp_planner.plan(model, on_two_ranks(rules))
    found = {layer.layer: [each.behind for _, each in layer.inputs] for layer in plan.layers if layer.style == "column"}
    assert not any(found[f"cross_{number}/{name}"][0] for number in range(2) for name in ("key", "value"))
    assert found["cross_1/query"] == [True]
