"""In place: programs sum over ranks in their summands' memory where nothing else reads it, with the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tp_planner
from tests.models import randomize
from tests.workers import WorkerPool, layout_map
from tp_planner.ir.placement import Partial, Replicate
from tp_planner.ir.plan import Boundary, Transition
from tp_planner.regions.boundaries import cross_at_once
from tp_planner.regions.calls import Site
from tp_planner.replay import automatic
from tp_planner.replay.in_place import with_sums_in_place
from tp_planner.replay.program import Name, Step
from tp_planner.training.model import applied_to

layers = keras.layers
RULES = {"(.*/)?up/kernel": (None, "model"), "(.*/)?up/bias": ("model",), "(.*/)?down/kernel": ("model", None)}
SUM, SAME = Transition(Partial(), Replicate()), Transition(Replicate(), Replicate())
LEAVE, ENTER = (
    Boundary("x", (2, 2), "float32", 4, forward, backward, True) for forward, backward in ((SUM, SAME), (SAME, SUM))
)


# Which boundaries of a program

A, B, C, D, E = map(Name, range(5))


def crossing(given: Name, result: Name, boundary: Boundary) -> Step:
    return Step(result, cross_at_once, (given, boundary, "axis", "site"), {})


def step(function: Any, result: Name, *given: Name) -> Step:
    return Step(result, function, given, {}, alone=True)


PROGRAMS: dict[str, tuple[list[Step], Any, list[bool]]] = {
    "a sum": ([step(torch.exp, B, A), crossing(B, C, LEAVE)], C, [True]),
    "of an input": ([crossing(A, B, LEAVE)], B, [False]),
    "read again": ([step(torch.exp, B, A), crossing(B, C, LEAVE), step(torch.add, D, B, C)], D, [False]),
    "returned, too": ([step(torch.exp, B, A), crossing(B, C, LEAVE)], (B, C), [False]),
    "gradients of products": ([crossing(A, B, ENTER), step(torch.matmul, C, B, A)], C, [True]),
    "gradients of a view": ([crossing(A, B, ENTER), Step(C, torch.einsum, ("ab->ba", B), {})], C, [False]),
    "gradients of a sum": ([crossing(A, B, ENTER), step(torch.add, C, B, A)], C, [False]),
    "gradients of a product and a sum": (
        [crossing(A, B, ENTER), step(torch.matmul, C, B, A), step(torch.add, D, B, C)],
        D,
        [False],
    ),
    "a gradient from outside": ([crossing(A, B, ENTER)], B, [False]),
}


@pytest.mark.parametrize(("steps", "output", "alone"), PROGRAMS.values(), ids=PROGRAMS)
def test_what_a_program_uses_for_nothing_else(steps: list[Step], output: Any, alone: list[bool]) -> None:
    """Of the boundaries, those that may sum in place are marked; nothing else is another."""
    found = with_sums_in_place(steps, output)
    assert ["alone" in each.kwargs for each in found if each.function is cross_at_once] == alone
    assert [(each.result, each.function, each.args) for each in found] == [
        (each.result, each.function, each.args) for each in steps
    ]


# On the ranks


class Sums(TorchDispatchMode):
    """Counts the all-reduces that are made, by the op."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_reduce" in func.__name__:
            self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def the_axis() -> Any:
    keras.utils.clear_session()
    model = small_model()
    tp_planner.parallelize(model, layout_map(RULES))
    return applied_to(model).axes.model


def crossed(case: str) -> tuple[bool, list[np.ndarray], list[np.ndarray]]:
    """Return whether a boundary that nobody else reads from has summed in place, and numbers, without and with that."""
    axis, place = the_axis(), []

    def numbers(alone: bool) -> list[np.ndarray]:
        weight = torch.linspace(-1, 1, 4).reshape(2, 2).requires_grad_()
        other = torch.ones(2, 2, requires_grad=True)
        given, more = weight @ weight, []
        boundary = ENTER if case.startswith("gradient") else LEAVE
        if case == "kept by autograd":
            given = given.exp()
        elif case == "a view is there":
            more.append(given[0])
        elif case == "in another order":
            given = given.T
        elif case == "gradient of two":
            other_view = other.view(2, 2)  # made before: its gradient waits for that of the boundary
        elif case == "gradient of two views":
            other_row = other.view(1, 4)
        before = given.data_ptr()
        result = cross_at_once(given, boundary, axis, Site("", "test"), alone)
        place.append(result.data_ptr() == before)
        if case == "gradient of a linear layer":
            torch.nn.functional.linear(result[None], torch.ones(2, 2)).square().sum().backward()
        elif case == "gradient of two views":
            summed = result.view(1, 4) + other_row
            (summed @ torch.ones(4, 4)).square().sum().backward()
        elif case == "gradient of two":
            back = torch.full((2, 2), 2.0)
            (result + other_view).matmul(torch.eye(2)).backward(back)
            more.append(back)
        elif case == "gradient from outside":
            back = torch.full((2, 2), 2.0)
            result.backward(back)
            more.append(back)
        else:
            (result @ result).sum().backward()
        found = [result, weight.grad, other.grad if other.grad is not None else other, *more]
        return [each.detach().numpy().copy() for each in found]

    plain, alone = numbers(False), numbers(True)
    return place[-1], plain, alone


def small_model() -> keras.Model:
    inputs = keras.Input((16,), name="inputs")
    x = layers.Dense(32, "relu", name="up")(inputs)
    x = layers.Dense(16, name="down")(x)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.Dense(32, "relu", name="more_up")(x)
    x = layers.Dense(16, name="more_down")(x)
    return randomize(keras.Model(inputs, layers.Dense(8, name="head")(x), name="model"))


def trained(jit_compile: Any, way: str) -> tuple[dict[str, int], list[np.ndarray]]:
    """Train by Keras's step, or in a loop that holds on to what it can; return sums of a late step, and results."""
    keras.utils.clear_session()
    model = small_model()
    rules = {pattern.replace("(.*/)?", "(.*/)?(more_)?"): axes for pattern, axes in RULES.items()}
    tp_planner.parallelize(model, layout_map(rules))
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=jit_compile)
    rng = np.random.default_rng(5)
    x, y = (torch.from_numpy(rng.standard_normal((6, size)).astype("float32")) for size in (16, 8))
    kept: list[torch.Tensor] = []

    def step() -> Any:
        if way == "train_on_batch":
            return model.train_on_batch(x, y)
        given = x.clone().requires_grad_()
        for parameter in model.parameters():
            parameter.grad = None
        output = model(given, training=True)
        output.register_hook(kept.append)
        output.retain_grad()
        back = (output - y) / 6
        output.backward(back.detach(), retain_graph=True)
        output.backward(back.detach())
        kept.extend([given.grad, output.grad, back.detach()])
        model.optimizer.apply([each.value.grad for each in model.trainable_variables], model.trainable_variables)
        return output.detach().sum()

    with mock.patch.object(automatic, "PATIENCE", 1):
        results = [np.asarray(step()) for _ in range(6)]
        with Sums() as sums:
            results.append(np.asarray(step()))
    results += [keras.ops.convert_to_numpy(each) for each in (*model.variables, *kept)]
    return dict(sums.counts), results


# In the parent


@pytest.mark.parametrize(
    ("case", "in_place"),
    [
        ("nothing else", True),
        ("kept by autograd", False),
        ("a view is there", False),
        ("in another order", False),
        ("gradient of products", True),
        ("gradient of a linear layer", True),
        ("gradient of two", True),
        ("gradient of two views", True),
        ("gradient from outside", True),
    ],
)
def test_memory_that_others_read_stays(workers: WorkerPool, case: str, in_place: bool) -> None:
    """A sum is made elsewhere where autograd has kept its summand, a view is there, or others wait for a gradient."""
    for found, plain, alone in workers.run(crossed, case):
        assert found == in_place or case.startswith("gradient")
        for expected, number in zip(plain, alone, strict=True):
            np.testing.assert_array_equal(number, expected)


@pytest.mark.parametrize("way", ["train_on_batch", "loop"])
def test_steps_sum_in_place(workers: WorkerPool, way: str) -> None:
    """By Keras's default bits are those of eager code, in all that a loop can hold; no sum needs memory of its own."""
    compared: Callable[[Any], list[Any]] = lambda jit_compile: workers.run(trained, jit_compile, way)  # noqa: E731
    for (eager, expected), (default, found), (asked, close) in zip(
        compared(False), compared("auto"), compared(True), strict=True
    ):
        assert eager == {"all_reduce": sum(default.values())}
        assert set(default) == set(asked) >= {"all_reduce_"}
        assert set(default) == {"all_reduce_"} or torch.__version__ < "2.12"  # where autograd holds some of them
        for one, other, third in zip(expected, found, close, strict=True):
            np.testing.assert_array_equal(other, one)
            np.testing.assert_allclose(third, one, rtol=1e-4, atol=1e-5)
