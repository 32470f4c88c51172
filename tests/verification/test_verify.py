"""Verify finds what is wrong with a parallel model, where it begins, and blames none that is right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.keras_distribution.test_model_parallel import model_parallel
from tests.models import CASES
from tests.test_any_layout import random_rules
from tests.verification.faults import FAULTS, Fault
from tests.workers import Pools, layout_map
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.verdict import Event
from tp_planner.planner import make_plan
from tp_planner.report.html import plan_to_html
from tp_planner.verification.comparison import compare
from tp_planner.verification.verify import verify
from tp_planner.verification.watching import Seen

FAST = {"a gradient's sum that is dropped", "a gradient that is left out of the average"}


def layout_of(name: str, mesh: dict[str, int], sequence_parallel: bool = False) -> Layout:
    rules = tuple(LayoutRule(pattern, axes) for pattern, axes in CASES[name].rules.items())
    return Layout(Mesh(tuple(mesh.items())), rules, sequence_parallel=sequence_parallel).across("batch")


def loss_of(name: str) -> keras.losses.Loss:
    return CASES[name].make_loss()


@pytest.mark.parametrize(
    "fault", [pytest.param(each, id=each.name, marks=() if each.name in FAST else pytest.mark.slow) for each in FAULTS]
)
def test_fault_is_found(fault: Fault, record_property: Callable[[str, object], None]) -> None:
    """A wrong plan, or wrong code, is no rounding, and the layer where it comes in is named."""
    model = CASES["gpt"].build(dropout=0.2)
    layout = layout_of("gpt", fault.mesh, fault.sequence_parallel)
    plan = fault.plan(make_plan(model, layout))
    with fault.code():
        verdict = verify(model, plan, loss=loss_of("gpt"), optimizer="sgd")
    assert not verdict.is_same
    assert bool(verdict.failure) == fault.fails, verdict.failure
    assert not fault.layers or set(verdict.begins.layers) & set(fault.layers), str(verdict)
    where = verdict.failure or f"{', '.join(verdict.begins.layers)}: {verdict.begins.first.event}"
    record_property("counted", f"fault found: {fault.name}: {where}")


def mean_of_output(targets: Any, outputs: Any) -> Any:
    return keras.ops.mean(outputs, axis=-1)


@pytest.mark.parametrize("mesh", [{"batch": 1, "model": 2}, {"batch": 2, "model": 2}], ids=["2", "2x2"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "mlp" else pytest.mark.slow) for name in CASES]
)
def test_right_model_is_not_blamed(name: str, mesh: dict[str, int]) -> None:
    model = CASES[name].build()
    before = [array.copy() for array in model.get_weights()]
    inputs, targets = CASES[name].batch(np.random.default_rng(0), 8)
    verdict = verify(model, layout_of(name, mesh), inputs, targets, loss_of(name), "adamw", [mean_of_output], steps=2)
    assert verdict.is_same, str(verdict)
    assert max(each.units for each in verdict.tensors) < 100
    kinds = {"output", "gradient at", "loss", "metric", "gradient of", "weight", "slot"}
    assert {each.event.kind for each in verdict.tensors} == kinds
    for array, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_no_backward_pass_runs_before_the_last_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch built for CUDA starts threads for the first, and processes forked after that can run none."""
    ran: list[bool] = []
    plain = torch.autograd.backward

    def backward(*args: Any, **kwargs: Any) -> None:
        ran.append(True)
        plain(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", backward)
    inputs, targets = CASES["mlp"].batch(np.random.default_rng(0), 8)
    layout = layout_of("mlp", {"batch": 1, "model": 2})
    assert verify(CASES["mlp"].build(), layout, inputs, targets, loss_of("mlp")).is_same
    assert ran == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(17))
@pytest.mark.parametrize("name", CASES)
def test_any_layout_that_is_right_is_not_blamed(name: str, seed: int) -> None:
    """About two hundred layouts without sense, of all that is sharded, gathered and reduced in them."""
    model = CASES[name].build()
    rules = tuple(LayoutRule(pattern, axes) for pattern, axes in random_rules(model, seed).items())
    inputs, targets = CASES[name].batch(np.random.default_rng(seed), 3)
    layout = Layout(Mesh((("model", 2),)), rules, sequence_parallel=seed % 2 == 1)
    try:
        verdict = verify(model, layout, inputs, targets, loss_of(name))
    except tp_planner.PlanError as error:
        if not str(error).startswith("the model cannot be planned: "):
            raise
        pytest.skip(str(error))
    assert verdict.is_same, str(verdict)


def test_verdict_is_told() -> None:
    """The report names the layer, both differences, as roundings too, and the plan's lines; JSON has every tensor."""
    model = CASES["gpt"].build()
    plan = next(each for each in FAULTS if each.name == "no sum after attention").plan(
        make_plan(model, layout_of("gpt", {"batch": 1, "model": 2}))
    )
    verdict = tp_planner.verify(model, tp_planner.Plan.from_json(plan.to_json()))
    text = str(verdict)
    assert "'gpt' on mesh (batch=1, model=2) is NOT the function it is on one device" in text
    assert "it begins to differ at 'block_0_attention/attention_output'" in text
    assert "block_0_attention/attention_output: row: a contracted dim of the weight is sharded" in text
    assert verdict.begins.first.units > 1e4
    assert max(each.units for each in verdict.tensors if not each.is_wrong) < 20
    data = json.loads(verdict.to_json())
    assert (data["same"], data["begins"]["layers"]) == (False, ["block_0_attention/attention_output"])
    assert {each["is"] for each in data["tensors"]} >= {"error", "rounding", "equal"}
    page = plan_to_html(verdict.plan, verdict=verdict)
    assert '<section id="verdict" class="wrong">' in page
    assert re.search(r'class="layer[^"]*wrong"', page)


# On the ranks


def verified_while_it_runs(mesh: dict[str, int], fault: str) -> tuple[bool, tuple[str, ...], list[str], bool]:
    """Return whether a running model is right, where it is not, what ranks have unequal, and if its state stays."""
    case = CASES["gpt"]
    model = case.build(dropout=0.2)
    plan = make_plan(model, layout_of("gpt", mesh))
    if fault == "no sum after attention":
        plan = next(each for each in FAULTS if each.name == fault).plan(plan)
    tp_planner.parallelize(model, plan)
    model.compile("sgd", loss_of("gpt"), jit_compile=False)
    inputs, targets = case.batch(np.random.default_rng(dist.get_rank() // mesh["model"]), 4)
    if fault != "no sum after attention":  # with which weights that all have would drift apart
        model.train_on_batch(inputs, targets)
    if fault == "a weight of its own" and dist.get_rank() == 1:
        model.get_layer("final_norm").gamma._value.data[0] += 1e-6
    before = model.get_weights(), torch.get_rng_state()
    verdict = tp_planner.verify_step(model, inputs, targets)
    alone = tp_planner.verify_step(model, inputs, targets, reference=False)
    after = model.get_weights(), torch.get_rng_state()
    same = all(map(np.array_equal, before[0], after[0])) and bool((before[1] == after[1]).all())
    unequal = [str(each.event) for each in alone.wrong]
    return verdict.is_same, verdict.begins.layers if verdict.begins else (), unequal, same


def pair() -> keras.Model:
    """A Sequential: its variables have other paths in a copy."""
    layers = [keras.layers.Dense(8, "gelu", name="up"), keras.layers.Dense(4, name="down")]
    return keras.Sequential([keras.Input((4,)), *layers], name="pair")


class Lost(keras.Model):
    """Cannot be made of its configuration."""

    def __init__(self, width: Any) -> None:
        super().__init__(name="lost")
        self.up = keras.layers.Dense(width.size, name="up")

    def call(self, x: Any) -> Any:
        return self.up(x)


def verified_of_each_kind() -> dict[str, str]:
    """Return what is said of right models of several kinds; "same" if they are found to be."""
    said = {}
    for name in ("sequential", "lost", "subclassed", "tied", "convnet"):
        if name in CASES:
            model, rules, loss = CASES[name].build(), CASES[name].rules, CASES[name].make_loss()
            inputs, targets = CASES[name].batch(np.random.default_rng(0), 4)
        else:
            model = pair() if name == "sequential" else Lost(np.zeros(8))
            inputs, targets, loss = np.ones((4, 4), "float32"), np.zeros((4, 1), "float32"), "mse"
            model(inputs)
            rules = {".*up/kernel": (None, "model"), ".*up/bias": ("model",)}
        tp_planner.parallelize(model, layout_map(rules), inputs)
        model.compile("sgd", loss, jit_compile=False)
        try:
            verdict = tp_planner.verify_step(model, inputs, targets)
            said[name] = "same" if verdict.is_same else str(verdict)
        except tp_planner.PlanError as error:
            said[name] = str(error)
    return said


def verified_under_keras_distribution() -> list[object]:
    """Return what is said before the first call, whether the model is right then, and where it is not without a sum."""
    case = CASES["gpt"]
    inputs, targets = case.batch(np.random.default_rng(0), 4)
    with model_parallel(case.rules):
        model = case.build()
        model.compile("sgd", loss_of("gpt"), jit_compile=False)
        try:
            tp_planner.verify_step(model, inputs, targets)
        except tp_planner.PlanError as error:
            said = str(error)
        model.train_on_batch(inputs, targets)
        right = tp_planner.verify_step(model, inputs, targets)
        model.get_layer("block_1_down").kernel._value.data.mul_(1 + 1e-3 * dist.get_rank())  # one rank's alone
        return [said, right.is_same, tp_planner.verify_step(model, inputs, targets).is_same]


# In the parent


def test_running_model_is_verified_under_keras_distribution(pools: Pools) -> None:
    """Models are planned at their first call there, and what each rank has changed of its own shard is the model's."""
    said = (
        "model 'gpt' is not parallelized; call tp_planner.parallelize(model, layout_map), or under a "
        "distribution the model itself, before tp_planner.verify_step"
    )
    assert pools(2).run(verified_under_keras_distribution) == [[said, True, True]] * 2


def test_running_models_of_each_kind_are_verified(pools: Pools) -> None:
    """What cannot be copied is refused on all ranks, and a rank does not wait for a copy that failed."""
    zero, one = pools(2).run(verified_of_each_kind)
    refusal = zero.pop("lost")
    assert refusal.startswith("model 'lost' cannot be copied by its configuration (")
    assert one.pop("lost") == f"rank 0: {refusal}"
    assert zero == one == dict.fromkeys(("sequential", "subclassed", "tied", "convnet"), "same")


@pytest.mark.parametrize(
    ("mesh", "fault", "layers"),
    [
        pytest.param({"batch": 2, "model": 1}, "", (), marks=pytest.mark.slow),
        ({"batch": 1, "model": 2}, "", ()),
        pytest.param({"batch": 1, "model": 2}, "a weight of its own", ("final_norm",), marks=pytest.mark.slow),
        ({"batch": 1, "model": 2}, "no sum after attention", ("block_0_attention/attention_output",)),
    ],
)
def test_running_model_is_verified(pools: Pools, mesh: dict[str, int], fault: str, layers: tuple[str, ...]) -> None:
    """In a job the same is asked of a model on its weights, and what differs between ranks by one bit is found.

    Without a reference, ranks are compared with each other.
    """
    for is_same, begins, unequal, state_is_same in pools(2).run(verified_while_it_runs, mesh, fault):
        assert (is_same, begins, state_is_same) == (not fault, layers, True)
        assert bool(unequal) == bool(fault)
        assert fault != "a weight of its own" or unequal[0] == "weight 'final_norm/gamma', before"


REFUSALS = {
    "unknown optimizer": (
        {"optimizer": "adamx"},
        r"^optimizer 'adamx' is unknown; give a Keras optimizer",
    ),
    "rows that do not divide": (
        {"inputs": np.zeros((7, 16), "float32"), "targets": np.zeros((7, 16), "float32")},
        r"^inputs of 7 rows are not divided by 2 replicas; give each as many$",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    options, message = REFUSALS[case]
    with pytest.raises(tp_planner.PlanError, match=message):
        verify(CASES["mlp"].build(), layout_of("mlp", {"batch": 2, "model": 2}), **options)


def test_plan_of_another_model_is_refused() -> None:
    plan = make_plan(CASES["mlp"].build(), layout_of("mlp", {"batch": 1, "model": 2}))
    with pytest.raises(tp_planner.PlanError, match=r"^the plan was made for another model than 'gpt'"):
        verify(CASES["gpt"].build(), plan)


def held(event: Event, *arrays: np.ndarray) -> list[Seen]:
    """Return what replicas of one rank each saw of one tensor."""
    return [Seen({event: array}) for array in arrays]


def test_every_replica_is_compared() -> None:
    """A tensor without rows is that of one device in each replica, or in the mean; others are joined by rows."""
    plan = make_plan(CASES["mlp"].build(), layout_of("mlp", {"batch": 2, "model": 1}))
    event, whole, zero = Event("step 1", "output", "layer", "call 1, output 0"), np.ones((4, 3)), np.zeros((4, 3))
    single = Seen({event: whole})

    def error(*arrays: np.ndarray) -> float:
        (difference,) = compare(single, held(event, *arrays), plan)
        return difference.error

    assert error(whole, whole) == error(whole[:2], whole[2:]) == error(zero, 2 * whole) == 0
    assert error(whole, zero) == 0.5
    assert error(whole[:2], zero[2:]) == 1
