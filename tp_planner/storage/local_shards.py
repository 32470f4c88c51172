"""Local shards: what a rank computes with of a DTensor parameter, and how the gradient comes back to that.

Both are on the way of each weight in each step, so what autograd and DTensor would do beside it is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tp_planner.regions.backward import without_gradients


class LocalShard(torch.autograd.Function):
    """The shard of a DTensor parameter; its gradient is a DTensor again."""

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> torch.Tensor:
        ctx.parameter = parameter
        return parameter._local_tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> DTensor | None:
        whole = _gradient_of_shard(ctx, gradient)
        node = ctx.next_functions[0][0]
        return None if not torch.is_grad_enabled() and _leave(whole, ctx.parameter, node) else whole


# What ``apply`` adds to it is for transforms of torch.func, and takes as long.
_at_once = super(torch.autograd.Function, LocalShard).apply


def local_shard(parameter: DTensor) -> torch.Tensor:
    """Return this rank's shard of a parameter, gradients flowing back to it."""
    transformed = torch._C._are_functorch_transforms_active()
    if not (transformed or torch.is_grad_enabled()):
        return parameter._local_tensor.detach()
    shard: torch.Tensor = (LocalShard.apply if transformed else _at_once)(parameter)
    return shard


@without_gradients
def _gradient_of_shard(ctx: Any, gradient: torch.Tensor) -> DTensor:
    # What DTensor.from_local does without its checks, which cost more than a small layer's matmul. Autograd lays out a
    # gradient as its parameter, and copies one that is somebody else's, too, but asks this of the DTensor; kernels of
    # updates look at the shard's strides, and some write into it.
    local = gradient.contiguous()
    if local is gradient and gradient._use_count() > 1:  # type: ignore[attr-defined]
        local = gradient.clone()
    return DTensor.__new__(DTensor, local, ctx.parameter._spec, requires_grad=False)


def _leave(gradient: DTensor, parameter: Any, node: Any) -> bool:
    """Leave a gradient in its parameter, if that is all that ``node``, the next one of autograd, would do with it.

    Say whether it is there. For a DTensor the node takes longer than a small layer's backward pass. It has more to do
    where somebody asked for gradients on their way, and on a GPU, where it lets streams wait. A further gradient of
    the same pass is added into a new tensor, as autograd does before that node: others may hold the first.
    """
    if type(node) is not _Accumulating or parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return False
    if not (gradient.is_cpu and parameter.requires_grad and parameter.is_leaf):
        return False
    task, before = torch._C._current_graph_task_id(), parameter.grad
    if before is not None and getattr(before, "_left_by", None) != task:
        return False
    try:
        if not torch._C._will_engine_execute_node(node):
            return False
    except RuntimeError:  # torch.autograd.grad was called with this parameter
        return False
    if before is not None:
        added = before._local_tensor + gradient._local_tensor
        gradient = DTensor.__new__(DTensor, added, parameter._spec, requires_grad=False)
    gradient._left_by = task  # type: ignore[attr-defined]
    parameter.grad = gradient
    return True


_Accumulating = type(torch.autograd.graph.get_gradient_edge(torch.nn.Parameter(torch.zeros(()))).node)
