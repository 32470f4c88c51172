"""Rewrites: programs with fewer passes over memory compute the same, and only where they may be rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attention

from tp_planner.frontend.functions import function_name
from tp_planner.replay import rewrites
from tp_planner.replay.program import Step
from tp_planner.replay.tape import Tape

Code = Callable[..., Any]
RNG = np.random.default_rng(0)


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.from_numpy(RNG.standard_normal(shape)))


KERNEL, BIAS = parameter(6, 6), parameter(6)
SINGLE = torch.nn.Parameter(torch.ones(6))  # in float32
HEADS, OF_HEADS, BACK = parameter(6, 2, 3), parameter(2, 3), parameter(2, 3, 6)
WEIGHTS = (KERNEL, BIAS, SINGLE, HEADS, OF_HEADS, BACK)


def heads(x: torch.Tensor) -> torch.Tensor:
    """Return queries, or keys, or values of (batch, heads, length, size), in another order of memory."""
    return torch.einsum("abc,cde->abde", x, HEADS).transpose(1, 2)


def around_a_change(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = x * 2
        total = torch.matmul(y, KERNEL)
        y += 1
        total = total + BIAS
    return total * x


def without_gradient(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        total = x @ KERNEL
    return (total + BIAS) * x


def copies_without_gradient(x: torch.Tensor) -> torch.Tensor:
    query = heads(x)
    with torch.no_grad():
        copied = query.contiguous()
    return attention(copied, query, query).flatten(2)


def changed_before(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y += 1
    return torch.matmul(y, KERNEL) + BIAS


def used_twice(x: torch.Tensor) -> torch.Tensor:
    total = x @ KERNEL
    return (total + BIAS) * total


def returned(x: torch.Tensor) -> Any:
    total = x @ KERNEL
    return total + BIAS, total


def attended(x: torch.Tensor) -> torch.Tensor:
    query, key, value = (heads(x).contiguous() for _ in range(3))
    y = attention(query, key, value, is_causal=True).transpose(1, 2)
    return torch.einsum("abcd,cde->abe", y, BACK) + BIAS


def attended_and_changed(x: torch.Tensor) -> torch.Tensor:
    given = heads(x)
    copied = given.contiguous()
    y = attention(copied, given + 1, given - 1).flatten(2)
    with torch.no_grad():
        given *= 2
    return y


def copies_used_twice(x: torch.Tensor) -> torch.Tensor:
    query = heads(x).contiguous()
    return attention(query, query + 1, query - 1).flatten(2)


def of_strided_heads(x: torch.Tensor) -> torch.Tensor:
    y = torch.einsum("abc,cde->abde", x, HEADS).permute(0, 3, 1, 2).contiguous()  # of size 2
    return attention(y, x[:, None, :, :2], x[:, None, :, 2:4]).flatten(2)


def viewed(x: torch.Tensor) -> torch.Tensor:
    y = attention(*(heads(x).contiguous() for _ in range(3)))
    return y.contiguous().view(x.shape[0], -1)


def viewed_later(x: torch.Tensor) -> torch.Tensor:
    return attention(*(heads(x).contiguous() for _ in range(3))).transpose(2, 3).mT.view(x.shape[0], -1)


def returned_attention(x: torch.Tensor) -> Any:
    y = attention(*(heads(x).contiguous() for _ in range(3)))
    return y.transpose(1, 2).flatten(2), y


ATTENTION = "scaled_dot_product_attention"
HEADS_OF = ("product", "transpose")
IN_PLACE = ("_set_grad_enabled", "mul_", "_set_grad_enabled")
# The functions of each program, but for those that every code has.
CASES: list[tuple[Code, list[str]]] = [
    (lambda x: torch.matmul(x, KERNEL) + BIAS, ["linear"]),
    (lambda x: torch.add(x @ KERNEL, BIAS), ["linear"]),
    (lambda x: x[0, 0] @ KERNEL + BIAS, ["__getitem__", "matmul", "add"]),
    (lambda x: torch.einsum("abc,cde->abde", x, HEADS) + OF_HEADS, ["linear"]),
    (lambda x: torch.einsum("abc,cde->abde", x, HEADS) + OF_HEADS[0], ["product", "__getitem__", "add"]),
    (lambda x: torch.einsum("abc,cd->adb", x, KERNEL), ["einsum"]),
    (lambda x: torch.matmul(x, KERNEL) + BIAS[:3, None], ["matmul", "__getitem__", "add"]),
    (lambda x: torch.matmul(x, KERNEL) + 1.0, ["matmul", "add"]),
    (lambda x: torch.add(torch.matmul(x, KERNEL), BIAS, alpha=2), ["matmul", "add"]),
    (lambda x: torch.matmul(x.float(), KERNEL.float()) + BIAS, ["float", "float", "matmul", "add"]),
    (lambda x: torch.matmul(x, KERNEL) + SINGLE, ["matmul", "add"]),
    (lambda x: torch.matmul(x, x.mT) + BIAS[:3], ["__get__", "matmul", "__getitem__", "add"]),
    (around_a_change, ["_set_grad_enabled", "mul", "matmul", "add_", "add", "_set_grad_enabled", "mul"]),
    (changed_before, ["mul", "add_", "linear"]),
    (without_gradient, ["_set_grad_enabled", "matmul", "_set_grad_enabled", "add", "mul"]),
    (
        copies_without_gradient,
        [*HEADS_OF, "_set_grad_enabled", "contiguous", "_set_grad_enabled", ATTENTION, "flatten"],
    ),
    (used_twice, ["matmul", "add", "mul"]),
    (returned, ["matmul", "add"]),
    (attended, [*HEADS_OF * 3, ATTENTION, "transpose", "linear"]),
    (attended_and_changed, [*HEADS_OF, "contiguous", "add", "sub", ATTENTION, "flatten", *IN_PLACE]),
    (copies_used_twice, [*HEADS_OF, "contiguous", "add", "sub", ATTENTION, "flatten"]),
    (of_strided_heads, ["product", "permute", "contiguous", "__getitem__", "__getitem__", ATTENTION, "flatten"]),
    (viewed, [*(*HEADS_OF, "contiguous") * 3, ATTENTION, "view"]),
    (viewed_later, [*(*HEADS_OF, "contiguous") * 3, ATTENTION, "transpose", "__get__", "view"]),
    (returned_attention, [*(*HEADS_OF, "contiguous") * 3, ATTENTION, "transpose", "flatten"]),
]  # fmt: skip


def inputs() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, 6))).requires_grad_()


def results(call: Code) -> list[torch.Tensor]:
    """Return what a call gives, and the gradients of its input and of all weights."""
    for weight in WEIGHTS:
        weight.grad = None
    x = inputs()
    outputs = keras.tree.flatten(call(x))
    sum((output * torch.linspace(-1, 1, output.shape[-1])).sum() for output in outputs).backward()
    return [*outputs, x.grad, *(torch.zeros(()) if weight.grad is None else weight.grad for weight in WEIGHTS)]


@pytest.mark.parametrize(("code", "functions"), CASES, ids=range(len(CASES)))
def test_rewritten_programs_compute_what_the_code_computes(code: Code, functions: list[str]) -> None:
    """Outputs and all gradients, by the functions that are expected."""
    written: list[Step] = []

    def rewritten(*given: Any) -> list[Step]:
        written.extend(rewrites.rewritten(*given))
        return written

    x = inputs()
    with Tape([x]) as tape:
        output = code(x)
    program = tape.program(output, rewrite=rewritten)
    assert tape.problem == ""
    assert [function_name(step.function) for step in written] == functions
    for expected, found in zip(results(code), results(program), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("code", [code for code, _ in CASES], ids=range(len(CASES)))
def test_programs_of_the_same_bits(code: Code) -> None:
    """Outputs and all gradients are those of the code to the last bit, and lie in memory as those do."""
    x = inputs()
    with Tape([x]) as tape:
        output = code(x)
    program = tape.program(output, rewrite=rewrites.with_the_same_bits)
    assert tape.problem == ""
    for expected, found in zip(results(code), results(program), strict=True):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()


def generated(x: torch.Tensor) -> torch.Tensor:
    """A token's attention: keys and values are written into copies of a cache, in each layer."""
    with torch.no_grad():
        for _ in range(2):
            query, key, value = heads(x), heads(x).clone(), heads(x).clone()
            key[:, :, 1:2] = 1.0
            value[:, :, 1:2] = 2.0
            y = attention(query, key.contiguous(), value.contiguous()).transpose(1, 2)
            x = torch.einsum("abcd,cde->abe", y, BACK)
    return x


@pytest.mark.parametrize("rewrite", [rewrites.rewritten, rewrites.with_the_same_bits])
def test_without_gradients_attention_reads_what_is_written_before(rewrite: rewrites.Rewriting) -> None:
    """Later writes, of the next layers, do not matter; of copies nothing is left."""
    names: list[str] = []

    def rewritten(*given: Any) -> Any:
        steps = rewrite(*given)
        names.extend(function_name(step.function) for step in steps)
        return steps

    x = inputs().detach()
    with Tape([x]) as tape:
        output = generated(x)
    program = tape.program(output, rewrite=rewritten)
    assert program is not None
    assert "contiguous" not in names
    assert names.count(ATTENTION) == 2
    torch.testing.assert_close(program(x + 1), generated(x + 1), rtol=1e-12, atol=1e-12)


def test_changes_that_torch_does_not_count() -> None:
    """Tensors of inference mode have no version: a product stays before what may change its factor."""

    def code(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        total = torch.matmul(y, KERNEL)
        y.add_(1)
        return total + BIAS

    with torch.inference_mode():
        x = inputs().detach().clone()
        with Tape([x]) as tape:
            output = code(x)
        program = tape.program(output)
        assert program is not None
        torch.testing.assert_close(program(x + 1), code(x + 1))
