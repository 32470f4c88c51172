"""Rewrites: steps of a program in place of which others compute the same in fewer passes over memory.

Keras makes one call of many torch functions where torch has one: an einsum for a matrix product, a product and a sum
for a linear layer, copies of what attention reads as it is.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tp_planner.frontend.functions import function_name
from tp_planner.regions.behind import contracted_dims, product_apart
from tp_planner.replay.once import SWITCH, computed_once, once_without_gradients
from tp_planner.replay.program import Name, Step, names_in
from tp_planner.replay.same_bits import Trials

Rewriting = Callable[[Sequence[Step], Any], Sequence[Step]]  # of steps, and the output that they are for
ATTENTION = torch.nn.functional.scaled_dot_product_attention
TRANSPOSING = ("transpose", "permute")
IN_ANY_ORDER = ("reshape", "flatten", "matmul", "einsum")


def rewritten(steps: Sequence[Step], output: Any) -> list[Step]:
    """Return the steps of a program that returns ``output``, with fewer passes over memory."""
    return _rewritten(computed_once(steps, output), output, None)


def with_the_same_bits(steps: Sequence[Step], output: Any) -> list[Step]:
    """Return the steps of a program that returns ``output``, with fewer passes over memory where all bits stay.

    Where one rank calls what the other replays, both communicate in the same order: autograd runs nodes in the order
    in which they were made, last first, and no step that communicates is made before or after another than it was.
    """
    return _rewritten(once_without_gradients(steps, output), output, Trials())


def _rewritten(steps: Sequence[Step], output: Any, trials: Trials | None) -> list[Step]:
    """Return the steps rewritten; where there are ``trials``, only as these find the same."""
    steps = [_as_product(step, trials) for step in steps]
    uses = Counter(names_in(output))
    for step in steps:
        uses.update(step.uses())
    return _with_bias_in_products(_without_copies_for_attention(steps, uses, trials), uses, trials)


# Products


def product(x: torch.Tensor, weight: torch.Tensor, contracted: int) -> torch.Tensor:
    """Return the product of ``x`` and ``weight``, summed over so many last dims of the one and first of the other.

    An einsum passes half a dozen ops more on its way, each way.
    """
    rows = x.flatten(-contracted) if contracted > 1 else x
    result = rows @ weight.flatten(0, contracted - 1).flatten(1)
    return result if weight.ndim == contracted + 1 else result.unflatten(-1, weight.shape[contracted:])


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, contracted: int) -> torch.Tensor:
    """Return ``product`` and the sum with a bias of the shape of the weight's other dims."""
    rows = x.flatten(-contracted) if contracted > 1 else x
    result = torch.nn.functional.linear(rows, weight.flatten(0, contracted - 1).flatten(1).T, bias.flatten())
    return result if bias.ndim == 1 else result.unflatten(-1, bias.shape)


def _as_product(step: Step, trials: Trials | None) -> Step:
    """Return an einsum that is a matrix product as such, any other step as it is."""
    if step.function is product_apart and isinstance(step.args[0], functools.partial):  # of an einsum
        dims, (x, weight) = step.args[1], _factors(step)
        einsum = replace(step, function=torch.einsum, args=(*step.args[0].args, x, weight))
        apart = replace(step, args=(functools.partial(product, contracted=dims), *step.args[1:]))
        return apart if trials is None or _as_product(einsum, trials).function is product else step
    if step.function is not torch.einsum:
        return step
    match step.args:
        case str(equation), Name() | torch.Tensor() as x, Name() | torch.Tensor() as weight:
            dims = contracted_dims(equation, x, weight)
            if dims is not None:
                found = replace(step, function=product, args=(x, weight, dims))
                return found if trials is None or trials.are_same([step], [found]) else step
    return step


def _with_bias_in_products(steps: Sequence[Step], uses: Counter[Name], trials: Trials | None) -> list[Step]:
    """Return the steps with each product, and the sum with a bias that alone uses it, as one.

    The product is then made where the sum is; so no step in between may change a tensor, or switch gradients.
    """
    merged: dict[int, Step] = {}  # by the sum's place
    dropped: set[int] = set()
    products: dict[Name, int] = {}  # places of those since which nothing was changed
    for place, step in enumerate(steps):
        if step.changes or step.function is SWITCH:
            products.clear()
        elif _contracts(step) and uses[step.result] == 1:
            products[step.result] = place
        elif (found := _summand_and_bias(step)) and found[0] in products:
            factors = steps[products[found[0]]]
            if not _fits(found[1], factors):
                continue
            together = _with_bias(step, factors, found[1])
            if trials is None or (together.function is linear and trials.are_same([factors, step], [together])):
                merged[place] = together
                dropped.add(products[found[0]])
    return [merged.get(place, step) for place, step in enumerate(steps) if place not in dropped]


def _with_bias(step: Step, product: Step, bias: Any) -> Step:
    """Return a step that adds a bias to a product as a linear layer."""
    dims, (x, weight) = _contracts(product), _factors(product)
    if product.function is product_apart:
        apart = functools.partial(linear, contracted=dims), dims, x, weight, bias
        return replace(step, function=product_apart, args=apart, alone=False)
    return replace(step, function=linear, args=(x, weight, bias, dims))


def _factors(product: Step) -> tuple[Any, Any]:
    """Return what a product multiplies."""
    x, weight = product.args[2:4] if product.function is product_apart else product.args[:2]
    return x, weight


def _contracts(step: Step) -> int:
    """Return how many dims a matrix product by a weight contracts; 0 for any other step."""
    if step.kwargs or not isinstance(step.result, Name):
        return 0
    if step.function is product:
        return int(step.args[2])
    if step.function is product_apart:
        return int(step.args[1]) if len(step.args) == 4 else 0
    is_product = function_name(step.function) == "matmul" and len(step.args) == 2
    return int(is_product and len(step.args[1].shape) == 2 and len(step.args[0].shape) >= 2)


def _summand_and_bias(step: Step) -> tuple[Name, Any] | None:
    """Return the two tensors that a step adds; None if it does anything else."""
    if function_name(step.function) != "add" or step.kwargs:
        return None
    match step.args:
        case Name() as summand, Name() | torch.Tensor() as bias:
            return summand, bias
    return None


def _fits(bias: Any, factors: Step) -> bool:
    """Whether a product and its sum with this bias are one linear layer of plain tensors."""
    x, weight = _factors(factors)
    return (
        tuple(bias.shape) == tuple(weight.shape[_contracts(factors) :])
        and bias.dtype == factors.result.dtype == weight.dtype
        and all(map(_is_plain, (x, weight, bias)))
    )


def _is_plain(value: Any) -> bool:
    return value.plain if isinstance(value, Name) else not isinstance(value, DTensor)


# Attention


def _without_copies_for_attention(steps: Sequence[Step], uses: Counter[Name], trials: Trials | None) -> Sequence[Step]:
    """Return the steps without the copies, in another order of memory, that only attention reads.

    torch's kernels take queries, keys and values in any order of memory in which a head's numbers are side by side.
    A backward pass reads them too; so no later step may change a tensor, and without one none before attention. Where
    a copy was made without gradients, attention reads it without. And what attention returns lies in memory as its
    queries do, so that all that reads it has to take any order; for the same bits queries stay as they are.
    """
    changes = list(itertools.accumulate(int(step.changes) for step in steps))
    switches = list(itertools.accumulate(int(step.function is SWITCH) for step in steps))
    copies = {step.result: place for place, step in enumerate(steps) if _is_copy(step) and uses[step.result] == 1}
    dropped: set[int] = set()
    read: dict[int, Step] = {}
    for place, step in enumerate(steps):
        if step.function is not ATTENTION:
            continue
        until = -1 if step.result.gradient else place
        found = [
            copies[name]
            for name in names_in(step.args[1 if trials else 0 : 3])
            if name in copies and changes[copies[name]] == changes[until] and switches[copies[name]] == switches[place]
        ]
        if not found:
            continue
        given = {steps[each].result: steps[each].args[0] for each in found}
        without = replace(
            step, args=tuple(given.get(each, each) if isinstance(each, Name) else each for each in step.args)
        )
        if trials is None:
            may_be = _is_read_in_any_order(step.result, steps, uses)
        else:
            may_be = trials.are_same([*map(steps.__getitem__, found), step], [without])
        if may_be:
            read[place] = without
            dropped.update(found)
    return [read.get(place, step) for place, step in enumerate(steps) if place not in dropped]


def _is_read_in_any_order(name: Name, steps: Sequence[Step], uses: Counter[Name]) -> bool:
    """Whether all steps that read a tensor give the same whatever its order in memory, and nothing else reads it."""
    readers = [step for step in steps if name in step.uses()]
    return len(readers) == uses[name] and all(
        step.function in (product, linear, product_apart)
        or function_name(step.function) in IN_ANY_ORDER
        or (function_name(step.function) in TRANSPOSING and _is_read_in_any_order(step.result, steps, uses))
        for step in readers
    )


def _is_copy(step: Step) -> bool:
    """Whether a step copies a plain tensor into the usual order of memory, from one with its last dim side by side."""
    if function_name(step.function) != "contiguous" or step.kwargs or len(step.args) != 1:
        return False
    given = step.args[0]
    return isinstance(given, Name) and given.plain and given.stride[-1:] == (1,)
