"""The collectives of an axis: begun, and waited for.

torch's functional collectives have wrappers, and kernels for autograd, in Python. They take 63 of the 68 us of an
all-reduce of 16 KiB; here the ops are called themselves, below autograd, for no gradient flows through them. What is
sent has to stay as long as it travels.
"""

from __future__ import annotations

import torch

from tp_planner.job.axes import Axis

_OPS = torch.ops._c10d_functional
_ALL_REDUCE, _WAIT = _OPS.all_reduce.default, _OPS.wait_tensor.default
_ALL_REDUCE_IN_PLACE = _OPS.all_reduce_.default
# How often torch counts a gradient that a node of autograd is given, and nothing else knows.
_USES_ON_THE_WAY = 2 if torch.__version__ < "2.12" else 1


def all_reduce(summand: torch.Tensor, axis: Axis, operation: str = "sum") -> torch.Tensor:
    """Return the sum, or the largest (``"max"``), of what all ranks of the axis have; no gradient flows through it."""
    with torch._C._AutoDispatchBelowAutograd():
        result: torch.Tensor = _WAIT(_ALL_REDUCE(summand, operation, axis.group))
    return result


def begin_all_reduce(summand: torch.Tensor, axis: Axis, in_place: bool = False) -> torch.Tensor:
    """Return what will hold the sum of what all ranks of the axis have, which may be the summand's own memory."""
    with torch._C._AutoDispatchBelowAutograd():
        result: torch.Tensor = (_ALL_REDUCE_IN_PLACE if in_place else _ALL_REDUCE)(summand, "sum", axis.group)
    return result


def is_alone_in_memory(tensor: torch.Tensor) -> bool:
    """Whether no other tensor lies where this one does: no view, and nothing that autograd keeps."""
    return _uses_of_memory(tensor) == 2 and tensor.is_contiguous()  # the tensor's, and that of the question


def is_nobodys(gradient: torch.Tensor) -> bool:
    """Whether a gradient on its way is one that no other node of autograd waits for, nor lies where another does.

    It may be a view of what it was computed as, which nothing else knows. What code holds it does not see.
    """
    if not is_no_other_nodes(gradient) or not gradient.is_contiguous():
        return False
    uses, base = _uses_of_memory(gradient), gradient._base
    return uses == 2 if base is None else uses == 3 and base._use_count() == 2  # type: ignore[attr-defined]


def is_no_other_nodes(gradient: torch.Tensor) -> bool:
    """Whether no other node of autograd waits for the tensor that is a gradient on its way."""
    uses: int = gradient._use_count()  # type: ignore[attr-defined]
    return uses <= _USES_ON_THE_WAY


def _uses_of_memory(tensor: torch.Tensor) -> int:
    uses: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return uses


def begin_all_gather(shard: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return what will hold the shards of all ranks, one after the other in the first dim.

    The op that takes its output: on gloo the other one comes to ``allgather_coalesced``, of which two that travel at
    a time damage the process's memory (seen with torch 2.13, within a minute of nothing else).
    """
    with torch._C._AutoDispatchBelowAutograd():
        stacked = shard.new_empty((axis.size * shard.shape[0], *shard.shape[1:]))
        result: torch.Tensor = _OPS.all_gather_into_tensor_out(shard, axis.size, axis.group, out=stacked)
    return result


def begin_reduce_scatter(summand: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return what will hold this rank's chunk, in the first dim, of the sum over all ranks."""
    with torch._C._AutoDispatchBelowAutograd():
        result: torch.Tensor = _OPS.reduce_scatter_tensor(summand, "sum", axis.size, axis.group)
    return result


def arrived(arriving: torch.Tensor) -> torch.Tensor:
    """Return what a collective has begun to make, once it is there; on a GPU its stream waits, and not the host."""
    with torch._C._AutoDispatchBelowAutograd():
        result: torch.Tensor = _WAIT(arriving)
    return result
