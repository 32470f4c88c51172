"""Same bits: steps are the same only if nothing of what they make, forward and backward, differs in any bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tp_planner.replay import same_bits
from tp_planner.replay.program import Name, Step
from tp_planner.replay.rewrites import product
from tp_planner.replay.same_bits import Trials

Function = Callable[..., torch.Tensor]


def name(number: int, *shape: int, gradient: bool = True, plain: bool = True, on_cpu: bool = True) -> Name:
    stride = torch.empty(shape).stride()
    return Name(number, shape, stride, torch.float32, plain, gradient, on_cpu)


def are_same(before: Function, after: Function, *given: Name | torch.Tensor) -> bool:
    result = name(99, *given[0].shape)
    return Trials().are_same([Step(result, before, given, {})], [Step(result, after, given, {})])


class OtherGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (1 + 2**-23)


X, Y = name(0, 4, 6, 8), name(1, 4, 6, 8)
PAIRS: dict[str, tuple[Function, Function, bool]] = {
    "the same": (lambda x, y: x + y, lambda x, y: y + x, True),
    "another order of sums": (lambda x, y: (x + y) + 1.1, lambda x, y: x + (y + 1.1), False),
    "another sign of zero": (lambda x, y: x * 0.0 + y * 0.0, lambda x, y: (x + y) * 0.0 + 0.0, False),
    "another order in memory": (lambda x, y: x + y, lambda x, y: (x + y).mT.contiguous().mT, False),
    "another shape": (lambda x, y: x + y, lambda x, y: (x + y)[None], False),
    "another dtype": (lambda x, y: x + y, lambda x, y: (x + y).double(), False),
    "another gradient": (lambda x, y: x + y, lambda x, y: OtherGradient.apply(x) + y, False),
    "no gradient": (lambda x, y: x + y, lambda x, y: x.detach() + y, False),
}


@pytest.mark.parametrize(("before", "after", "same"), PAIRS.values(), ids=PAIRS)
def test_pairs(before: Function, after: Function, same: bool) -> None:
    """Of two tensors that both have gradients."""
    assert are_same(before, after, X, Y) is same


@pytest.mark.parametrize(
    "given",
    [
        name(1, 4, 6, 8, plain=False),
        name(1, 4, 6, 8, on_cpu=False),
        Name(1, (4, 6, 8), (48, 8, 1), torch.int32, True, False, True),
        name(1, 2**18, 8),
    ],
    ids=["a DTensor", "on a GPU", "of integers", "too large"],
)
def test_what_is_not_tried(given: Name) -> None:
    """Then nothing is known, and steps stay."""
    assert are_same(torch.add, torch.add, X, X)
    assert not are_same(torch.add, torch.add, given, given)


def test_gradients_of_what_is_outside_of_the_program() -> None:
    """Weights are drawn anew, too: theirs are compared, and nothing is left in them."""
    weight = torch.nn.Parameter(torch.ones(4, 6, 8))
    assert are_same(lambda x, y: x * y, lambda x, y: y * x, X, weight)
    assert not are_same(lambda x, y: x * y, lambda x, y: x * OtherGradient.apply(y), X, weight)
    assert weight.grad is None


def test_products() -> None:
    """An einsum that is a matrix product gives its bits, but where a kernel for small ones makes it."""
    for sizes, heads, same in (((4, 32, 32), (2, 8), True), ((2, 3, 6), (2, 3), False)):
        x, weight, result = name(0, *sizes), name(1, sizes[-1], *heads), name(2, *sizes[:2], *heads)
        einsum = Step(result, torch.einsum, ("abc,cde->abde", x, weight), {})
        assert Trials().are_same([einsum], [Step(result, product, (x, weight, 1), {})]) is same


def test_random_numbers_stay_as_they_are() -> None:
    """Those of the process are not drawn."""
    before = torch.get_rng_state()
    assert are_same(torch.add, torch.add, X, Y)
    assert torch.equal(torch.get_rng_state(), before)


def test_forms_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal layers have equal steps, whatever their numbers."""
    tried = []
    monkeypatch.setattr(same_bits, "_give_the_same", lambda *given: not tried.append(given))
    trials = Trials()
    for first in (0, 10):
        given, result = (name(first, 2, 3), name(first + 1, 2, 3)), name(first + 2, 2, 3)
        assert trials.are_same([Step(result, torch.add, given, {})], [Step(result, torch.sub, given, {})])
    assert len(tried) == 1
