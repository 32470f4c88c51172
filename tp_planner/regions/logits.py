"""Logits whose vocabulary stays in shards after the model's call, for losses and metrics that can read shards.

They look like the whole tensor. Whatever else reads them gets the whole tensor, gathered there and then, with the
gradient that it has where the model's call gathers it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tp_planner.ir.errors import ParallelRuntimeError
from tp_planner.ir.placement import chunk_sizes
from tp_planner.ir.plan import Boundary
from tp_planner.job.axes import Axis
from tp_planner.regions.boundaries import change, cross, unequal_length
from tp_planner.regions.calls import METRICS, Site, running

_Tensor = torch.Tensor
# What is known without the values.
_OF_THE_WHOLE = {
    getattr(_Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_meta", "is_cuda")
} | {_Tensor.size, _Tensor.dim, _Tensor.numel, _Tensor.nelement, _Tensor.__len__}
_OF_THE_WHOLE |= {_Tensor.is_floating_point, _Tensor.is_complex, torch.is_floating_point, torch.is_complex}
_OF_THE_SHARD = {_Tensor.requires_grad.__get__, _Tensor.new_zeros, _Tensor.new_ones, _Tensor.new_empty}  # type: ignore[attr-defined]
_OF_THE_SHARD |= {_Tensor.new_full, _Tensor.new_tensor}


class _Gathered:
    """What conversions of the same logits share: the whole tensor, once it was asked for."""

    whole: torch.Tensor | None = None


class Logits(torch.Tensor):
    """The whole of which ``shard`` is this rank's part in the last dim; ``dtype`` may be another than the shard's."""

    shard: torch.Tensor
    boundary: Boundary
    axis: Axis
    site: Site  # where the plan has what gathers them
    _gathered: _Gathered

    @staticmethod
    def __new__(
        cls: type[Logits], shard: torch.Tensor, boundary: Boundary, axis: Axis, site: Site, dtype: Any = None
    ) -> Logits:
        shape = (*shard.shape[:-1], boundary.shape[-1])
        logits: Logits = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype or shard.dtype, device=shard.device
        )
        logits.shard, logits.boundary, logits.axis, logits.site = shard, boundary, axis, site
        logits._gathered = _Gathered()
        return logits

    @property
    def vocabulary(self) -> int:
        """How many logits a token has."""
        return self.boundary.shape[-1]

    @property
    def start(self) -> int:
        """The index of this rank's first logit."""
        return self.axis.rank * chunk_sizes(self.vocabulary, self.axis.size)[0]

    @property
    def was_gathered(self) -> bool:
        """Whether code has had the whole tensor, and may have changed it."""
        return self._gathered.whole is not None

    def whole(self) -> torch.Tensor:
        """Return the whole tensor; every rank has to ask."""
        dtype = _Tensor.dtype.__get__(self)  # type: ignore[attr-defined]
        if running.for_metrics:
            gathering = self.boundary.forward
            length = unequal_length(self.boundary, gathering, self.axis)
            gathered = change(self.shard.detach(), gathering, self.axis, METRICS, length)
            running.gathered_for_metrics(gathered.nbytes)
            return gathered.to(dtype)
        if self._gathered.whole is None:
            self._gathered.whole = cross(self.shard, self.boundary, self.axis, self.site)
        whole: torch.Tensor = self._gathered.whole.to(dtype)
        return whole

    def converted(self, dtype: torch.dtype) -> Logits:
        """Return these logits as numbers of another dtype, which nobody has made yet."""
        converted = Logits(self.shard, self.boundary, self.axis, self.site, dtype)
        converted._gathered = self._gathered
        return converted

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _OF_THE_WHOLE:
                return func(*args, **kwargs)
            if func in _OF_THE_SHARD and isinstance(args[0], Logits):
                return func(args[0].shard, *args[1:], **kwargs)
            if func is _Tensor.to and not kwargs and len(args) == 2 and isinstance(args[1], torch.dtype):
                return args[0].converted(args[1])
            if func is _Tensor.to and not kwargs and len(args) == 2 and torch.device(args[1]) == args[0].shard.device:
                return args[0]
        # Not with subclasses disabled: the whole is a plain tensor.
        args, kwargs = tree_map(_whole, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise ParallelRuntimeError(f"{func} reads logits in shards where they cannot be gathered; use logits.clone()")


def _whole(leaf: Any) -> Any:
    return leaf.whole() if isinstance(leaf, Logits) else leaf


def logits_of(output: Any, boundary: Boundary, axis: Axis, site: Site) -> Logits:
    """Return what a model returns for its loss, whose last dim the layer at ``site`` has left in shards.

    Raises ParallelRuntimeError if the model has returned anything else.
    """
    own = chunk_sizes(boundary.shape[-1], axis.size)[axis.rank]
    if not isinstance(output, torch.Tensor) or output.shape[-1] != own:
        found = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
        raise ParallelRuntimeError(
            f"the model was planned to return the output of layer {site.layer!r}, sharded into the loss, and returned "
            f"{found}; plan the model again"
        )
    return Logits(output, boundary, axis, site)
