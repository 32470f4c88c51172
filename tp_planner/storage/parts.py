"""Parts: what replicas store in parts is put together for use, and let go after it.

The backward pass puts it together again where it is needed, and leaves each replica its part of the averaged gradient
(as FSDP and ZeRO-3 do: https://arxiv.org/abs/1910.02054).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tp_planner.ir.placement import Shard
from tp_planner.job.axes import Axis
from tp_planner.regions.boundaries import gather, reduce_to_shard
from tp_planner.regions.calls import Site, standing_at
from tp_planner.regions.left_out import LeftOut, can_be_made_again
from tp_planner.regions.replicas import Replicas


class Parts:
    """One use of a tensor that replicas store in parts.

    Args:
        part: this replica's, without gradient history.
        dim: the dim that is cut.
        length: of the whole in that dim.
        axis: the batch axis.
        replicas: the replicas that average the gradient.
        site: where this stands in the plan.
    """

    def __init__(
        self, part: torch.Tensor, dim: int, length: int, axis: Axis, replicas: Replicas | None, site: Site | None
    ) -> None:
        self.part, self._dim, self._length, self._axis = part, dim, length, axis
        self._replicas, self._site = replicas, site
        self.left_out = LeftOut(self)

    def whole(self) -> torch.Tensor:
        """Return the whole, gathered."""
        with torch.no_grad(), standing_at(self._site):
            return gather(self.part, Shard(self._dim), self._length, self._axis)

    def own(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return this replica's part of the mean of all replicas' gradients."""
        assert self._replicas is not None
        self.left_out.let_go()  # where a part of what was left out is in no gradient
        share = self._replicas.share(gradient.device)
        # Without samples it may be the gradient of the mean of nothing.
        weighed = gradient * share if self._replicas.samples else torch.zeros_like(gradient)
        with standing_at(self._site):
            return reduce_to_shard(weighed, Shard(self._dim), self._axis)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, parts: Parts) -> torch.Tensor:
        ctx.parts = parts
        return parts.whole()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.parts.own(gradient), None


def put_together(part: torch.Tensor, parts: Parts) -> torch.Tensor:
    """Return the whole of which ``part`` is this replica's part, gradients flowing back to the part."""
    if part.requires_grad and torch.is_grad_enabled():
        whole: torch.Tensor = _Whole.apply(part, parts)
    else:
        whole = parts.whole()
    can_be_made_again(whole, parts.left_out)
    return whole
