"""Local shards: what a rank computes with of a DTensor parameter, and how the gradient comes back to that.

Both are on the way of each weight in each step, so what autograd and DTensor would do beside it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tp_planner.regions.backward import without_gradients
from tp_planner.regions.collectives import is_no_other_nodes


class LocalShard(torch.autograd.Function):
    """The shard of a DTensor parameter; its gradient is a DTensor again."""

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> torch.Tensor:
        ctx.parameter = parameter
        return parameter._local_tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> DTensor | None:
        return _hand_on(gradient, ctx.parameter, ctx.next_functions[0][0])


class LocalShards(torch.autograd.Function):
    """The shards of several DTensor parameters, whose gradients come back together: one call each way for all."""

    @staticmethod
    def forward(ctx: Any, *parameters: DTensor) -> tuple[torch.Tensor, ...]:
        ctx.parameters = parameters
        ctx.set_materialize_grads(False)  # of a shard that nothing has read there is none
        return tuple([parameter._local_tensor.detach() for parameter in parameters])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[DTensor | None, ...]:
        nodes = [node for node, _ in ctx.next_functions]
        return tuple(map(_hand_on, gradients, ctx.parameters, nodes))


# What ``apply`` adds to it is for transforms of torch.func, and takes as long.
_at_once = super(torch.autograd.Function, LocalShard).apply
_all_at_once = super(torch.autograd.Function, LocalShards).apply


def local_shard(parameter: DTensor) -> torch.Tensor:
    """Return this rank's shard of a parameter, gradients flowing back to it."""
    transformed = torch._C._are_functorch_transforms_active()
    if not (transformed or torch.is_grad_enabled()):
        return parameter._local_tensor.detach()
    shard: torch.Tensor = (LocalShard.apply if transformed else _at_once)(parameter)
    return shard


def local_shards(parameters: Sequence[DTensor]) -> Sequence[torch.Tensor]:
    """Return what ``local_shard`` does of each parameter; gradients flow back once all of them have come."""
    transformed = torch._C._are_functorch_transforms_active()
    if transformed or not torch.is_grad_enabled() or not all(each.requires_grad for each in parameters):
        return list(map(local_shard, parameters))
    shards: Sequence[torch.Tensor] = _all_at_once(*parameters)
    return shards


def _hand_on(gradient: torch.Tensor | None, parameter: Any, node: Any) -> DTensor | None:
    """Return a shard's gradient as that of its parameter, for ``node``; None if it is left there already."""
    if gradient is None:
        return None
    whole = _gradient_of_shard(parameter, gradient)
    return None if not torch.is_grad_enabled() and _leave(whole, parameter, node) else whole


@without_gradients
def _gradient_of_shard(parameter: Any, gradient: torch.Tensor) -> DTensor:
    # What DTensor.from_local does without its checks, which cost more than a small layer's matmul. Autograd lays out a
    # gradient as its parameter, and copies one that is somebody else's, too, but asks this of the DTensor; kernels of
    # updates look at the shard's strides, and some write into it.
    local = gradient.contiguous()
    if local is gradient and not is_no_other_nodes(gradient):
        local = gradient.clone()
    return DTensor.__new__(DTensor, local, parameter._spec, requires_grad=False)


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
