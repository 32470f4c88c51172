"""Casts: weights that layers read in another dtype than that in which they are stored.

In mixed precision autograd would keep a cast of every weight from the forward pass to the backward pass, half as much
memory as the weights take. They are cast again there, layer by layer.
"""

from __future__ import annotations

import keras
import torch

from tp_planner.ir.errors import ParallelRuntimeError
from tp_planner.regions.calls import running
from tp_planner.regions.left_out import LeftOut, can_be_made_again


class _Cast:
    """What a cast can be made of again: what this rank stores of the weight."""

    def __init__(self, path: str, stored: torch.Tensor, dtype: torch.dtype) -> None:
        self.kept, self._path, self._dtype = (stored,), path, dtype
        self._version = stored._version

    def whole(self) -> torch.Tensor:
        """Return the cast, made anew.

        Raises ParallelRuntimeError if the weight has another value now.
        """
        (stored,) = self.kept
        if stored._version != self._version:
            raise ParallelRuntimeError(
                f"variable {self._path!r} was changed between the forward pass and the backward pass, which needs its "
                f"old value; run the backward pass first"
            )
        return stored.to(self._dtype)


def cast_again(cast: torch.Tensor, stored: torch.Tensor, path: str) -> None:
    """Let watched calls leave out of what autograd keeps a cast of what this rank stores of the weight at ``path``."""
    if torch.is_grad_enabled() and not running.recomputable and not stored.is_inference():
        can_be_made_again(cast, LeftOut(_Cast(path, stored.detach(), cast.dtype)))


def casts_weights(layer: keras.Layer) -> bool:
    """Whether a layer reads weights in another dtype than that in which they are stored."""
    return bool(layer.autocast and layer.compute_dtype != layer.variable_dtype)
