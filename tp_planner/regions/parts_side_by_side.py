"""Parts side by side: a dim such as that of q, k and v in one kernel, of each of which every rank has its own chunk.

The shards of all ranks one after the other are the whole tensor in another order, which is how it is stored.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from tp_planner.ir.placement import Placement, parts_of


def in_stored_order(whole: torch.Tensor, placement: Placement, ranks: int) -> torch.Tensor:
    """Return a whole tensor as the shards of all ranks one after the other."""
    if not (parts := parts_of(placement)):
        return whole
    pieces = _pieces(whole, placement, [part // ranks for part in parts for _ in range(ranks)])
    joined: torch.Tensor = _joined(
        [pieces[part * ranks + rank] for rank in range(ranks) for part in range(len(parts))], placement
    )
    return joined


def in_whole_order(stored: torch.Tensor, placement: Placement, ranks: int) -> torch.Tensor:
    """Return the whole tensor of which ``stored`` are the shards of all ranks one after the other."""
    if not (parts := parts_of(placement)):
        return stored
    pieces = _pieces(stored, placement, [part // ranks for _ in range(ranks) for part in parts])
    joined: torch.Tensor = _joined(
        [pieces[rank * len(parts) + part] for part in range(len(parts)) for rank in range(ranks)], placement
    )
    return joined


def own_parts(whole: Any, placement: Placement, ranks: int, rank: int) -> list[Any]:
    """Return a rank's chunk of each part of a whole tensor or array."""
    pieces = _pieces(whole, placement, [part // ranks for part in parts_of(placement) for _ in range(ranks)])
    return pieces[rank::ranks]


def _pieces(whole: Any, placement: Any, sizes: list[int]) -> list[Any]:
    ends = list(accumulate(sizes))
    before = (slice(None),) * placement.dim
    return [whole[(*before, slice(end - size, end))] for size, end in zip(sizes, ends, strict=True)]


def _joined(pieces: list[torch.Tensor], placement: Any) -> torch.Tensor:
    return torch.cat(pieces, placement.dim)
