"""One rank of a Llama by hand in plain torch, Megatron-style on local shards, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPSILON, ROPE_WAVELENGTH = 1e-5, 500000.0
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name before torch 2.13


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama and its batch; ``heads``, ``key_value_heads``, ``hidden`` and ``vocabulary`` are of the whole model."""

    layers: int
    width: int
    heads: int
    key_value_heads: int
    hidden: int
    vocabulary: int
    batch: int
    length: int

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class Enter(torch.autograd.Function):
    """Megatron's f: the identity forward, an all-reduce of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient


class Leave(torch.autograd.Function):
    """Megatron's g: an all-reduce forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Gather(torch.autograd.Function):
    """An all-gather of the last dim forward; each rank's own part of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ranks = dist.get_world_size()
        parts = x.new_empty((ranks * x.shape[0], *x.shape[1:]))
        _all_gather(parts, x.contiguous())
        return parts.unflatten(0, (ranks, -1)).movedim(0, -2).flatten(-2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.chunk(dist.get_world_size(), -1)[dist.get_rank()]


def conversions(ranks: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return f and g; one rank alone does not communicate."""
    return (Enter.apply, Leave.apply) if ranks > 1 else (_same, _same)


def _same(x: Tensor) -> Tensor:
    return x


class Block(nn.Module):
    """A decoder block: grouped-query attention with rotary positions, and a gated feed-forward."""

    def __init__(self, shape: Shape, ranks: int) -> None:
        super().__init__()
        self.enter, self.leave = conversions(ranks)
        self.head_size = shape.head_size
        self.heads, self.key_value_heads = shape.heads // ranks, shape.key_value_heads // ranks
        width, hidden = shape.width, shape.hidden // ranks
        self.attention_norm = nn.RMSNorm(width, NORM_EPSILON)
        self.query = nn.Linear(width, self.heads * self.head_size, bias=False)
        self.key = nn.Linear(width, self.key_value_heads * self.head_size, bias=False)
        self.value = nn.Linear(width, self.key_value_heads * self.head_size, bias=False)
        self.attention_output = nn.Linear(self.heads * self.head_size, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, NORM_EPSILON)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x + self.leave(self.attend(self.enter(self.attention_norm(x)), turns, cache))
        y = self.enter(self.mlp_norm(x))
        z: Tensor = x + self.leave(self.down(F.silu(self.gate(y)) * self.up(y)))
        return z

    def attend(self, x: Tensor, turns: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor] | None) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        query, key = turned(query, turns), turned(key, turns)
        if cache is not None:  # the last position is the new token's
            keys, values = cache
            keys[:, :, -1:], values[:, :, -1:] = key, value
            key, value = keys, values
        y = F.scaled_dot_product_attention(query, key, value, is_causal=cache is None, enable_gqa=True)
        result: Tensor = self.attention_output(y.transpose(1, 2).flatten(2))
        return result


class Llama(nn.Module):
    """One rank's shards of a Llama of ``shape`` over ``ranks``, all vocabulary-parallel, and its logits, gathered."""

    def __init__(self, shape: Shape, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.enter, self.leave = conversions(ranks)
        self.first_token = dist.get_rank() * shape.vocabulary // ranks
        self.embedding = nn.Embedding(shape.vocabulary // ranks, shape.width)
        self.blocks = nn.ModuleList(Block(shape, ranks) for _ in range(shape.layers))
        self.final_norm = nn.RMSNorm(shape.width, NORM_EPSILON)
        self.head = nn.Linear(shape.width, shape.vocabulary // ranks, bias=False)
        angles = turn_angles(shape)
        self.register_buffer("cosines", angles.cos())
        self.register_buffer("sines", angles.sin())

    def forward(self, tokens: Tensor, caches: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Return logits, (batch, positions, vocabulary); with ``caches``, of one token at their last position."""
        x = self.leave(self.embed(tokens))
        rows = slice(0, tokens.shape[1]) if caches is None else slice(-1, None)
        turns = self.cosines[rows], self.sines[rows]
        for index, block in enumerate(self.blocks):
            x = block(x, turns, None if caches is None else caches[index])
        logits: Tensor = self.head(self.enter(self.final_norm(x)))
        return logits if self.ranks == 1 else Gather.apply(logits)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the vectors of tokens in this rank's range, and zeros for the others."""
        rows = tokens - self.first_token
        other = (rows < 0) | (rows >= self.embedding.num_embeddings)
        vectors: Tensor = self.embedding(rows.masked_fill(other, 0)).masked_fill(other[..., None], 0)
        return vectors


def turn_angles(shape: Shape) -> Tensor:
    """Return the angles of rotary positions, (positions, head size)."""
    frequencies = ROPE_WAVELENGTH ** (-torch.arange(0, shape.head_size, 2) / shape.head_size)
    return torch.outer(torch.arange(shape.length), frequencies).repeat(1, 2)


def turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Return (batch, heads, positions, head size) turned by its positions."""
    cosines, sines = turns
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat((-second, first), -1) * sines
