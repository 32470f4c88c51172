"""Tape: a program returns what the code returned, and code of which a program would return something else has none."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch

from tp_planner.regions.behind import contracted_dims
from tp_planner.replay.rewrites import product
from tp_planner.replay.tape import Tape

Code = Callable[[torch.Tensor], Any]
WEIGHT = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
STATE = torch.zeros(3)
TABLE = keras.Variable(np.arange(6.0).reshape(2, 3), name="table")


class Doubled(torch.autograd.Function):
    """The identity, with twice the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


class Switching(torch.autograd.Function):
    """Switches gradients on in its forward pass, which torch ends."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


def seeded(x: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return x + torch.randn(3)


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y += 1
    y[:, 0] = 7
    return y.neg_()


def several(x: torch.Tensor) -> dict[str, Any]:
    values, places = x.max(dim=1)
    halves = x.split([1, 2], dim=1)
    return {"max": [values, places], "rest": (halves[1].T, x.shape[0], "name")}


def without_gradient(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scale = (x @ WEIGHT).abs().max()
    return x @ WEIGHT / scale


def with_state(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        STATE.add_(x.sum(0))
    return x * STATE


def by_einsum(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(torch.einsum("ab,bc->ac", x, WEIGHT)).softmax(-1)


def with_positions(x: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(3, device=x.device) > 0, x, torch.tensor(float("-inf"))).exp()


def by_keras(x: torch.Tensor) -> torch.Tensor:
    return keras.ops.matmul(keras.ops.softmax(x, axis=-1), keras.Variable(WEIGHT.detach(), name="weight"))


def of_named_results(x: torch.Tensor) -> torch.Tensor:
    square = x.transpose(-1, -2) @ x + torch.eye(x.shape[-1], dtype=x.dtype)
    return torch.stack(torch.linalg.slogdet(square)).sum() + torch.cat(x.sort(dim=-1)[:1])


def from_a_place(x: torch.Tensor) -> torch.Tensor:
    row = (x.detach()[0, 1] > 0).to(torch.int32)  # another for the inputs that are taped than for those that are not
    return keras.ops.slice(x, (row, 0), (1, 3)) * keras.ops.slice(TABLE, (row, 0), (1, 3))


WITH_PROGRAM: list[Code] = [
    in_place, several, without_gradient, with_state, by_einsum, with_positions, by_keras, from_a_place, of_named_results
]  # fmt: skip


def inputs(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((2, 3)).astype("float32"))


@pytest.mark.parametrize(
    ("equation", "shapes", "contracted"),
    [
        ("ab,bc->ac", [(2, 3), (3, 4)], 1),
        ("abc,cde->abde", [(2, 3, 4), (4, 5, 2)], 1),
        ("abcd, cde -> abe", [(2, 3, 4, 5), (4, 5, 6)], 2),
        ("abcd,cdef->abef", [(2, 3, 4, 5), (4, 5, 2, 3)], 2),
        ("ab,bc->ac", [(2, 1), (3, 4)], None),
        ("ab,bc->ca", [(2, 3), (3, 4)], None),
        ("ab,cb->ac", [(2, 3), (4, 3)], None),
        ("ab,bc->abc", [(2, 3), (3, 4)], None),
        ("aecd,abcd->acbe", [(2, 3, 4, 5), (2, 6, 4, 5)], None),
        ("aab,bc->ac", [(2, 2, 3), (3, 4)], None),
        ("ab,ab->ab", [(2, 3), (2, 3)], None),
        ("bab,bc->bac", [(3, 3, 3), (3, 4)], None),
        ("ab,bcb->acb", [(2, 3), (3, 4, 3)], None),
        ("...b,bc->...c", [(2, 3), (3, 4)], None),
    ],
)
def test_einsums_that_are_products(equation: str, shapes: list[tuple[int, ...]], contracted: int | None) -> None:
    rng = np.random.default_rng(0)
    operands = [torch.from_numpy(rng.standard_normal(shape)) for shape in shapes]
    assert contracted_dims(equation, *operands) == contracted
    if contracted is not None:
        torch.testing.assert_close(product(*operands, contracted), torch.einsum(equation, *operands))


def taped(code: Code) -> tuple[Tape, Any]:
    x = inputs(0)
    with Tape([x]) as tape:
        output = code(x)
    return tape, tape.program(output)


def result(call: Callable[[torch.Tensor], Any]) -> tuple[Any, ...]:
    """Return what a call with other inputs gives, and the gradients and the state it leaves."""
    STATE.zero_()
    WEIGHT.grad = None
    x = inputs(1).requires_grad_()
    output = call(x)
    torch.stack([leaf.double().sum() for leaf in keras.tree.flatten(output) if torch.is_tensor(leaf)]).sum().backward()
    return output, x.grad, WEIGHT.grad, STATE.clone()


@pytest.mark.parametrize("code", WITH_PROGRAM)
def test_a_program_does_what_the_code_does(code: Code) -> None:
    tape, program = taped(code)
    assert tape.problem == ""
    expected, found = result(code), result(program)
    keras.tree.assert_same_structure(expected, found)
    for one, other in zip(keras.tree.flatten(expected), keras.tree.flatten(found), strict=True):
        if torch.is_tensor(one):
            torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6, equal_nan=True)
        else:
            assert other == one


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (lambda x: x * x.sum().item(), "code depends on values, by aten._local_scalar_dense.default"),
        (lambda x: x if x.sum() > 0 else -x, "code depends on values, by aten._local_scalar_dense.default"),
        (lambda x: x[x > 0], "code depends on values, by aten.index.Tensor"),
        (lambda x: x.nonzero(), "code depends on values, by aten.nonzero.default"),
        (lambda x: x.max(dim=1), "the output is in containers of a kind of their own"),
        (lambda x: {"a": [OrderedDict(a=x)]}, "the output is in containers of a kind of their own"),
        (seeded, "code changes torch's random state"),
        (lambda x: x + torch.randn(3, generator=torch.Generator()), "code draws from a torch.Generator of its own"),
        (lambda x: x * x.tolist()[0][0], "torch's tolist returns a list"),
        (lambda x: x * torch.from_numpy(x.numpy()), "torch's numpy returns a ndarray"),
        (lambda x: Doubled.apply(x), "code switches gradients or dtypes by other means than torch functions"),
        (lambda x: Switching.apply(x), "code switches gradients or dtypes by other means than torch functions"),
        (lambda x: torch.vmap(torch.sin)(x), "code runs inside a transform of torch.func"),
        (lambda x: torch._C._functions.UndefinedGrad()(x) + 1, "a tensor is made by other means than torch functions"),
    ],
)
def test_code_without_a_program_says_why(code: Code, problem: str) -> None:
    tape, program = taped(code)
    assert (tape.problem, program) == (problem, None)


def test_a_program_keeps_no_more_alive_than_the_code() -> None:
    """Each tensor is let go after its last use: of a chain of ops, two tensors are there at a time."""
    alive: list[int] = []
    made: list[Any] = []

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            made.append(torch.utils.weak.TensorWeakRef(output))
            alive.append(sum(each() is not None for each in made))
            return output

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            x = x + 1
        return x

    _, program = taped(chain)
    with torch.no_grad(), Counting():
        program(inputs(1))
    assert max(alive) == 2


def test_what_other_threads_do_is_on_no_tape() -> None:
    """As threads do that load data while a model runs."""

    def load() -> None:
        torch.manual_seed(1)
        keras.random.uniform((2,), seed=3)

    x = torch.ones(2, 3)
    with Tape([x]) as tape:
        y = x * 2
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
    assert tape.program(y) is not None
    assert len(tape.steps) == 1
