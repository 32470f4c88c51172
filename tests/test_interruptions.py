"""An exception out of any call of tp_planner's own code leaves process and models as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch.distributed as dist

import tp_planner
from tests.families import FAMILIES
from tests.interruptions import Calls, Interrupted, Point, state
from tests.layers.test_generation import prompts
from tests.models import CASES, building
from tests.replicas import whole
from tests.workers import Pools, layout_map
from tp_planner.training.model import applied_to

CASE = CASES["handwritten"]  # has functions of its own layers planned, and epilogues after outputs
Action = Callable[[], object]


def batch() -> Any:
    return CASE.batch(np.random.default_rng(3), 4)


def points(action: Action, count: int, draw: int = 0) -> list[Point]:
    """Return some of the calls that an action makes, others in each draw; the same on all ranks."""
    with Calls() as calls:
        action()
    drawn = [random.Random(draw).sample(calls.points, min(count, len(calls.points)))]
    if dist.is_initialized():
        dist.broadcast_object_list(drawn, 0)
    return drawn[0]


def interrupted(action: Action, at: Point) -> str:
    """Return the function out of whose call an exception came; "" for none, where all that follows takes back."""
    calls = Calls(at)
    try:
        with calls:
            action()
    except Interrupted:
        return calls.where
    return ""


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [f"{key}: {before[key]} became {after[key]}" for key in before if before[key] != after[key]]


# In the parent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["handwritten", "gpt"])
def test_interrupted_planning(name: str) -> None:
    """The model is as before, and planned again as ever."""
    case = CASES[name]
    model, (x, _) = case.build("float32"), case.batch(np.random.default_rng(3), 4)
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), ["cpu:0", "cpu:1"])
    layouts = keras.distribution.LayoutMap(mesh)
    for pattern, axes in case.rules.items():
        layouts[pattern] = axes

    def plan() -> str:
        return str(tp_planner.plan(model, layouts, x))

    expected = plan()
    for at in points(plan, 40):
        before = state(model)
        where = interrupted(plan, at)
        assert (where, differences(before, state(model))) == (where, [])
        assert plan() == expected


# On the ranks


def train(model: keras.Model) -> list[Any]:
    x, y = batch()
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), CASE.make_loss("float64"), jit_compile=False)
    losses = [float(model.train_on_batch(x, y)) for _ in range(2)]
    return [losses, *(whole(each._value) for each in model.trainable_variables)]


def close(one: list[Any], other: list[Any]) -> bool:
    return all(np.allclose(*pair, rtol=1e-10, atol=1e-12) for pair in zip(one, other, strict=True))


def interrupt_parallelize(count: int, draw: int) -> list[str]:
    """Interrupt ``parallelize`` at some points; return what is wrong with the model, and the one after it."""
    wrong = []
    with building("float64"):
        expected = train(CASE.build("float64"))
        layouts, x = layout_map(CASE.rules), batch()[0]

        def parallelize(model: keras.Model) -> None:
            tp_planner.parallelize(model, layouts, inputs=x)

        for at in points(lambda: parallelize(CASE.build("float64")), count, draw):
            model = CASE.build("float64")
            before = state(model)
            where = interrupted(lambda model=model: parallelize(model), at)
            if applied_to(model) is None:
                wrong += [f"{where}: {each}" for each in differences(before, state(model))]
                parallelize(model)
            for each in (model, tp_planner.parallelize(CASE.build("float64"), layouts, inputs=x)):
                wrong += [] if close(train(each), expected) else [f"{where}: trains wrong"]
    return wrong


def interrupt_replay(count: int, draw: int) -> list[str]:
    """Interrupt calls that are taped, and replayed, at some points; return what is wrong afterwards."""
    wrong = []
    with building("float64"):
        x, y = batch()
        model = CASE.build("float64")
        initial = [whole(each._value) for each in model.variables]
        expected = train(model)
        tp_planner.parallelize(model, layout_map(CASE.rules), inputs=x)

        def steps() -> None:
            model.compile(keras.optimizers.SGD(0.01), CASE.make_loss("float64"), jit_compile=True)
            for _ in range(3):
                model.train_on_batch(x, y)

        for at in points(steps, count, draw):
            before = state()
            where = interrupted(steps, at)
            wrong += [f"{where}: {each}" for each in differences(before, state())]
            for variable, value in zip(model.variables, initial, strict=True):
                variable.assign(value)
            wrong += [] if close(train(model), expected) else [f"{where}: trains wrong"]
    return wrong


def interrupt_generate(count: int, draw: int) -> list[str]:
    """Interrupt the generation of tokens at some points; return what is wrong afterwards."""
    wrong = []
    keras.utils.set_random_seed(1)
    model = FAMILIES["gpt2"].build()

    def generate() -> np.ndarray:
        model.compile(sampler="greedy", jit_compile=False)
        tokens: np.ndarray = model.generate(prompts(), stop_token_ids=None)["token_ids"]
        return tokens

    expected = generate()
    tp_planner.parallelize(model, layout_map(FAMILIES["gpt2"].case.rules), inputs=prompts())
    for at in points(generate, count, draw):
        before = state(model)
        where = interrupted(generate, at)
        wrong += [f"{where}: {each}" for each in differences(before, state(model))]
        wrong += [] if np.array_equal(generate(), expected) else [f"{where}: generates wrong"]
    return wrong


@pytest.mark.parametrize(
    ("interrupt", "draws"),
    [
        (interrupt_parallelize, [1]),
        pytest.param(interrupt_parallelize, [10] * 4, marks=pytest.mark.slow),
        pytest.param(interrupt_replay, [40], marks=pytest.mark.slow),
        pytest.param(interrupt_generate, [40], marks=pytest.mark.slow),
    ],
)
def test_interrupted_ranks(pools: Pools, interrupt: Callable[[int, int], list[str]], draws: list[int]) -> None:
    for draw, count in enumerate(draws):  # one after the other: ranks are given so much time for each
        assert pools(2).run(interrupt, count, draw) == [[], []]
