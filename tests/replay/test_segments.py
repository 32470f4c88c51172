"""Segments of a program: which steps are in one, what it takes and leaves, and that equal ones share what is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tp_planner.replay.program import Name, Program, Step, compiled
from tp_planner.replay.segments import joined

X, A, B, C, D, E, F = (Name(number) for number in range(7))


def alone(result: Name, function: Any, *args: Any) -> Step:
    return Step(result, function, args, {}, alone=True)


def between(tensor: torch.Tensor) -> torch.Tensor:
    """Stand for a boundary."""
    return tensor + 10


@pytest.mark.parametrize(("shared", "number"), [(True, 1), (False, 2)])
def test_equal_segments(shared: bool, number: int) -> None:
    """Two blocks with weights of their own are one function of tensors, weights among them, with a boundary between."""
    made: list[Program] = []

    def make(segment: Program) -> Program:
        made.append(segment)
        return segment

    weights = [torch.full((3,), value) for value in (2.0, 5.0)]
    steps = [
        alone(A, torch.mul, X, weights[0]),
        alone(B, torch.neg, A),
        Step(C, between, (B,), {}),
        alone(D, torch.mul, C, weights[1]),
        alone(E, torch.neg, D),
    ]
    found = joined(steps, [E], make, shared)
    assert ([step.function is between for step in found], len(made)) == ([False, True, False], number)
    assert [step.result for step in found] == [(B,), C, (E,)]
    x = torch.arange(3.0)
    expected = compiled([X], steps, [E])(x)
    torch.testing.assert_close(compiled([X], found, [E])(x), expected, rtol=0, atol=0)


def test_what_a_segment_leaves() -> None:
    """What is used later or returned; nothing of what only it uses, and no segment of a single step."""
    steps = [
        alone(A, torch.abs, X),
        alone(X, torch.Tensor.to, X, torch.float32),  # returns what it is given
        alone(B, torch.neg, A),
        alone(C, torch.exp, B),
        Step(D, between, (B,), {}),
        alone(E, torch.neg, D),
        Step(F, between, (E,), {}),
    ]
    found = joined(steps, (A, F), lambda segment: segment)
    assert [(step.result, step.args) for step in found] == [((A, B), (X,)), (D, (B,)), (E, (D,)), (F, (E,))]
    x = torch.arange(3.0)
    for given, expected in zip(compiled([X], found, (A, F))(x), (x, x), strict=True):
        torch.testing.assert_close(given, expected, rtol=0, atol=0)
