"""Statistics of the whole batch: batch normalization of replicas that each see a share of it.

Each replica sends its count, its mean and its squared deviations, which add up to those of all samples without
cancellation (Chan, Golub and LeVeque, https://doi.org/10.1080/00031305.1983.10483115).
"""

from __future__ import annotations

import functools
from typing import Any

import keras
import torch
from torch.autograd.function import once_differentiable

from tp_planner.ir.placement import Partial, Replicate, Shard
from tp_planner.ir.plan import Transition
from tp_planner.regions.boundaries import change
from tp_planner.regions.calls import Site
from tp_planner.regions.replicas import Replicas

# Keras layers that normalize by statistics of the batch, all of which ``_moments`` returns.
OF_THE_BATCH = (keras.layers.BatchNormalization,)

_TO_ALL = Transition(Shard(0), Replicate())
_SUMMED = Transition(Partial(), Shard(0))


def share_statistics(layer: keras.Layer, replicas: Replicas, site: Site) -> None:
    """Let a layer normalize by the statistics of all replicas' samples; ``undo`` is to remove its ``_moments``."""
    layer.__dict__["_moments"] = functools.partial(_moments, layer, replicas, site)


def _moments(
    layer: keras.Layer, replicas: Replicas, site: Site, inputs: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance of each channel over the samples of all replicas."""
    dims = layer._reduction_axes
    count, mean, squares = _of_share(inputs, dims, mask)
    counted = replicas.samples / replicas.rows if replicas.rows else 0.0  # rows that only fill up a batch do not count
    own = torch.stack([count * counted, mean, squares * counted]).unsqueeze(0)
    counts, means, all_squares = _FromAll.apply(own, replicas, site).unbind(1)
    # Keras adds this to the number of unmasked samples, which may be zero.
    total = counts.sum(0) + (0.0 if mask is None else keras.backend.epsilon())
    whole_mean = (counts * means).sum(0) / total
    variance = (all_squares + counts * (means - whole_mean).square()).sum(0) / total
    return whole_mean, variance


def _of_share(
    inputs: torch.Tensor, dims: list[int], mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return for each channel how many samples there are, their mean and the sum of their squared deviations."""
    if mask is None:
        count = inputs.numel() // max(inputs.shape[_channels(inputs, dims)], 1)
        total = inputs.sum(dims, keepdim=True)
        mean = total / max(count, 1)
        return torch.full_like(mean.flatten(), count), mean.flatten(), (inputs - mean).square().sum(dims)
    weights = mask.unsqueeze(-1).to(torch.bool).broadcast_to(inputs.shape)
    counts = weights.to(inputs.dtype).sum(dims, keepdim=True)
    mean = torch.where(weights, inputs, 0).sum(dims, keepdim=True) / counts.clamp(min=1)
    squares = torch.where(weights, inputs - mean, 0).square().sum(dims)
    return counts.flatten(), mean.flatten(), squares


def _channels(inputs: torch.Tensor, dims: list[int]) -> int:
    return next(dim for dim in range(inputs.ndim) if dim not in dims)


class _FromAll(torch.autograd.Function):
    """The statistics of all replicas, in order.

    Each replica's loss is the mean over its own samples. What its statistics do to the other replicas' losses comes
    back in units of its own, for gradients are weighed by the replicas' samples later.
    """

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, replicas: Replicas, site: Site) -> torch.Tensor:
        ctx.replicas, ctx.site, ctx.samples = replicas, site, replicas.samples
        return change(own, _TO_ALL, replicas.axis, site)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weighed = gradient * ctx.samples if ctx.samples else torch.zeros_like(gradient)
        summed = change(weighed, _SUMMED, ctx.replicas.axis, ctx.site)
        return summed / (ctx.samples or 1.0), None, None
