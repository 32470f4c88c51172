"""A plan is a contract: a training step that communicates otherwise is refused, with the first difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.models import CASES, usual
from tests.workers import Pools, WorkerPool, layout_map
from tp_planner.ir.contract import Recording
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.plan import LayerPlan, Plan
from tp_planner.ir.step import Collective
from tp_planner.planner import make_plan

# Case and sizes: the zoo as it is, and what is gathered at use or read by more than one rank.
MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name in CASES},
    "gpt with uneven dims": ("gpt", {"vocabulary": 65, "hidden": 63}),
    "llama with tied embeddings and one head for keys": ("llama", {"tied": True, "kv_heads": 1}),
    "llama with blocks that are computed again": ("llama", {"recomputed": True}),
}


def gpt_plan(name: str = "gpt") -> Plan:
    rules = tuple(LayoutRule(pattern, axes) for pattern, axes in CASES[name].rules.items())
    return make_plan(CASES[name].build(), Layout(Mesh((("model", 2),)), rules))


def recorded(plan: Plan, change: Callable[[list[Collective]], Any] = lambda ran: None, batch: int = 2) -> Recording:
    """Return a recording of the plan's own collectives, changed."""
    ran = [replace(each, bytes=each.bytes * batch // 2) for each in plan.collectives]
    change(ran)
    return Recording(tuple(((batch, *shape[1:]), dtype) for shape, dtype in plan.inputs), tuple(ran))


def test_what_was_planned_may_run() -> None:
    """The planned step passes, with the planned batch and with others, and whatever the order of the gradients."""
    plan = gpt_plan()
    backward = [position for position, each in enumerate(plan.collectives) if each.phase == "backward"]

    def swapped(ran: list[Collective]) -> None:
        ran[backward[0]], ran[backward[-1]] = ran[backward[-1]], ran[backward[0]]

    steps = [recorded(plan), recorded(plan, batch=6), recorded(plan, batch=1), recorded(plan, swapped)]
    assert [breach_of(plan, step) for step in steps] == ["", "", "", ""]


def breach_of(plan: Plan, step: Recording) -> str:
    try:
        plan.check(step)
    except tp_planner.ContractError as error:
        return str(error)
    return ""


def test_only_a_recording_is_compared() -> None:
    with pytest.raises(tp_planner.PlanError) as refusal:
        gpt_plan().check(object())  # type: ignore[arg-type]
    assert str(refusal.value) == "expected a Recording, got object; give recorder.recording"


def implicit(ran: list[Collective]) -> None:
    ran.append(replace(ran[-1], layer="head", place="", cause="aten.mul.Tensor"))


def other_size(ran: list[Collective]) -> None:
    ran[2] = replace(ran[2], bytes=ran[2].bytes + 4)


BREACHES: dict[str, tuple[Callable[[list[Collective]], Any], str]] = {
    "one is missing": (
        lambda ran: ran.pop(1),
        "collective 2 of the step should be forward all_reduce over 'model' of layer "
        "'block_0_attention/attention_output' (output (block_0_attention/attention_output output)) but was forward "
        "all_reduce over 'model' of layer 'block_0_down' (output (block_0_down output))",
    ),
    "one of the way back is missing": (
        lambda ran: ran.pop(),
        "backward all_reduce over 'model' of layer 'block_0_attention/query' (input (block_0_attention_norm output)) "
        "is in the plan, and did not run; plan again if layers were frozen since, or with loss=, "
        "the one that is trained with",
    ),
    "one is implicit": (
        implicit,
        "backward all_reduce over 'model' of layer 'head' ran, and is not in the plan: aten.mul.Tensor caused it",
    ),
    "one runs twice": (
        lambda ran: ran.append(ran[-1]),
        "backward all_reduce over 'model' of layer 'block_0_attention/query' (input (block_0_attention_norm output)) "
        "ran 2 times, and is in the plan 1 times; record one training step, of one forward and one backward pass",
    ),
    "one has another size": (
        other_size,
        "forward all_reduce over 'model' of layer 'block_0_down' (output (block_0_down output)) moved 4100 bytes, "
        "not 4096",
    ),
    "forward ones change places": (
        lambda ran: ran.insert(0, ran.pop(1)),
        "collective 1 of the step should be forward all_reduce over 'model' of layer 'token_embedding' (output "
        "(token_embedding output)) but was forward all_reduce over 'model' of layer "
        "'block_0_attention/attention_output' (output (block_0_attention/attention_output output))",
    ),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_refused_with_its_layer(breach: str) -> None:
    plan = gpt_plan()
    change, message = BREACHES[breach]
    with pytest.raises(tp_planner.ContractError) as refusal:
        plan.check(recorded(plan, change))
    assert str(refusal.value) == message


def test_bytes_grow_with_the_batch_and_no_other_way() -> None:
    """Three times the batch may move as many bytes as planned, or three times as many, but not twice as many."""
    plan = gpt_plan()

    def twice(ran: list[Collective]) -> None:
        ran[1] = replace(ran[1], bytes=plan.collectives[1].bytes * 2)

    with pytest.raises(tp_planner.ContractError, match="moved 8192 bytes, not 4096 or 12288"):
        plan.check(recorded(plan, twice, batch=6))


def test_a_layer_called_at_two_sizes_may_move_both() -> None:
    """Each call has a size of its own: both may run, and neither in place of the other."""
    inputs = keras.Input((8, 12))
    up, down = keras.layers.Dense(16, name="up"), keras.layers.Dense(12, name="down")
    half = keras.layers.AveragePooling1D(2)(down(up(inputs)))
    rules = (LayoutRule("up/kernel", (None, "model")), LayoutRule("down/kernel", ("model", None)))
    plan = make_plan(keras.Model(inputs, down(up(half))), Layout(Mesh((("model", 2),)), rules))
    plan.check(Recording(plan.inputs, plan.collectives))
    sizes = [each.bytes for each in plan.collectives if each.layer == "down"]
    assert sizes == [2 * 8 * 12 * 4, 2 * 4 * 12 * 4]

    small = tuple(replace(each, bytes=sizes[1]) if each.layer == "down" else each for each in plan.collectives)
    with pytest.raises(tp_planner.ContractError, match=r"'down' .* moved 384 bytes, not 768"):
        plan.check(Recording(plan.inputs, small))


def test_a_step_outside_of_the_recording_is_refused() -> None:
    plan = gpt_plan()
    with pytest.raises(tp_planner.ContractError) as refusal:
        plan.check(Recording((), ()))
    assert str(refusal.value) == (
        "the model was not called while the step was recorded; call it inside tp_planner.record"
    )


def test_inputs_of_other_shapes_are_refused() -> None:
    plan = gpt_plan()
    with pytest.raises(tp_planner.ContractError) as refusal:
        plan.check(Recording((((2, 32), "int32"),), plan.collectives))
    assert str(refusal.value) == (
        "the step ran on inputs 2x32 int32, the plan was made for 2x16 int32; "
        "plan with inputs=, an example batch, to compare the two"
    )


# On real processes


def train_checked(name: str, sizes: Mapping[str, Any], broken_layer: str | None, optimizer: str) -> int:
    """Fit the case to two batches with a checked first step; return how many collectives the plan has."""
    case = CASES[name]
    model = case.build("float32", **sizes)
    model.compile(getattr(keras.optimizers, optimizer)(), case.make_loss(), jit_compile=False)
    plan = tp_planner.plan(model, layout_map(case.rules))
    changed = plan if broken_layer is None else without_boundaries(plan, broken_layer)
    tp_planner.parallelize(model, changed, check="first_step")
    x, y = case.batch(np.random.default_rng(2), 8)
    model.fit(x, y, batch_size=4, epochs=1, verbose=0, shuffle=False)
    return len(plan.collectives)


def without_boundaries(plan: Plan, layer: str) -> Plan:
    """Return the plan with one layer's boundaries gone, but none of its collectives."""

    def broken(each: LayerPlan) -> LayerPlan:
        return replace(each, inputs=(), output=None) if each.layer == layer else each

    return replace(plan, layers=tuple(map(broken, plan.layers)))


@pytest.mark.parametrize("model", usual(MODELS, {"gpt"}))
def test_first_step_of_training_is_as_planned(workers: WorkerPool, model: str) -> None:
    """Twice the planned batch, trained by Keras with AdamW: kinds, layers, places, phases, order and bytes."""
    counts = workers.run(train_checked, *MODELS[model], None, "AdamW")
    assert set(counts) != {0}


@pytest.mark.parametrize("optimizer", ["Lamb", "Muon"])
def test_updates_that_communicate_are_planned(pools: Pools, optimizer: str) -> None:
    """Optimizers that need whole gradients gather them; the plan for that optimizer has each gathering."""
    with_adam = pools(2).run(train_checked, "mlp", {}, None, "Adam")[0]
    assert pools(2).run(train_checked, "mlp", {}, None, optimizer)[0] > with_adam


def train_with_loss_scaling() -> tuple[bool, list[str]]:
    """Train a checked first step whose update communicates after it has looked at a value."""
    case = CASES["mlp"]
    model = case.build("float32")
    adam = keras.optimizers.Adam(global_clipnorm=0.1)
    model.compile(keras.optimizers.LossScaleOptimizer(adam), case.make_loss(), jit_compile=False)
    plan = tp_planner.plan(model, layout_map(case.rules))
    tp_planner.parallelize(model, plan, check="first_step")
    model.train_on_batch(*case.batch(np.random.default_rng(2), 4))
    return plan.step.whole_update, [note for note in plan.notes if "depends on values" in note]


def test_an_update_that_cannot_be_simulated_is_not_compared(pools: Pools) -> None:
    """The plan says that it does not know the whole update, and the check leaves it out."""
    whole_update, notes = pools(2).run(train_with_loss_scaling)[0]
    assert not whole_update
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        (
            "mlp",
            "down",
            "the first training step was not as planned: on rank 0, forward all_reduce over 'model' of layer 'down' "
            "(output (down output)) is in the plan, and did not run",
        ),
        (
            "gpt",
            "block_1_up",
            "the first training step was not as planned: on rank 0, backward all_reduce over 'model' of layer "
            "'block_1_up' (input (block_1_mlp_norm output)) is in the plan, and did not run; plan again if layers were "
            "frozen since, or with loss=, the one that is trained with",
        ),
    ],
)
def test_a_broken_boundary_stops_training(pools: Pools, name: str, layer: str, message: str) -> None:
    """All ranks hear of a boundary that was not executed, by its layer, at the first step."""
    with pytest.raises(tp_planner.ContractError) as refusal:
        pools(2).run(train_checked, name, {}, layer, "AdamW")
    assert str(refusal.value) == message


def record_of_one_rank_that_differs() -> str:
    """Let rank 1 communicate once more than planned, in a layer's own code; return what each rank hears."""

    class Chatty(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            if dist.get_world_size() > 1 and not isinstance(x, keras.KerasTensor) and chatting[0]:
                dist.all_reduce(torch.ones(3))
            return x

    chatting = [False]
    inputs = keras.Input((16,))
    hidden = keras.layers.Dense(8, name="up")(Chatty(name="chatty")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(4, name="down")(hidden))
    model.compile("sgd", "mse")
    rules = {"up/kernel": (None, "model"), "up/bias": ("model",), "down/kernel": ("model", None)}
    tp_planner.parallelize(model, layout_map(rules), check="first_step")
    chatting[0] = True
    try:
        model.train_on_batch(np.ones((2, 16), "float32"), np.ones((2, 4), "float32"))
    except tp_planner.ContractError as error:
        return str(error)
    return ""


def test_collectives_of_the_models_own_code_are_implicit(pools: Pools) -> None:
    """A collective that a layer's own code runs is named with the layer and what caused it."""
    answers = pools(2).run(record_of_one_rank_that_differs)
    assert (
        answers
        == [
            "the first training step was not as planned: on rank 0, collective 1 of the step should be forward "
            "all_reduce over 'model' of layer 'down' (output (down output)) but was forward all_reduce over 'model' "
            "of layer 'chatty': c10d.allreduce_.default caused it"
        ]
        * 2
    )
