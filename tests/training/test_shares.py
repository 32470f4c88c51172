"""Replicas that share updates: each has a part of an optimizer's slots, and all have the weights of one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.models import building, randomize
from tests.replicas import MODELS, Shape, layout, relative, share, weights
from tests.workers import Pools
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.ir.placement import WHOLE
from tp_planner.storage.variables import local_tensor
from tp_planner.training.shares import share_of

ZERO = "model axis, zero 1"

# On the ranks


def constrained(dtype: str = "float64") -> keras.Model:
    """A model of what needs care: a constraint, a penalty, a frozen layer, an adapter, and sizes that do not divide."""
    with building(dtype):
        inputs = keras.Input((6,), name="x")
        limit = keras.constraints.MaxNorm(0.7)
        x = keras.layers.Dense(7, "tanh", kernel_constraint=limit, kernel_regularizer="l2", name="up")(inputs)
        x = keras.layers.Dense(9, "tanh", name="frozen")(x)
        x = keras.layers.Dense(10, "tanh", name="adapted")(x)
        x = keras.layers.PReLU(shared_axes=[1], name="slope")(x)
        model = randomize(keras.Model(inputs, keras.layers.Dense(3, name="down")(x), name="constrained"), 0)
        model.get_layer("adapted").enable_lora(2)
    model.get_layer("frozen").trainable = False
    for number, weight in enumerate(model.get_layer("adapted").trainable_variables):
        weight.assign(np.random.default_rng(number).standard_normal(weight.shape))
    return model


def fed(shape: Shape) -> tuple[Any, Any]:
    x, y = np.random.default_rng(0).standard_normal((2, 8, 6))
    y = y[:, :3]
    replica = dist.get_rank() // shape[1]
    return (x, y), (share(x, replica, shape[0]), share(y, replica, shape[0]))


def train_what_needs_care(shape: Shape, rules: str) -> dict[str, float]:
    """Return how far weights are from one process: shared before training, after it, and restored in between."""
    whole, own = fed(shape)
    models = [constrained() for _ in range(3)]
    first, second = (layout("mlp", rules, shape) for _ in range(2))
    tp_planner.parallelize(models[1], first)
    for model in models:
        optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1, epsilon=1e-3, use_ema=True)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        model.compile(optimizer, "mse")
    for model, batch in zip(models, (whole, own, whole), strict=True):
        model.train_on_batch(*batch)
    tp_planner.restore(models[1])
    tp_planner.parallelize(models[2], second)
    for model, batch in zip(models, (whole, whole, own), strict=True):
        model.fit(*batch, batch_size=8, epochs=2, shuffle=False, verbose=0)  # weights are their averages in the end
    expected = weights(models[0])
    return {
        f"{name}: {key}": relative(array, expected[key])
        for name, model in zip(("restored", "shared"), models[1:], strict=True)
        for key, array in weights(model).items()
    }


def what_is_stored(shape: Shape) -> tuple[int, int, list[str]]:
    """Return the elements of slots that this rank has, those that it would have without, and what is not shared."""
    case = MODELS["stacked"]
    model = case.build("float32")
    tp_planner.parallelize(model, layout("stacked", ZERO, shape), batch_axis="batch")
    model.compile(keras.optimizers.Adam(), "mse")
    model.optimizer.build(model.trainable_variables)
    slots = sum(local_tensor(slot).numel() for slot in model.optimizer.variables if slot.ndim)
    trained = [(key, each) for key, each in named_variables(model).items() if each.trainable]
    whole = 2 * sum(local_tensor(variable).numel() for _, variable in trained)
    return slots, whole, [key for key, variable in trained if share_of(variable) is None]


def clipped_in_a_loop() -> tuple[list[float], dict[str, float], list[str]]:
    """Clip with torch's helper in a loop of one's own; then train with torch's optimizer, and with one of Keras's."""
    case, norms = MODELS["mlp"], []
    models = [case.build("float64") for _ in range(2)]
    x, y = case.batch(np.random.default_rng(0), 8)
    tp_planner.parallelize(models[1], layout("mlp", ZERO, (2, 2)))
    replica = dist.get_rank() // 2
    for model, batch in zip(models, ((x, y), (share(x, replica, 2), share(y, replica, 2))), strict=True):
        case.make_loss("float64")(batch[1], model(batch[0], training=True)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)))
        variables = model.trainable_variables
        keras.optimizers.SGD(0.1).apply([variable.value.grad for variable in variables], variables)
    heard = []
    with pytest.raises(tp_planner.PlanError) as error:
        torch.optim.SGD(models[1].parameters(), 0.1).step()
    heard.append(str(error.value))
    with pytest.raises(tp_planner.PlanError) as error:
        models[1].compile(keras.optimizers.Lamb(), "mse")
    heard.append(str(error.value))
    expected, found = map(weights, models)
    return norms, {key: relative(found[key], expected[key]) for key in expected}, heard


def train_on_the_stream(zero: int) -> dict[str, float]:
    """Train with shards of the residual stream, gradients of two backward passes added up; compare with one process."""
    case = MODELS["gpt"]
    models = [case.build("float64") for _ in range(2)]
    x, y = case.batch(np.random.default_rng(0), 8)
    replica = dist.get_rank() // 2
    given = replace(layout("gpt", f"model axis, zero {zero}", (2, 2)), sequence_parallel=True)
    tp_planner.parallelize(models[1], given, share(x, replica, 2))
    for model, batch in zip(models, ((x, y), (share(x, replica, 2), share(y, replica, 2))), strict=True):
        optimizer, variables = keras.optimizers.Adam(0.01, epsilon=1e-3), model.trainable_variables
        for _ in range(2):
            model.zero_grad()
            for _ in range(2):
                case.make_loss("float64")(batch[1], model(batch[0], training=True)).backward()
            optimizer.apply([variable.value.grad for variable in variables], variables)
    expected, found = map(weights, models)
    return {key: relative(found[key], expected[key]) for key in expected}


def record_a_step(name: str, shape: Shape, zero: int) -> list[tuple[str, str, str]]:
    """Compare a step that clips with its plan; return what of it is over the batch axis and in the update."""
    case = MODELS[name]
    x, y = case.batch(np.random.default_rng(0), 8)
    own = share(x, dist.get_rank() // shape[1], shape[0]), share(y, dist.get_rank() // shape[1], shape[0])
    model = case.build()
    model.compile(keras.optimizers.AdamW(global_clipnorm=0.1), case.make_loss(), jit_compile=False)
    plan = tp_planner.plan(model, layout(name, f"model axis, zero {zero}", shape), own[0], batch_axis="batch")
    tp_planner.parallelize(model, plan)
    with tp_planner.record(model) as recorder:
        model.train_on_batch(*own)
    plan.check(recorder.recording)
    assert plan.step.whole_update
    return [(each.kind, each.axis, each.place) for each in recorder.recording.collectives if each.phase == "update"]


def train_parts_of_a_model() -> dict[str, float]:
    """Train one layer with one optimizer, then another with another."""
    case = MODELS["mlp"]
    models = [case.build("float64") for _ in range(2)]
    x, y = case.batch(np.random.default_rng(0), 8)
    tp_planner.parallelize(models[1], layout("mlp", ZERO, (2, 2)))
    replica = dist.get_rank() // 2
    for model, batch in zip(models, ((x, y), (share(x, replica, 2), share(y, replica, 2))), strict=True):
        layers = [layer for layer in model.layers if layer.trainable_variables]
        for layer in layers[:2]:
            optimizer, variables = keras.optimizers.Adam(0.01, epsilon=1e-3), layer.trainable_variables
            for _ in range(2):
                model.zero_grad()
                case.make_loss("float64")(batch[1], model(batch[0], training=True)).backward()
                optimizer.apply([variable.value.grad for variable in variables], variables)
    expected, found = map(weights, models)
    return {key: relative(found[key], expected[key]) for key in expected}


# In the parent


@pytest.mark.parametrize(
    ("shape", "rules"),
    [
        ((2, 2), ZERO),
        pytest.param((4, 1), ZERO, marks=pytest.mark.slow),
        pytest.param((2, 2), "model axis, zero 3", marks=pytest.mark.slow),
    ],
)
def test_what_needs_care(pools: Pools, shape: Shape, rules: str) -> None:
    """Constraints, penalties, frozen layers, adapters, averages, exclusions; before training, after, and restored.

    Adapters are of float32, whatever the model is.
    """
    for errors in pools(4).run(train_what_needs_care, shape, rules):
        assert {key: error for key, error in errors.items() if not error <= 1e-6} == {}


def test_slots_are_in_parts(pools: Pools) -> None:
    """A rank has a part of the slots, larger by what does not divide; what is too short for that stays whole."""
    ranks = pools(4).run(what_is_stored, (4, 1))
    assert sum(slots for slots, _, _ in ranks) == ranks[0][1]
    assert max(slots for slots, _, _ in ranks) < ranks[0][1] * 0.31
    assert {tuple(whole) for _, _, whole in ranks} == {()}


def test_loops_of_ones_own(pools: Pools) -> None:
    """Norms are those of whole gradients; optimizers that cannot update parts are refused."""
    for norms, errors, (by_torch, lamb) in pools(4).run(clipped_in_a_loop):
        assert norms[0] == pytest.approx(norms[1], rel=1e-12)
        assert {key: error for key, error in errors.items() if not error <= 1e-12} == {}
        assert by_torch == (
            "torch's SGD updates whole parameters, and of these, planned with zero=1, each replica has a part of the "
            "gradient; train with a Keras optimizer, optimizer.apply(gradients, variables), or plan with zero=0"
        )
        assert lamb == LAMB


@pytest.mark.parametrize(
    ("name", "shape", "zero"),
    [
        ("mlp", (2, 2), 1),
        pytest.param("llama", (4, 1), 1, marks=pytest.mark.slow),
        pytest.param("gpt", (2, 2), 3, marks=pytest.mark.slow),
    ],
)
def test_what_is_planned_runs(pools: Pools, name: str, shape: Shape, zero: int) -> None:
    """All collectives of a step are the planned ones: norms are summed over both axes, and weights put together."""
    expected = [("all_reduce", axis, "gradient clipping") for axis in ("model", "batch")]
    expected += [("all_gather", "batch", "weights 0")] if zero == 1 else []
    for found in pools(4).run(record_a_step, name, shape, zero):
        assert found == expected


@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_on_the_residual_stream(pools: Pools, zero: int) -> None:
    """What ranks of the model axis add up is there before replicas are left their parts, and is added once."""
    for errors in pools(4).run(train_on_the_stream, zero):
        assert {key: error for key, error in errors.items() if not error <= 1e-12} == {}


def test_several_optimizers(pools: Pools) -> None:
    """Each updates its variables, and leaves those of others as they are."""
    for errors in pools(4).run(train_parts_of_a_model):
        assert {key: error for key, error in errors.items() if not error <= 1e-12} == {}


LAMB = (
    "Lamb cannot update weights in parts over the batch axis, as zero=1 has it: what it makes of one element depends "
    "on others, or is not known; plan with zero=0, or train with one of SGD, RMSprop, Adam, AdamW, Adadelta, Adagrad, "
    "Adamax, Nadam, Ftrl, Lion"
)


class Own(keras.optimizers.Adam):
    """An optimizer of a user's, of which nobody knows what it does."""


@pytest.mark.parametrize("optimizer", [keras.optimizers.Lamb, Own, lambda: keras.optimizers.LossScaleOptimizer(Own())])
def test_optimizers_that_need_the_whole_are_refused(optimizer: Any) -> None:
    made = optimizer()
    with pytest.raises(tp_planner.PlanError) as refusal:
        tp_planner.plan(MODELS["mlp"].build(), layout("mlp", ZERO, (2, 2)), optimizer=made)
    name = "Lamb" if isinstance(made, keras.optimizers.Lamb) else "Own"
    assert str(refusal.value) == LAMB.replace("Lamb", name, 1)


@pytest.mark.parametrize("stage", [2, True, "1"])
def test_stages_that_there_are_not(stage: Any) -> None:
    with pytest.raises(tp_planner.PlanError) as refusal:
        tp_planner.plan(MODELS["mlp"].build(), layout("mlp", "model axis", (2, 2)), zero=stage)
    assert str(refusal.value) == (
        f"zero is {stage!r}; it is 1 for optimizer state in parts, and the gradients that it takes, 3 for weights in "
        f"parts too, 0 for neither"
    )


def test_one_replica_has_nobody_to_share_with() -> None:
    plan = tp_planner.plan(MODELS["mlp"].build(), layout("mlp", "model axis", (1, 2)), zero=1)
    assert plan.notes == (
        "zero=1 changes nothing: the batch is split over no axis of mesh (batch=1, model=2), so there is one replica",
    )


def test_plans_say_what_is_shared() -> None:
    """Each variable says whether it is shared and why not; the step has parts of slots and gradients, half of them."""
    model = MODELS["gpt"].build()
    plain, shared = (tp_planner.plan(model, layout("gpt", "model axis", (2, 2)), None, "adamw", zero=n) for n in (0, 1))
    assert tp_planner.Plan.from_json(shared.to_json()) == shared
    assert {each.slot_placement == WHOLE for each in plain.variables} == {True}
    for each in shared.variables:
        assert ("each of 2 replicas updates a part" in each.reason) == (each.slot_placement != WHOLE) == each.trainable
    before, after = plain.step.memory.largest, shared.step.memory.largest
    rates = 4 * 2  # the learning rate and the iterations
    assert after.optimizer - rates == (before.optimizer - rates) // 2
    assert after.gradients < before.gradients * 0.51
    over_batch = [(each.kind, each.place) for each in shared.collectives if each.axis == "batch"]
    assert over_batch[1:] == [("reduce_scatter", "gradients 0"), ("all_gather", "weights 0")]
