"""Reads: weights in shards that a program reads are read in one step, and gradients are what they were, to the bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.models import randomize
from tests.replicas import MODELS, layout, share
from tests.workers import Pools, WorkerPool, layout_map
from tp_planner.replay import automatic, reads
from tp_planner.replay.once import SWITCH
from tp_planner.replay.program import Name, Step
from tp_planner.replay.reads import with_reads_together
from tp_planner.storage.local_shards import LocalShards
from tp_planner.storage.variables import read_shard, read_shards

layers = keras.layers
RULES = {"(.*/)?up/kernel": (None, "model"), "(.*/)?up/bias": ("model",), "(.*/)?down/kernel": ("model", None)}
READ = functools.partial(read_shard, site=None)
V, W, X = (SimpleNamespace(name=name) for name in "vwx")
A, B, C, D = (Name(number, gradient=True) for number in range(4))


# Which reads of a program

PROGRAMS: dict[str, tuple[list[Step], list[Any]]] = {
    "two": ([Step(A, READ, (V,), {}), Step(B, torch.exp, (A,), {}), Step(C, READ, (W,), {})], [(A, C), B]),
    "one": ([Step(A, READ, (V,), {})], [A]),
    "one twice": ([Step(A, READ, (V,), {}), Step(B, READ, (V,), {}), Step(C, READ, (W,), {})], [A, B, C]),
    "without a gradient": ([Step(A, READ, (V,), {}), Step(Name(1), READ, (W,), {})], [A, Name(1)]),
    "behind a switch": (
        [
            Step(A, READ, (V,), {}),
            Step(B, READ, (W,), {}),
            Step(None, SWITCH, (False,), {}),
            Step(C, READ, (X,), {}),
        ],
        [(A, B), None, C],
    ),
    "other reads": ([Step(A, READ, (V,), {}), Step(B, print, (W,), {}), Step(C, READ, (X,), {})], [(A, C), B]),
}


@pytest.mark.parametrize(("steps", "results"), PROGRAMS.values(), ids=PROGRAMS)
def test_which_reads_are_one(steps: list[Step], results: list[Any]) -> None:
    """Reads of different variables, whose gradients are taken, stand where the first of them did."""
    with mock.patch.object(reads, "may_be_read_together", return_value=True):
        found = with_reads_together(steps)
    assert [step.result for step in found] == results
    assert all((step.function is read_shards) == isinstance(step.result, tuple) for step in found)


# On the ranks


def stack() -> keras.Model:
    inputs = keras.Input((16,), name="inputs")
    tied = layers.Dense(32, "relu", name="twice_up")
    x = layers.Dense(16, name="down")(layers.Dense(32, "relu", name="up")(inputs))
    x = layers.Dense(16, name="twice_down")(tied(x))
    x = layers.Dense(16, name="more_down")(tied(x))
    return randomize(keras.Model(inputs, layers.Dense(8, name="head")(x), name="model"))


def gradients(way: str, jit_compile: Any) -> tuple[int, list[np.ndarray]]:
    """Return how often shards were read together in the last of some steps, and gradients of all of them."""
    keras.utils.clear_session()
    model = stack()
    rules = {pattern.replace("(.*/)?", "(.*/)?(twice_|more_)?"): axes for pattern, axes in RULES.items()}
    tp_planner.parallelize(model, layout_map(rules))
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=jit_compile)
    rng = np.random.default_rng(5)
    x, y = (torch.from_numpy(rng.standard_normal((6, size)).astype("float32")) for size in (16, 8))
    frozen = model.get_layer("down").kernel
    seen: list[torch.Tensor] = []
    if way == "a hook":
        frozen._value.register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)

    def step(number: int) -> list[Any]:
        weights = model.trainable_weights
        if way == "frozen" and number >= 4:
            frozen._value.requires_grad_(False)
        loss = (model(x, training=True) - y).square().sum()
        values = [each.value for each in weights]
        if way == "some":
            return list(torch.autograd.grad(loss, values[2:4]))
        if way == "twice" and number:
            (0.5 * loss).backward(retain_graph=True)  # beside what is there of the step before
            loss.backward()
        elif way == "two calls":
            (loss + (model(2 * x, training=True) - y).square().sum()).backward()
        elif way == "unused":
            model.get_layer("head").kernel.value.sum().backward()
            (model(x, training=True) * 0).sum().detach()
            loss.backward()
        else:
            loss.backward()
        found = [None if each.grad is None else each.grad.clone() for each in values]
        if way not in ("twice",):
            model.zero_grad()
        return found

    plain, count = LocalShards.forward, [0]

    def counting(ctx: Any, *parameters: Any) -> Any:
        count[0] += 1
        return plain(ctx, *parameters)

    found: list[Any] = []
    with mock.patch.object(automatic, "PATIENCE", 1), mock.patch.object(LocalShards, "forward", counting):
        for number in range(7):
            count[0] = 0
            found += step(number)
    return count[0], [np.zeros(()) if each is None else _local(each).numpy() for each in (*found, *seen)]


def reads_together(shape: tuple[int, int]) -> int:
    """Return how often a replayed step of a GPT reads shards together, on a mesh of replicas and model."""
    case, replica = MODELS["gpt"], dist.get_rank() // shape[1]
    model = case.build("float64")
    x, y = (share(each, replica, shape[0]) for each in case.batch(np.random.default_rng(1), 8))
    tp_planner.parallelize(model, layout("gpt", "model axis", shape), x, batch_axis="batch")
    model.compile(keras.optimizers.AdamW(0.01), case.make_loss("float64"), jit_compile=True)
    for _ in range(4):
        model.train_on_batch(x, y)
    with mock.patch.object(LocalShards, "forward", side_effect=LocalShards.forward) as forward:
        model.train_on_batch(x, y)
    return forward.call_count


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local.detach().clone()


# In the parent


@pytest.mark.parametrize("way", ["plain", "some", "twice", "two calls", "unused", "a hook", "frozen"])
def test_gradients_are_the_same_to_the_bit(workers: WorkerPool, way: str) -> None:
    """Whatever is asked of autograd, gradients are eager code's; a weight that is frozen later has none."""
    compared: Callable[[Any], list[Any]] = lambda jit_compile: workers.run(gradients, way, jit_compile)  # noqa: E731
    for (eagerly, expected), (together, found) in zip(compared(False), compared("auto"), strict=True):
        assert (eagerly, together) == (0, 0 if way == "frozen" else 2 if way in ("two calls", "unused") else 1)
        assert len(found) == len(expected) > 7
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize(("shape", "times"), [((1, 4), 1), ((2, 2), 0)])
def test_gradients_that_replicas_average_come_one_by_one(pools: Pools, shape: tuple[int, int], times: int) -> None:
    """So that those of the last layers are on their way while the backward pass is at the first."""
    assert pools(4).run(reads_together, shape) == [times] * 4
