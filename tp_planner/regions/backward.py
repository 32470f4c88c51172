"""Backward passes of our own autograd functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def without_gradients(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a backward pass that has no gradients of its own, as torch's ``once_differentiable`` does.

    Where autograd keeps none, which is nearly always, that is the function itself: torch's takes longer than most.
    """
    refusing = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        return (refusing if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return run
