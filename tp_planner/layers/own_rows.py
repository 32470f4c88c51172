"""Own rows: how a lookup is done on one rank's rows of a table."""

from __future__ import annotations

import torch

from tp_planner.ir.placement import chunk_sizes


def own_rows(ids: torch.Tensor, rows: int, parts: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids relative to a rank's rows of all ``rows``, and the mask of ids that other ranks hold.

    An id that no rank holds stays out of range on every rank, so that it fails as on a single device.
    """
    sizes = chunk_sizes(rows, parts)
    ids = torch.where(ids < 0, ids + rows, ids)
    ids = torch.where(ids < 0, rows, ids)
    local = ids - rank * sizes[0]
    elsewhere = (local < 0) | ((local >= sizes[rank]) & (ids < rows))
    return local.masked_fill(elsewhere, 0), elsewhere


def without_others(looked_up: torch.Tensor, elsewhere: torch.Tensor) -> torch.Tensor:
    """Return what was looked up, 0 where another rank holds the row."""
    return looked_up.masked_fill(elsewhere.unsqueeze(-1), 0)
