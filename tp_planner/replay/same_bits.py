"""Same bits: whether other steps give the very numbers that steps give, found out by running both.

Kernels round by their order of sums, which depends on shapes and strides and on no value. So what is equal to the last
bit on random numbers of the same form, with all gradients, is equal on any.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence

import torch

from tp_planner.replay.program import Name, Program, Step
from tp_planner.replay.segments import in_own_names, key_of, tensors_in, what_it_is

MOST_TRIED = 2**20  # elements of what steps are given and make; of larger tensors little is gained
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element

Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool]  # shape, strides, dtype, gradients


class Trials:
    """Tries steps against others, those of each form once."""

    def __init__(self) -> None:
        self._found: dict[Hashable, bool] = {}

    def are_same(self, before: Sequence[Step], after: Sequence[Step]) -> bool:
        """Whether the last of ``after`` makes what the last of ``before`` makes, given the same; False if not known."""
        made = {step.result for step in before}
        takes = {key_of(each): each for step in before for each in tensors_in((step.args, step.kwargs))}
        takes = {key: each for key, each in takes.items() if key not in made}
        if any(not isinstance(step.result, Name) for step in before) or not all(map(_can_be_tried, takes.values())):
            return False
        forms = tuple(map(_form, takes.values()))
        if sum(math.prod(form[0]) for form in (*forms, *map(_form, made))) > MOST_TRIED:
            return False
        ways = [in_own_names(takes, steps, (steps[-1].result,)) for steps in (before, after)]
        key = (*map(what_it_is, ways), forms)
        if key not in self._found:
            self._found[key] = _give_the_same(ways[0].program, ways[1].program, forms)
        return self._found[key]


def _can_be_tried(given: Name | torch.Tensor) -> bool:
    """Whether it is a plain tensor of numbers on the CPU; elsewhere libraries choose kernels by more than the form."""
    form = given.dtype
    if form is None or not form.is_floating_point or form.itemsize not in _BITS:
        return False
    return (given.plain and given.on_cpu) if isinstance(given, Name) else (type(given) in _PLAIN and given.is_cpu)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _form(given: Name | torch.Tensor) -> Form:
    if isinstance(given, Name):
        assert given.dtype is not None
        return tuple(given.shape), tuple(given.stride), given.dtype, given.gradient
    return tuple(given.shape), given.stride(), given.dtype, given.requires_grad


def _give_the_same(before: Program, after: Program, forms: Sequence[Form]) -> bool:
    with torch._C.DisableTorchFunction():  # nobody who watches the code's functions is to see these
        for results in zip(_results(before, forms), _results(after, forms), strict=True):
            if not _is_same(*results):
                return False
    return True


def _results(program: Program, forms: Sequence[Form]) -> Iterator[torch.Tensor | None]:
    """Yield what a program makes of random numbers, and its gradients, for gradients that come back in either order."""
    numbers = torch.Generator().manual_seed(0)
    given = [_drawn(form, numbers) for form in forms]
    with torch.enable_grad():
        (result,) = program(*given)
    yield result.detach()
    if not result.requires_grad:
        return
    wanted = [each for each in given if each.requires_grad]
    gradient = torch.randn(result.shape, generator=numbers, dtype=result.dtype)
    for back in (gradient, _in_another_order(gradient)):
        yield from torch.autograd.grad(result, wanted, back, retain_graph=True, allow_unused=True)


def _drawn(form: Form, numbers: torch.Generator) -> torch.Tensor:
    shape, stride, dtype, gradient = form
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if math.prod(shape) else 0
    memory = torch.randn(last + 1, generator=numbers, dtype=dtype)
    return memory.as_strided(shape, stride).requires_grad_(gradient)


def _in_another_order(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that lies in memory as gradients of attention do, with heads before positions."""
    return tensor.transpose(-3, -2).contiguous().transpose(-3, -2) if tensor.ndim > 2 else tensor.mT.contiguous().mT


def _is_same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    if first.shape != second.shape or first.dtype != second.dtype or _order(first) != _order(second):
        return False
    bits = _BITS[first.dtype.itemsize]
    return torch.equal(first.contiguous().view(bits), second.contiguous().view(bits))


def _order(tensor: torch.Tensor) -> list[int]:
    """Return the strides of dims in which there is more than one element."""
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
