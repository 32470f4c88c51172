"""Ops of Keras that make tensors of indices and sizes, and read what they made, are traced like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops

import tp_planner
from tp_planner.frontend.trace import fake_tensors


def _written_to(indices: torch.Tensor) -> int:
    indices.clamp_(min=3)
    return int(indices[0].item())


def _numbers(values: Any) -> torch.Tensor:
    return ops.convert_to_tensor(values)


READING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "split": lambda x: ops.split(x, [2, 5], axis=-1)[1],
    "hsplit": lambda x: ops.hsplit(x, [1, 3])[1],
    "vsplit": lambda x: ops.vsplit(x, [1])[0],
    "dsplit": lambda x: ops.dsplit(x, [3])[1],
    "tile": lambda x: ops.tile(x, _numbers([1, 2, 1])),
    "reshape": lambda x: ops.reshape(x, (2, ops.prod(ops.shape(x)[1:]))),
    "slice": lambda x: ops.slice(x, _numbers([0, 1, 2]), (1, 2, 3)),
    "slice_update": lambda x: ops.slice_update(x, np.array([0, 1, 2]), x[:1, :2, :3]),
    "size": lambda x: ops.reshape(x, (int(ops.size(x)),)),
    "arange": lambda x: x[:, : ops.arange(_numbers(1) + 2).shape[0]],
    "cond": lambda x: ops.cond(_numbers(4) > _numbers(3), lambda: x[:1], lambda: x),
    "switch": lambda x: ops.switch(_numbers(1), [lambda v: v, lambda v: v[:, :1]], x),
    "fori_loop": lambda x: ops.fori_loop(0, _numbers(1) + 1, lambda i, v: ops.concatenate([v, v]), x),
    "while_loop": lambda x: ops.while_loop(lambda i, v: i < 2, lambda i, v: (i + 1, v[:, 1:]), (_numbers(0), x))[1],
    "floor_divide of numbers": lambda x: ops.slice(x, (0, ops.cast(ops.floor_divide(3, 2), "int32"), 0), (2, 1, 8)),
    "bincount": lambda x: ops.bincount(_numbers([0, 1, 5])),
    "code of one's own": lambda x: x[:, : int(torch.cumsum(_numbers([1, 2]), 0)[-1].item())],
    "code that writes": lambda x: x[:, : _written_to(_numbers([1, 2]) * 2)],
}


@pytest.mark.parametrize("name", READING)
def test_op_makes_what_it_makes_of_values(name: str) -> None:
    real = torch.rand(2, 4, 8)
    expected = READING[name](real)
    with fake_tensors():
        found = READING[name](torch.empty(2, 4, 8))
    assert (tuple(found.shape), found.dtype) == (tuple(expected.shape), expected.dtype)


WRITING: dict[str, Callable[[torch.Tensor], object]] = {
    "a constant": lambda kept: kept.fill_(3),
    "a limit, to a view": lambda kept: kept[0:1].clamp_(min=7),
    "a sum with a number": lambda kept: kept.add_(1),
    "a product with a number": lambda kept: kept.mul_(7),
    "a sum with a number, to a view": lambda kept: kept[0:1].add_(1),
    "a sum with a real tensor": lambda kept: kept.add_(torch.ones_like(kept)),
    "a difference, by an operator": lambda kept: kept.__isub__(1),
    "an item": lambda kept: kept.__setitem__(0, 5),
    "where to": lambda kept: torch.add(kept, 1, out=kept),
    "a list of tensors": lambda kept: torch._foreach_add_([kept], 1),
    "a random number": lambda kept: kept.random_(),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("name", WRITING)
def test_what_others_may_have_is_not_written_to(name: str, dtype: torch.dtype) -> None:
    """The model's own tensors are the same after a trace, of one element or many."""
    for values in ([1], [1, 2]):
        kept = torch.tensor(values, dtype=dtype)
        with fake_tensors():
            WRITING[name](kept)
        assert kept.tolist() == values


class Packed(layers.Layer):
    """Takes the output of a projection apart by indices."""

    def __init__(self, indices: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.indices = indices
        self.both, self.out = layers.Dense(32, name="both"), layers.Dense(16, name="out")

    def build(self, shape: Any) -> None:
        self.both.build(shape)
        self.out.build((*shape[:-1], 16))

    def call(self, x: Any) -> Any:
        left, right = ops.split(self.both(x), self.indices, axis=-1)
        return self.out(left * right)


def test_projection_is_taken_apart_by_indices_as_by_number() -> None:
    mesh = keras.distribution.DeviceMesh((2,), ("model",), ["cpu:0", "cpu:1"])
    layout = keras.distribution.LayoutMap(mesh)
    layout["packed/both/kernel"] = (None, "model")
    plans = []
    for indices in (2, [16]):
        inputs = keras.Input((6, 16))
        model = keras.Model(inputs, Packed(indices, name="packed")(inputs), name="model")
        plan = tp_planner.plan(model, layout)
        plans.append(plan.collectives)
    assert plans[0] == plans[1]
    assert plans[0]
