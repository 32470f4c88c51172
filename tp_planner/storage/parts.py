"""Parts: what replicas store in parts is put together for use, and let go after it.

The backward pass puts it together again where it is needed, and leaves each replica its part of the averaged gradient
(as FSDP and ZeRO-3 do: https://arxiv.org/abs/1910.02054).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import keras
import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from tp_planner.job.axes import Axis
from tp_planner.regions.boundaries import gather, reduce_to_shard
from tp_planner.regions.calls import Site, running, standing_at
from tp_planner.regions.replicas import Replicas


class Parts:
    """One use of a tensor that replicas store in parts.

    When it is put together depends on what the layer's code does, which is the same on all ranks, and on nothing that
    may still be alive on one of them: it is a collective.

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
        self._left_out = 0  # how many tensors are left out of what autograd keeps
        self._put_back = 0  # how many of them the running backward pass has asked for
        self._whole: torch.Tensor | None = None  # from the first of these to the last

    def whole(self) -> torch.Tensor:
        """Return the whole, gathered."""
        with torch.no_grad(), standing_at(self._site):
            return gather(self.part, self._dim, self._length, self._axis)

    def leave_out(self) -> None:
        """Note that autograd will ask for the whole once more."""
        self._left_out += 1

    def put_back(self) -> torch.Tensor:
        """Return the whole for one of the tensors that were left out; it is gathered for the first of them."""
        whole = self.whole() if self._whole is None else self._whole
        self._put_back += 1
        self._whole = whole
        if self._put_back == self._left_out:
            self._let_go()
        return whole

    def _let_go(self) -> None:
        self._put_back, self._whole = 0, None

    def own(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return this replica's part of the mean of all replicas' gradients."""
        assert self._replicas is not None
        self._let_go()  # where a part of what was left out is in no gradient
        share = self._replicas.share(gradient.device)
        # Without samples it may be the gradient of the mean of nothing.
        weighed = gradient * share if self._replicas.samples else torch.zeros_like(gradient)
        with standing_at(self._site):
            return reduce_to_shard(weighed, self._dim, self._axis)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, parts: Parts) -> torch.Tensor:
        ctx.parts = parts
        return parts.whole()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.parts.own(gradient), None


@dataclass(frozen=True, slots=True)
class _LeftOut:
    """A tensor that a layer would keep for the backward pass, and that can be put together again."""

    parts: Parts
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any


class _Uses:
    """What one running call of a layer has put together, by storage."""

    def __init__(self, layer: keras.Layer) -> None:
        self.layer = layer
        self.hooks = torch.autograd.graph.saved_tensors_hooks(_leave_out, _put_back)
        self.wholes: dict[int, tuple[Parts, torch.Tensor]] = {}  # the tensor, so that its storage is no other's


class _Running(threading.local):
    def __init__(self) -> None:
        self.uses: list[_Uses] = []


_running = _Running()


def put_together(part: torch.Tensor, parts: Parts) -> torch.Tensor:
    """Return the whole of which ``part`` is this replica's part, gradients flowing back to the part."""
    if part.requires_grad and torch.is_grad_enabled():
        whole: torch.Tensor = _Whole.apply(part, parts)
    else:
        whole = parts.whole()
    if _running.uses:
        _running.uses[-1].wholes[whole.untyped_storage()._cdata] = parts, whole
    return whole


def let_go_after_calls(layer: keras.Layer) -> list[Any]:
    """Let the layer's calls keep nothing for the backward pass that was put together; return handles that end this."""
    before = layer.register_forward_pre_hook(_begin)
    after = layer.register_forward_hook(_end, always_call=True)
    return [before, after]


def _begin(layer: keras.Layer, args: Any) -> None:
    if running.recomputable:  # none of its tensors is kept
        return
    uses = _Uses(layer)
    uses.hooks.__enter__()
    _running.uses.append(uses)


def _end(layer: keras.Layer, args: Any, output: Any) -> None:
    if _running.uses and _running.uses[-1].layer is layer:
        _running.uses.pop().hooks.__exit__()


def _leave_out(tensor: torch.Tensor) -> torch.Tensor | _LeftOut:
    if isinstance(tensor, DTensor):
        return tensor
    storage = tensor.untyped_storage()._cdata
    for uses in reversed(_running.uses):
        if storage in uses.wholes:
            parts, _ = uses.wholes[storage]
            parts.leave_out()
            return _LeftOut(parts, tensor.shape, tensor.stride(), tensor.storage_offset())
    return tensor


def _put_back(kept: torch.Tensor | _LeftOut) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    if running.looking:
        return kept.parts.part
    return kept.parts.put_back().as_strided(kept.size, kept.stride, kept.offset)
