"""The lines that sharding writes to the logger ``tp_planner``."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist

from tp_planner.ir.placement import Shard
from tp_planner.ir.plan import VariablePlan
from tp_planner.job.axes import Axis
from tp_planner.storage.variables import local_tensor

logger = logging.getLogger("tp_planner")


def log_sharding(plan: VariablePlan, variable: Any, axis: Axis) -> None:
    """Log how one variable was placed: the whole tensor once, on rank 0, and this rank's part of it."""
    if not logger.isEnabledFor(logging.INFO):
        return
    local, sharded = local_tensor(variable), plan.is_sharded
    if isinstance(plan.placement, Shard) and dist.get_rank() == 0:
        names = [f"cuda:{rank}" if local.is_cuda else f"cpu:{rank}" for rank in range(axis.size)]
        logger.info(
            "[ModelParallel] Sharding tensor '%s' | Original shape: %s | Shard axis: %d | Devices: %s",
            variable.name,
            plan.shape,
            plan.placement.dim,
            ", ".join(names),
        )
    device = f"cuda:{local.device.index}" if local.is_cuda else f"cpu:{dist.get_rank()}"
    logger.info(
        "[ModelParallel] Distributing variable '%s' | Shape: %s | Device: %s | Is sharded: %s",
        plan.key.replace("/", "."),
        tuple(local.shape),
        device,
        sharded,
    )
