"""Replicas add up gradients of micro-steps on their own, average once an update, and have what one process has."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.dryrun.test_simulation import SIZES, metered_training
from tests.keras_distribution.test_distributed_replicas import distributed, normalized, rows
from tests.models import building, randomize
from tests.replicas import MODELS, Shape, layout, relative, share
from tests.training.test_training import variables_of
from tests.workers import Pools
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.ir.step import Memory
from tp_planner.passes import bucket_gradients

OPTIMIZERS = {
    "adamw": lambda: keras.optimizers.AdamW(
        0.01, weight_decay=0.1, epsilon=1e-3, global_clipnorm=0.1, gradient_accumulation_steps=3
    ),
    "momentum": lambda: keras.optimizers.SGD(
        0.05, momentum=0.9, loss_scale_factor=64.0, clipnorm=0.01, gradient_accumulation_steps=2
    ),
    "averages": lambda: keras.optimizers.Adam(
        0.01, epsilon=1e-3, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2, gradient_accumulation_steps=2
    ),
    "ftrl": lambda: keras.optimizers.Ftrl(0.01, gradient_accumulation_steps=2),
    "lamb": lambda: keras.optimizers.Lamb(0.01, epsilon=1e-3, gradient_accumulation_steps=2),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01, epsilon=1e-3, gradient_accumulation_steps=2), initial_scale=1024.0
    ),
}
BATCHES = [8, 8, 8, 5, 1, 8, 8]  # of global batches; with four replicas some have no share


# On the ranks


class Both:
    """A case as one process has it and as replicas have it, and what both are fed."""

    def __init__(self, name: str, rules: str, shape: Shape, optimizer: str) -> None:
        self.case, self.shape, self.rng = MODELS[name], shape, np.random.default_rng(0)
        self.models = [self.case.build("float64") for _ in range(2)]
        x, _ = self.fed(8)[1]
        tp_planner.parallelize(self.models[1], layout(name, rules, shape), x, batch_axis="batch")
        for model in self.models:
            self.compile(model, optimizer)

    def compile(self, model: keras.Model, optimizer: str) -> None:
        model.compile(OPTIMIZERS[optimizer](), self.case.make_loss("float64"), jit_compile=False)

    def fed(self, size: int) -> tuple[Any, Any]:
        x, y = self.case.batch(self.rng, size)
        replica = dist.get_rank() // self.shape[1]
        return (x, y), (share(x, replica, self.shape[0]), share(y, replica, self.shape[0]))

    def train(self, size: int = 8) -> list[float]:
        """Make one micro-step, and return both losses."""
        fed = self.fed(size)
        return [float(model.train_on_batch(*each)) for model, each in zip(self.models, fed, strict=True)]

    def in_a_loop(self) -> None:
        """Make one micro-step in a loop of one's own."""
        for model, (x, y) in zip(self.models, self.fed(8), strict=True):
            model.zero_grad()
            self.case.make_loss("float64")(y, model(x, training=True)).backward()
            variables = model.trainable_variables
            model.optimizer.apply([variable.value.grad for variable in variables], variables)

    def differences(self, what: str) -> dict[str, float]:
        return differences(what, *self.models)


def differences(what: str, expected: keras.Model, found: keras.Model) -> dict[str, float]:
    """Return how far weights and slots of one model, what is added up among them, are from those of another."""
    arrays, others = variables_of(expected), variables_of(found)
    scale = max(float(np.abs(array).max()) for array in arrays.values())
    return {f"{what}: {key}": float(np.abs(others[key] - arrays[key]).max()) / scale for key in arrays}


def train(name: str, rules: str, shape: Shape, optimizer: str) -> dict[str, float]:
    """Return how far replicas are from one process after each micro-step."""
    both, errors = Both(name, rules, shape, optimizer), {}
    for number, size in enumerate(BATCHES):
        losses = both.train(size)
        errors[f"{number}: loss"] = relative(losses[1], losses[0]) * 1e-6  # Keras adds them in float32
        errors |= both.differences(f"{number}")
    return errors


def stop_in_between(folder: str) -> dict[str, float]:
    """Return how far replicas are from one process where something reads or sets what they have added up."""
    both, errors = Both("mlp", "model axis", (2, 2), "adamw"), {}
    alone, replicas = both.models
    for _ in range(4):
        both.train()
    path = save_in_between(replicas, folder)
    again = Both("mlp", "model axis", (4, 1), "adamw").models[1]
    tp_planner.load_checkpoint(again, f"{folder}/checkpoints")
    errors |= differences("a checkpoint on another mesh", alone, again)
    errors |= differences("a file of Keras", alone, keras.models.load_model(path))
    replicas.optimizer.set_weights([np.array(each) for each in alone.optimizer.variables])
    errors |= both.differences("set")
    both.in_a_loop()
    errors |= both.differences("a loop, which averages")
    both.train()
    errors |= both.differences("an update")
    both.train()
    both.in_a_loop()
    both.in_a_loop()
    errors |= both.differences("an update in a loop")
    both.train()
    tp_planner.restore(replicas)
    errors |= both.differences("restored")
    tp_planner.parallelize(replicas, layout("mlp", "model axis", (4, 1)), batch_axis="batch")
    both.shape = (4, 1)
    errors |= both.differences("parallel again")
    both.train()
    both.train()
    return errors | both.differences("an update after that")


def save_in_between(model: keras.Model, folder: str) -> str:
    path = str(Path(folder) / "model.keras")
    model.save(path)
    tp_planner.save_checkpoint(model, Path(folder) / "checkpoints")
    return path


class Reading(keras.Model):
    """A model whose own training step is Keras's, and may be anything."""

    def train_step(self, data: Any) -> Any:
        return super().train_step(data)


def read_gradients() -> tuple[dict[str, float], tuple[str, ...]]:
    """Train a model with a train_step of its own; return how far it is from one process, and the plan's notes."""
    x, y = np.random.default_rng(0).standard_normal((2, 8, 4))
    models, rank = [], dist.get_rank()
    for _ in range(2):
        with building("float64"):
            inputs = keras.Input((4,), name="x")
            models.append(randomize(Reading(inputs, keras.layers.Dense(4, name="up")(inputs), name="reading"), 0))
        models[-1].compile(OPTIMIZERS["adamw"](), keras.losses.MeanSquaredError(dtype="float64"))
    plan = tp_planner.plan(models[1], layout("mlp", "no rules", (2, 1)), np.ones((4, 4)), batch_axis="batch")
    tp_planner.parallelize(models[1], plan)
    for model, own in zip(models, (slice(None), slice(4 * rank, 4 * rank + 4)), strict=True):
        for _ in range(4):
            model.train_on_batch(x[own], y[own])
    return differences("its own step", *models), plan.notes


class Gate(keras.layers.Layer):
    """Gradients pass for rows from ``first`` on."""

    first = 0

    def call(self, x: Any) -> Any:
        stopped = keras.ops.stop_gradient(x)
        return (
            keras.ops.concatenate([stopped[: self.first], x[self.first :]])
            if 0 < self.first < len(x)
            else (stopped if self.first else x)
        )


def leave_out() -> dict[str, float]:
    """Train with every variable in a bucket of its own and without gradients of some; return how far replicas are.

    Of four rows each of two replicas has two. In the last of the micro-steps either or both of them have no gradient.
    """
    x, y = np.random.default_rng(0).standard_normal((2, 4, 4))
    models, rank, errors = [], dist.get_rank(), {}
    for _ in range(2):
        with building("float64"):
            inputs = keras.Input((4,), name="x")
            gated = Gate(name="gate")(keras.layers.Dense(4, name="left_out")(inputs))
            outputs = keras.layers.Dense(4, name="head")(keras.layers.Concatenate(name="both")([inputs, gated]))
            models.append(randomize(keras.Model(inputs, outputs, name="gated"), 0))
        models[-1].compile(OPTIMIZERS["momentum"](), keras.losses.MeanSquaredError(dtype="float64"), jit_compile=False)
    with mock.patch.object(bucket_gradients, "BUCKET_BYTES", 1):
        plan = tp_planner.plan(models[1], layout("mlp", "no rules", (2, 1)), x[:2], batch_axis="batch")
    tp_planner.parallelize(models[1], plan)
    for number, first in enumerate((0, 0, 0, 4, 0, 2, 2, 0, 4, 4)):
        models[0].get_layer("gate").first = first
        models[0].train_on_batch(x, y)
        models[1].get_layer("gate").first = max(0, first - 2 * rank)
        with tp_planner.record(models[1]) as recorder:
            models[1].train_on_batch(x[2 * rank : 2 * rank + 2], y[2 * rank : 2 * rank + 2])
        if not first:
            plan.check(recorder.recording)
        errors |= differences(f"micro-step {number}", *models)
    return errors


def count(name: str, rules: str, shape: Shape, optimizer: str) -> list[tuple[bool, list[tuple[str, str, str]]]]:
    """Return of each of four micro-steps whether it updated, and what it sent over the batch axis; all as planned."""
    case, replica = MODELS[name], dist.get_rank() // shape[1]
    x, y = case.batch(np.random.default_rng(0), 8)
    own = share(x, replica, shape[0]), share(y, replica, shape[0])
    model, found = case.build(), []
    model.compile(OPTIMIZERS[optimizer](), case.make_loss(), jit_compile=False)
    plan = tp_planner.plan(model, layout(name, rules, shape), own[0], batch_axis="batch")
    tp_planner.parallelize(model, plan, check="first_step")
    assert plan.step.whole_update
    for _ in range(4):
        with tp_planner.record(model) as recorder:
            model.train_on_batch(*own)
        plan.check(recorder.recording)
        sent = [each for each in recorder.recording.collectives if each.axis == "batch"]
        found.append((recorder.recording.updates, [(each.phase, each.kind, each.place) for each in sent]))
    return found


def meter_last_micro_steps(name: str, rules: str, shape: Shape) -> tuple[Memory, list[Memory]]:
    """Return the planned memory of a rank, and what the last micro-steps of a few updates take."""
    case = MODELS[name]
    model = case.build(**SIZES.get(name, {}))
    model.compile(keras.optimizers.AdamW(gradient_accumulation_steps=2), case.make_loss(), jit_compile=False)
    x, y = case.batch(np.random.default_rng(0), 8)
    plan = tp_planner.plan(model, layout(name, rules, shape), x, batch_axis="batch")
    tp_planner.parallelize(model, plan)
    found = []
    for _ in range(4):
        model.train_on_batch(x, y)
        model.zero_grad()
        found.append(metered_training(model, x, y))
    return plan.step.memory, found[1:]


def fit_under_a_distribution(kind: str) -> dict[str, float]:
    """Fit shuffled, uneven batches and stop before an update; return how far this is from one process."""
    models = []
    x, y = rows(15)
    for distribution in (contextlib.nullcontext(), distributed(kind)):
        keras.utils.set_random_seed(0)
        with distribution:
            model = normalized()
            model.compile(OPTIMIZERS["adamw"](), keras.losses.MeanSquaredError(dtype="float64"))
            model.fit(x, y, batch_size=4, epochs=2, verbose=0)
            models.append(variables_of(model))
    expected, found = models
    return {key: float(np.abs(found[key] - expected[key]).max()) for key in expected}


def put_off(name: str, rules: str, of_torch: bool, in_parts: bool) -> tuple[dict[str, float], list[int], set[str]]:
    """Return how far a loop of one's own is from one process, what its passes have sent, and what mistakes hear.

    In each of two updates three passes are put off, of which the first is zeroed, and the last one sends. Where all
    gradients are in parts, an update in between is none.
    """
    case, replica = MODELS[name], dist.get_rank() // 2
    models, counts, heard = [case.build("float64") for _ in range(2)], [], set()
    batches = [case.batch(np.random.default_rng(seed), size) for seed, size in enumerate((8, 4, 5, 1))]
    given = replace(layout(name, rules, (2, 2)), sequence_parallel=name == "gpt")
    tp_planner.parallelize(models[1], given, share(batches[1][0], replica, 2), batch_axis="batch")
    for model in models:
        model.compile(loss=case.make_loss("float64"))  # of which a share may be empty
        kind = keras.optimizers.Adam(0.01, epsilon=1e-3, global_clipnorm=0.1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) if of_torch else kind
        for _ in range(2):
            model.zero_grad()
            for number, (x, y) in enumerate(batches):
                fed = (x, y) if model is models[0] else (share(x, replica, 2), share(y, replica, 2))
                later = model is models[1] and number < 3
                recorder = tp_planner.record(model) if model is models[1] else contextlib.nullcontext()
                with recorder as seen, tp_planner.no_sync(model) if later else contextlib.nullcontext():
                    model.compute_loss(None, fed[1], model(fed[0], training=True)).backward()
                if seen is not None:
                    sent = seen.recording.collectives
                    counts.append(sum(each.axis == "batch" and each.bytes > 8 for each in sent))
                if number == 1 and in_parts:
                    update(optimizer, model)
                elif number == 1 and later:
                    for mistake in (update, clip):
                        with pytest.raises(tp_planner.ParallelRuntimeError) as error:
                            mistake(optimizer, model)
                        heard.add(str(error.value))
                if number == 0:
                    model.zero_grad()
            update(optimizer, model)
        if not (of_torch or in_parts) and model is models[1]:
            with tp_planner.no_sync(model):
                model.compute_loss(None, fed[1], model(fed[0], training=True)).backward()
            copies = [variable.value.grad for variable in model.trainable_variables]
            model.zero_grad()
            with pytest.raises(tp_planner.ParallelRuntimeError) as error:
                optimizer.apply(copies, model.trainable_variables)
            heard.add(str(error.value))
    expected, found = ({key: each.numpy() for key, each in named_variables(model).items()} for model in models)
    return {key: relative(found[key], expected[key]) for key in expected}, counts, heard


def update(optimizer: Any, model: keras.Model) -> None:
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer.step()
    else:
        variables = model.trainable_variables
        optimizer.apply([variable.value.grad for variable in variables], variables)


def clip(_: Any, model: keras.Model) -> None:
    torch.nn.utils.clip_grad_norm_([each for each in model.parameters() if each.requires_grad], 1.0)


# In the parent


def check(ranks: list[dict[str, float]], tolerance: float = 1e-12) -> None:
    for errors in ranks:
        assert {key: error for key, error in errors.items() if not error <= tolerance} == {}


@pytest.mark.parametrize(
    ("name", "rules", "shape", "optimizer"),
    [
        ("mlp", "model axis", (4, 1), "momentum"),
        ("stacked", "model axis, zero 1", (4, 1), "averages"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [
                ("gpt", "both axes", (2, 2), "adamw"),
                ("mlp", "model axis", (2, 2), "lamb"),
                ("mlp", "both axes", (2, 2), "ftrl"),
                ("mlp", "model axis", (2, 2), "loss scaling"),
                ("tied", "model axis, zero 3", (2, 2), "adamw"),
                ("llama", "model axis", (2, 2), "averages"),
                ("gpt", "model axis", (4, 1), "adamw"),
                ("normalized", "normalized", (2, 2), "momentum"),
                ("stacked", "no rules", (4, 1), "adamw"),
            ]
        ),
    ],
)
def test_micro_steps(pools: Pools, name: str, rules: str, shape: Shape, optimizer: str) -> None:
    """Losses, weights, slots and sums of gradients are those of one process, with uneven and empty shares, clipped."""
    check(pools(4).run(train, name, rules, shape, optimizer))


def test_stopping_in_between(pools: Pools, tmp_path: Path) -> None:
    """Checkpoints, files, what is set, loops and restore have the sum of what replicas have added up, none twice."""
    check(pools(4).run(stop_in_between, str(tmp_path)))


@pytest.mark.parametrize("kind", ["replicated", pytest.param("mesh, zero 1", marks=pytest.mark.slow)])
def test_under_a_distribution(pools: Pools, kind: str) -> None:
    check(pools(4).run(fit_under_a_distribution, kind))


@pytest.mark.parametrize(
    ("name", "rules", "of_torch", "counts"),
    [
        ("mlp", "model axis", True, [0, 0, 0, 1] * 2),
        ("gpt", "model axis", False, [0, 0, 0, 2] * 2),
        pytest.param("gpt", "both axes", False, None, marks=pytest.mark.slow),
        pytest.param("stacked", "stacked", True, None, marks=pytest.mark.slow),
    ],
)
def test_loops_that_put_off(pools: Pools, name: str, rules: str, of_torch: bool, counts: list[int] | None) -> None:
    """What passes have added up travels once, and an update without that is refused."""
    for errors, sent, heard in pools(4).run(put_off, name, rules, of_torch, False):
        check([errors])
        assert counts is None or sent == counts
        for message in heard:
            assert message.endswith(
                "is this replica's alone; make the last backward pass before an update outside of tp_planner.no_sync, "
                "which sends what all of them have added up"
            )
        assert heard


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["model axis, zero 1", "model axis, zero 3"])
def test_loops_whose_gradients_are_in_parts(pools: Pools, rules: str) -> None:
    """They are reduced in each pass, so that an update without a last pass outside is that of one process, too."""
    for errors, sent, _ in pools(4).run(put_off, "tied", rules, False, True):
        check([errors])
        assert all(sent)


SAMPLES = ("backward", "all_reduce", "samples of each replica")
GRADIENTS = ("backward", "all_reduce", "gradients 0")


def test_gradients_are_sent_once_an_update(pools: Pools) -> None:
    """What is executed over the batch axis is what the plan says: no gradients before the last micro-step."""
    for shape in ((2, 2), (4, 1)):
        for found in pools(4).run(count, "mlp", "model axis", shape, "momentum"):
            assert found == [(False, [SAMPLES]), (True, [SAMPLES, GRADIENTS])] * 2


@pytest.mark.slow
def test_parts_are_reduced_in_each_micro_step(pools: Pools) -> None:
    """Replicas that keep parts of gradients have no room for the whole; weights are put together once an update."""
    for found in pools(4).run(count, "mlp", "model axis, zero 1", (2, 2), "momentum"):
        each = [SAMPLES, ("backward", "reduce_scatter", "gradients 0")]
        clipped = ("update", "all_reduce", "gradient clipping")
        assert found == [(False, each), (True, [*each, clipped, ("update", "all_gather", "weights 0")])] * 2


def test_what_has_no_gradient_in_the_last_micro_step(pools: Pools) -> None:
    """It is left out of the update, as by one process, though what was added up of it has travelled."""
    for errors in pools(2).run(leave_out):
        check([errors])


def test_a_step_of_ones_own(pools: Pools) -> None:
    """It may read gradients, so they are averaged in each micro-step, and the plan says why."""
    for errors, notes in pools(2).run(read_gradients):
        check([errors])
        assert notes == (
            "gradients are averaged in each of the 3 micro-steps of an update: Reading has a train_step of its own, "
            "which may read them",
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rules", "shape"),
    [
        ("gpt", "model axis", (2, 2)),
        ("gpt", "both axes", (2, 2)),
        ("mlp", "no rules", (4, 1)),
        ("gpt", "model axis, zero 1", (2, 2)),
    ],
)
def test_memory_of_the_last_micro_step(pools: Pools, name: str, rules: str, shape: Shape) -> None:
    """Within 5 % of the plan's, sums of gradients among the optimizer's slots."""
    for planned, found in pools(4).run(meter_last_micro_steps, name, rules, shape):
        assert pytest.approx(planned.peak.total, rel=0.05) in [each.peak.total for each in found]
        assert {each.largest.optimizer for each in found} == {planned.largest.optimizer}


def test_what_the_plan_says() -> None:
    """Text and JSON say what is made once an update, and what there is not."""
    case = MODELS["mlp"]
    model = case.build()
    model.compile(OPTIMIZERS["momentum"](), case.make_loss())
    plan = tp_planner.plan(model, layout("mlp", "model axis", (2, 2)))
    assert tp_planner.Plan.from_json(plan.to_json()) == plan
    assert [each.once for each in plan.collectives] == [False, False, True, True]
    assert plan.notes == (
        "gradients are averaged once in the 2 micro-steps of an update: each replica adds up its own, and the last of "
        "them sends the sums; the plan is that of this one",
    )
    lines = [" ".join(line.split()) for line in str(plan).splitlines()]
    assert lines[17] == (
        "collectives of one training step: 4 (4 all_reduce), the last of the 2 micro-steps of an update; "
        "2 in each other"
    )
    assert "1 backward all_reduce gradients 0, over 'batch', once in 2 micro-steps 7480 7480" in lines
