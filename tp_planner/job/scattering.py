"""Scattering: what rank 0 holds goes to all ranks, each its own part."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist


def scatter_parts(local: torch.Tensor, part_of: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """Fill ``local`` with this rank's part of what rank 0 holds, and return it; every rank has to call it.

    One rank is served after the other, so that rank 0 holds one part more on its device at most.

    Args:
        local: a contiguous tensor of the part's shape and dtype, on this rank's device.
        part_of: returns the part of a rank, on any device; called on rank 0 alone.
    """
    with torch.no_grad():
        if dist.get_rank() == 0:
            local.copy_(part_of(0))
            for rank in range(1, dist.get_world_size()):
                part = part_of(rank)
                if part.numel():
                    _pass_on(dist.isend, part.to(local.device).contiguous(), rank)
        elif local.numel():
            _pass_on(dist.irecv, local, 0)
    return local


def _pass_on(operation: Callable[..., object], tensor: torch.Tensor, peer: int) -> None:
    """Send or receive as a batch of one: outside of a batch NCCL makes a communicator for each pair of ranks."""
    for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer)]):
        work.wait()
