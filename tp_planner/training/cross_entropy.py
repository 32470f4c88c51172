"""Cross-entropy of logits whose vocabulary is sharded: no rank has all logits of a token.

Two all-reduces of a number or two for each token do: the largest logit, and then the sum of exponentials with what the
targets pick (Megatron-LM's vocabulary-parallel cross-entropy, https://arxiv.org/abs/1909.08053, section 3). The way
back needs none. Both go through the tokens in chunks, so that beside the gradient nothing has the size of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tp_planner.ir.placement import chunk_sizes
from tp_planner.job.axes import Axis
from tp_planner.regions.calls import METRICS, Site, running, standing_at
from tp_planner.regions.collectives import all_reduce
from tp_planner.regions.logits import Logits

CHUNK_BYTES = 64 * 2**20
IGNORED = -100  # torch's cross_entropy gives targets of this number no loss


def cross_entropy(logits: Logits, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Return the loss of each token: minus the logarithm of the softmax of its target.

    Args:
        logits: (..., vocabulary).
        targets: indices (...). Where one is outside of the vocabulary the loss is not a number.
        smoothing: how much of a target's weight, which is 1, goes to all of the vocabulary alike.
    """
    return _apply(logits, targets.to(torch.long), smoothing)


def cross_entropy_of_distributions(logits: Logits, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Return the loss of each token: minus the logarithms of the softmax, weighed by its targets.

    Args:
        logits: (..., vocabulary).
        targets: weights (..., vocabulary).
        smoothing: how much of each weight goes to all of the vocabulary alike.
    """
    return _apply(logits, targets, smoothing)


def _apply(logits: Logits, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    site = METRICS if running.for_metrics else Site(logits.site.layer, f"loss ({logits.boundary.tensor})")
    shard = logits.shard.detach() if running.for_metrics else logits.shard
    result: torch.Tensor = _CrossEntropy.apply(
        shard, targets, smoothing, logits.dtype, logits.vocabulary, logits.axis, site
    )
    return result


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        shard: torch.Tensor,
        targets: torch.Tensor,
        smoothing: float,
        dtype: torch.dtype,
        vocabulary: int,
        axis: Axis,
        site: Site,
    ) -> torch.Tensor:
        picks = _Picks(targets, smoothing, vocabulary, axis)
        rows = shard.detach().reshape(-1, shard.shape[-1])
        with standing_at(site):
            largest = all_reduce(rows.amax(-1).to(dtype), axis, "max")
        summed = torch.empty((2, len(rows)), dtype=dtype, device=rows.device)
        for tokens in _chunks(rows, dtype):
            centred = rows[tokens].to(dtype) - largest[tokens, None]
            summed[1, tokens] = picks.sum_of(centred, tokens)
            summed[0, tokens] = centred.exp_().sum(-1)
        with standing_at(site):
            summed = all_reduce(summed, axis)
        ctx.save_for_backward(shard, targets, largest, summed[0].clone())
        ctx.picked_from = smoothing, vocabulary, axis
        loss = summed[0].log_().mul_(picks.total(dtype)).sub_(summed[1])
        return picks.without_ignored(loss).reshape(shard.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shard, targets, largest, sums = ctx.saved_tensors
        picks = _Picks(targets, *ctx.picked_from)
        rows = shard.detach().reshape(-1, shard.shape[-1])
        weights = picks.without_ignored(gradient.reshape(-1))
        result = torch.empty_like(rows)
        for tokens in _chunks(rows, largest.dtype):
            chunk = (rows[tokens].to(largest.dtype) - largest[tokens, None]).exp_()
            chunk.mul_((picks.total(chunk.dtype, tokens) / sums[tokens])[:, None])
            picks.subtract_from(chunk, tokens)
            # Where no loss flows back there is no gradient, whatever the logits are.
            weight = weights[tokens, None]
            result[tokens] = chunk.mul_(weight).masked_fill_(weight == 0, 0)
        return result.reshape(shard.shape), None, None, None, None, None, None


def _chunks(rows: torch.Tensor, dtype: torch.dtype) -> Iterator[slice]:
    length = max(CHUNK_BYTES // max(rows.shape[-1] * dtype.itemsize, 1), 1)
    return (slice(start, start + length) for start in range(0, len(rows), length))


class _Picks:
    """What targets pick of this rank's part of the vocabulary: indices one logit, distributions a weighed sum."""

    def __init__(self, targets: torch.Tensor, smoothing: float, vocabulary: int, axis: Axis) -> None:
        sizes = chunk_sizes(vocabulary, axis.size)
        self.start, self.own, self.vocabulary = axis.rank * sizes[0], sizes[axis.rank], vocabulary
        self.smoothing = smoothing
        self.of_indices = not targets.is_floating_point()
        self.targets = targets.reshape(-1) if self.of_indices else targets.reshape(-1, self.vocabulary)

    def _local(self, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the targets as rows of this rank's part, and which of them are not in it."""
        local = self.targets[tokens] - self.start
        elsewhere = (local < 0) | (local >= self.own)
        return local.masked_fill(elsewhere, 0)[:, None], elsewhere

    def _weights(self, tokens: slice, dtype: torch.dtype) -> torch.Tensor:
        weights = self.targets[tokens, self.start : self.start + self.own].to(dtype)
        return weights * (1.0 - self.smoothing) + self.smoothing / self.vocabulary if self.smoothing else weights

    def sum_of(self, logits: torch.Tensor, tokens: slice) -> torch.Tensor:
        """Return this rank's summand of what the targets pick."""
        if not self.of_indices:
            return (logits * self._weights(tokens, logits.dtype)).sum(-1)
        local, elsewhere = self._local(tokens)
        picked = logits.gather(1, local)[:, 0].masked_fill_(elsewhere, 0)
        if self.smoothing:
            picked.mul_(1.0 - self.smoothing).add_(logits.sum(-1), alpha=self.smoothing / self.vocabulary)
        targets = self.targets[tokens]
        unknown = ((targets < 0) | (targets >= self.vocabulary)) & (targets != IGNORED)
        return picked.masked_fill_(unknown, torch.nan)

    def subtract_from(self, chunk: torch.Tensor, tokens: slice) -> None:
        """Subtract the targets' weights in place."""
        if not self.of_indices:
            chunk.sub_(self._weights(tokens, chunk.dtype))
            return
        local, elsewhere = self._local(tokens)
        chunk.scatter_add_(1, local, (~elsewhere).to(chunk.dtype).mul_(self.smoothing - 1.0)[:, None])
        if self.smoothing:
            chunk.sub_(self.smoothing / self.vocabulary)

    def total(self, dtype: torch.dtype, tokens: slice = slice(None)) -> Any:
        """Return the sum of a token's weights over the whole vocabulary."""
        if self.of_indices:
            total = torch.ones((), dtype=dtype, device=self.targets.device)
            return torch.where(self.targets[tokens] == IGNORED, self.smoothing, total) if self.smoothing else total
        total = self.targets[tokens].sum(-1, dtype=dtype)
        return total * (1.0 - self.smoothing) + self.smoothing if self.smoothing else total

    def without_ignored(self, values: torch.Tensor) -> torch.Tensor:
        """Return one value for each token, and 0 for those whose target is ignored and has no other weights."""
        return values.masked_fill(self.targets == IGNORED, 0) if self.of_indices and not self.smoothing else values
