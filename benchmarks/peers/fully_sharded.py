"""The same GPT by torch alone: stock styles over the model axis, ``fully_shard`` (FSDP2) over the batch axis."""

from __future__ import annotations

from peers.handwritten import Gpt, parallelize_with_stock_styles
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def fully_sharded(model: Gpt, mesh: DeviceMesh) -> Gpt:
    """Shard a whole GPT over a mesh with the axes "batch" and "model", block by block, and return it.

    Gloo has no mean, so that gradients are summed and divided.
    """
    if mesh["model"].size() > 1:
        parallelize_with_stock_styles(model, mesh["model"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["batch"])
    fully_shard(model, mesh=mesh["batch"])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    return model
