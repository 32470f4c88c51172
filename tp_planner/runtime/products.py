"""Products: einsums that are matrix products, as such; einsum passes half a dozen ops more on its way, each way."""

from __future__ import annotations

import re
from typing import Any

import torch

EQUATION = re.compile("([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)")


def product(x: torch.Tensor, weight: torch.Tensor, contracted: int) -> torch.Tensor:
    """Return the product of ``x`` and ``weight``, summed over so many last dims of the one and first of the other."""
    rows = x.flatten(-contracted) if contracted > 1 else x
    result = rows @ weight.flatten(0, contracted - 1).flatten(1)
    return result if weight.ndim == contracted + 1 else result.unflatten(-1, weight.shape[contracted:])


def contracted_dims(args: tuple[Any, ...]) -> int | None:
    """Return how many dims a call of einsum with these arguments contracts as ``product`` does; None for any other."""
    match args:
        case str(equation), torch.Tensor() as x, torch.Tensor() as weight:
            labels = EQUATION.fullmatch(equation.replace(" ", ""))
        case _:
            return None
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
