"""Once: programs compute what they made twice once, and constants never, and give what the code gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tp_planner.frontend.functions import function_name
from tp_planner.replay.once import MOST_KEPT, computed_once
from tp_planner.replay.program import compiled
from tp_planner.replay.tape import Tape

Code = Callable[[torch.Tensor], Any]
WEIGHT = torch.arange(4.0)


def positions(x: torch.Tensor) -> Any:
    return x * torch.arange(4).add(1) + x * torch.arange(4).add(1)


def twice(x: torch.Tensor) -> Any:
    return (x + 1).exp() * (x + 1).exp()


def zeros(x: torch.Tensor) -> Any:
    return x / (0.0 * x.abs() + 0.0) + x / (0.0 * x.abs() - 0.0) + torch.where(x > 0, 0.0, -0.0)


def changed(x: torch.Tensor) -> Any:
    first, second = x.clone(), x.clone()
    first.add_(1)
    return first * second


def changed_between(x: torch.Tensor) -> Any:
    y = x + 1
    before = y.exp()
    y[1:].mul_(2)
    return before, y.exp() * 1


def changed_constant(x: torch.Tensor) -> Any:
    count = torch.zeros(4)
    count.view(2, 2).add_(1)
    return x + count, x + torch.zeros(4)


def changed_by_a_list(x: torch.Tensor) -> Any:
    values = [torch.ones(4), torch.ones(4)]
    torch._foreach_add_(values, [x, 2 * x])
    return values[0] * values[1]


def returned(x: torch.Tensor) -> Any:
    return torch.ones(4), torch.ones(2, 2).reshape(4), x + 1, x + 1, torch.ones(4).expand_as(x)


def from_outside(x: torch.Tensor) -> Any:
    before = WEIGHT.detach().exp() + x
    WEIGHT.detach().mul_(1.5)
    after = WEIGHT.detach().exp() + x
    WEIGHT.detach().div_(1.5)
    return before, after


def written_into_input(x: torch.Tensor) -> Any:
    before = x.exp()
    x.add_(1)
    after = x.exp()
    x.sub_(1)
    return before + 1, after + 1


def without_gradients(x: torch.Tensor) -> Any:
    with torch.no_grad():
        y = x * 2
    return y + x * 2


def drawn(x: torch.Tensor) -> Any:
    return torch.ones(4).bernoulli() * 0 + x


def large(x: torch.Tensor) -> Any:
    return torch.ones(MOST_KEPT + 4)[:4].cumsum(0) + x


CODES: dict[Code, list[str]] = {
    positions: ["mul", "add"],
    twice: ["add", "exp", "mul"],
    zeros: ["abs", "mul", "add", "div", "sub", "div", "add", "gt", "where", "add"],
    changed: ["clone", "clone", "add_", "mul"],
    changed_between: ["add", "exp", "__getitem__", "mul_", "exp", "mul"],
    changed_constant: ["zeros", "view", "add_", "add", "add"],
    changed_by_a_list: ["ones", "ones", "mul", "_foreach_add_", "mul"],
    returned: ["ones", "ones", "reshape", "add", "add", "ones", "expand_as"],
    from_outside: ["detach", "exp", "add", "detach", "mul_", "detach", "exp", "add", "detach", "div_"],
    written_into_input: ["exp", "add_", "exp", "sub_", "add", "add"],
    without_gradients: ["_set_grad_enabled", "mul", "_set_grad_enabled", "mul", "add"],
    drawn: ["bernoulli", "mul", "add"],
    large: ["ones", "__getitem__", "cumsum", "add"],
}


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.__name__)
def test_programs_give_what_code_gives(code: Code) -> None:
    x = torch.linspace(-1, 2, 4, requires_grad=code is without_gradients)
    with Tape([x]) as tape:
        output = code(x)
    assert not tape.problem
    names = tape._with_names(output)
    steps = computed_once(tape.steps, names)
    assert [function_name(step.function) for step in steps] == CODES[code]
    program = compiled(tape._inputs, steps, names)
    for given in (x, x.detach() + 1):
        for _ in range(2):
            torch.testing.assert_close(program(given), code(given), rtol=0, atol=0, equal_nan=True)
            if code is returned:
                for each in program(given):
                    each.add_(1)  # theirs who asked for it
