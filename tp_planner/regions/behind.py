"""Behind: gradients of weights are computed while the gradient of their input is on its way to be summed.

Autograd has one node for both gradients of a matrix product, so that the sum begins when both are there. Here the
product has a node for each, as Megatron-LM computes them. That of the weight comes after the sum has begun and before
it is waited for: autograd runs what is ready in the order of numbers, the highest first, and its number is the one that
was taken when the input crossed. Should it run at another time, nothing but the time is another.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from tp_planner.regions.calls import running

Product = Callable[..., torch.Tensor]

PRODUCTS = {"matmul", "__matmul__", "einsum"}
_EQUATION = re.compile("([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)")
_MADE_AS = "tp_planner: made as number"  # in an autograd node's metadata, where it has another number now


def contracted_dims(equation: str, x: Any, weight: Any) -> int | None:
    """Return how many last dims of ``x`` an einsum contracts with the first ones of ``weight``; None if it is another.

    Args:
        equation: of two operands.
        x: the first; its shape is read.
        weight: the second.
    """
    labels = _EQUATION.fullmatch(equation.replace(" ", ""))
    if labels is None:
        return None
    left, right, out = labels.groups()
    dims = len(set(left) & set(right))
    is_product = (
        0 < dims < min(len(left), len(right))
        and (left[-dims:], left[:-dims] + right[dims:]) == (right[:dims], out)
        and all(len(set(labels)) == len(labels) for labels in (left, right, out))
        and x.shape[-dims:] == weight.shape[:dims]  # einsum stretches dims of 1
    )
    return dims if is_product else None


def run_product(function: Product, name: str, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Return what a torch function of that ``name``, one of ``PRODUCTS``, returns.

    Where it multiplies what crossed a boundary by a weight, the two gradients have a node each.
    """
    with torch._C.DisableTorchFunction():  # what is asked here the code does not ask
        factors = None if kwargs else _factors(name, args)
        apart = factors is not None and _has_both_gradients(*factors[1:]) and _on_its_way_to(factors[1]) is not None
    if factors is None or not apart:
        return function(*args, **kwargs)
    if name == "einsum":
        function = functools.partial(function, args[0])
    return running.run(product_apart, function, *factors)


def _factors(name: str, args: tuple[Any, ...]) -> tuple[int, torch.Tensor, torch.Tensor] | None:
    """Return how many dims a product contracts, and its factors; None for any other arguments."""
    match args:
        case torch.Tensor() as x, torch.Tensor() as weight if name != "einsum" and weight.ndim == 2 <= x.ndim:
            return 1, x, weight
        case str() as equation, torch.Tensor() as x, torch.Tensor() as weight if name == "einsum":
            dims = contracted_dims(equation, x, weight)
            return None if dims is None else (dims, x, weight)
    return None


def _has_both_gradients(x: torch.Tensor, weight: torch.Tensor) -> bool:
    wanted = torch.is_grad_enabled() and x.requires_grad and weight.requires_grad
    return wanted and x.dtype == weight.dtype and not torch._C._is_any_autocast_enabled()


class OnItsWay(Protocol):
    """A gradient of what crossed a boundary, which is summed while nodes of autograd run that have this number."""

    number: int

    def begin_again(self) -> None:
        """Begin to make again what these nodes need."""
        ...


def _on_its_way_to(x: torch.Tensor) -> OnItsWay | None:
    """Return how the gradient of a tensor comes back, if it, or what it was cast from, crossed its boundary so."""
    node = x.grad_fn
    for _ in range(3):
        found: OnItsWay | None = getattr(node, "on_its_way", None)
        if found is not None or node is None or len(node.next_functions) != 1:
            return found
        node = node.next_functions[0][0]
    return None


def product_apart(
    function: Product, contracted: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``function(x, weight)``, or ``function(x, weight, bias)``, a product summed over so many dims.

    These are the last of ``x`` and the first of ``weight``.
    """
    on_its_way = _on_its_way_to(x)
    if on_its_way is None or not _has_both_gradients(x, weight):
        return function(x, weight) if bias is None else function(x, weight, bias)
    with running.converting():
        given = x.detach()
        gradients = _OfWeight.apply(given, contracted, weight, bias)
        node = gradients.grad_fn
        node.metadata[_MADE_AS] = node._sequence_nr()
        node._set_sequence_nr(on_its_way.number)
        fixed = weight.detach(), None if bias is None else bias.detach()
    result: torch.Tensor = _OfInput.apply(on_its_way, function, contracted, x, *fixed, gradients)
    return result


def made_as(node: Any) -> int:
    """Return the number that an autograd node had when it was made."""
    number: int = node.metadata.get(_MADE_AS, node._sequence_nr())
    return number


class _OfInput(torch.autograd.Function):
    """A product; on the way back the gradient of its first factor."""

    @staticmethod
    def forward(
        ctx: Any,
        on_its_way: OnItsWay,
        function: Product,
        contracted: int,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gradients: torch.Tensor,
    ) -> torch.Tensor:
        ctx.begin_again, ctx.contracted = on_its_way.begin_again, contracted
        ctx.save_for_backward(weight)
        result = function(x, weight) if bias is None else function(x, weight, bias)
        if result._is_view():  # of what was made here, and which nobody knows
            with running.converting():
                result = torch.ops.aten._unsafe_view(result, result.shape)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        ctx.begin_again()
        (weight,) = ctx.saved_tensors
        rows = _with_last_dims_as_one(gradient, weight.ndim - ctx.contracted)
        of_input = rows @ weight.flatten(0, ctx.contracted - 1).flatten(1).T
        if ctx.contracted > 1:
            of_input = of_input.unflatten(-1, weight.shape[: ctx.contracted])
        return None, None, None, of_input, None, None, gradient


class _OfWeight(torch.autograd.Function):
    """Stands for a product, without content; on the way back the gradients of its weight and its bias."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, contracted: int, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.contracted, ctx.shape = contracted, weight.shape
        ctx.save_for_backward(x)
        return x.new_empty(()).expand(*x.shape[: x.ndim - contracted], *weight.shape[contracted:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        inputs = _with_last_dims_as_one(x, ctx.contracted).flatten(0, -2)
        rows = _with_last_dims_as_one(gradient, len(ctx.shape) - ctx.contracted).flatten(0, -2)
        of_bias = rows.sum(0).view(ctx.shape[ctx.contracted :]) if ctx.needs_input_grad[3] else None
        return None, None, (inputs.T @ rows).view(ctx.shape), of_bias


def _with_last_dims_as_one(tensor: torch.Tensor, dims: int) -> torch.Tensor:
    return tensor.flatten(-dims) if dims > 1 else tensor
