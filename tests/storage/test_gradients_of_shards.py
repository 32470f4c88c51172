"""Gradients of variables in shards are where autograd leaves those of any parameter, whoever looks at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import get_gradient_edge
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from tests.workers import WorkerPool
from tp_planner.regions.collectives import is_no_other_nodes
from tp_planner.storage.local_shards import local_shard

Read = Callable[[torch.Tensor], torch.Tensor]

# On the ranks; each function returns tensors that are the same for parameters in shards and for plain ones


def left(read: Read, first: Any, second: Any) -> list[torch.Tensor | None]:
    """Two passes, the second of which adds to what the first has left."""
    loss(read(first), read(second)).backward()
    before = first.grad.clone()
    loss(read(second) * read(first), read(first)).backward()
    return [before, first.grad, second.grad]


def read_often(read: Read, first: Any, second: Any) -> list[torch.Tensor | None]:
    """One tensor is the gradient of three reads of one parameter and of two of another."""
    total = read(first) + read(second) + read(first) + read(second) + read(first)
    (total * torch.arange(total.numel()).view(total.shape)).sum().backward()
    return [first.grad, second.grad]


def written_into(read: Read, first: Any, second: Any) -> list[torch.Tensor | None]:
    """Two parameters that are added have one gradient; whoever writes into the first one's leaves the second's."""
    total = read(first) + read(second)
    total.retain_grad()
    weights = torch.arange(total.numel()).view(total.shape)
    (total * weights).sum().backward()
    first.grad.mul_(2.0)
    second.grad.add_(1.0)
    assert torch.equal(total.grad, weights.to(total.dtype))
    return [first.grad, second.grad]


def asked_for(read: Read, first: Any, second: Any) -> list[torch.Tensor | None]:
    """``torch.autograd.grad`` returns gradients, and leaves none."""
    return [*torch.autograd.grad(loss(read(first), read(second)), [first, second]), first.grad, second.grad]


def of_one(read: Read, first: Any, second: Any) -> list[torch.Tensor | None]:
    """A pass for one parameter leaves none in the other."""
    loss(read(first), read(second)).backward(inputs=[second])
    return [first.grad, second.grad]


def frozen_meanwhile(read: Read, first: Any, second: Any) -> list[torch.Tensor | None]:
    """A parameter that is frozen between the passes gets none."""
    total = loss(read(first), read(second))
    first.requires_grad = False
    total.backward()
    return [first.grad, second.grad]


def hooked(read: Read, first: Any, second: Any) -> list[torch.Tensor | None]:
    """Hooks of the parameter and of its node are called, the first with the gradient, which it may replace."""
    seen: dict[str, torch.Tensor | None] = {"first": None, "second": None}
    first.register_hook(lambda gradient: 3 * gradient)
    first.register_post_accumulate_grad_hook(lambda parameter: seen.update(first=parameter.grad.clone()))
    node = get_gradient_edge(second).node
    node.register_hook(lambda *_: seen.update(second=second.grad.clone()))
    loss(read(first), read(second)).backward()
    return [*seen.values(), first.grad, second.grad]


def inside(read: Read, first: Any, second: Any) -> list[torch.Tensor | None]:
    """What runs again in the backward pass adds to what there is."""
    again = torch.utils.checkpoint.checkpoint
    squares = again(lambda _: read(first) ** 2, torch.ones((), requires_grad=True), use_reentrant=True)
    total = loss(squares, read(second))
    (total + read(first).sum()).backward()
    return [first.grad, second.grad]


WAYS = {
    each.__name__: each
    for each in (left, read_often, written_into, asked_for, of_one, frozen_meanwhile, hooked, inside)
}


def loss(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first.exp() @ second.sin()).square().mean()


def gradients(way: str, sharded: bool) -> list[list[float] | None]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(7)
    locals_ = [torch.randn(shape, generator=generator) for shape in ((4, 4), (4, 4))]
    if not sharded:
        found = WAYS[way](lambda parameter: parameter, *map(torch.nn.Parameter, locals_))
    else:
        whole = [DTensor.from_local(each, mesh, [Shard(0)], run_check=False) for each in locals_]
        found = WAYS[way](local_shard, *map(torch.nn.Parameter, whole))
        assert all(each is None or each.shape in [parameter.shape for parameter in whole] for each in found)
    return [None if each is None else _local(each).flatten().tolist() for each in found]


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local


def twice() -> str:
    """Return what is said of a gradient of a gradient, of which there is none."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameter = torch.nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Shard(0)], run_check=False))
    local_shard(parameter).exp().sum().backward(create_graph=True)
    try:
        _local(parameter.grad.to_local()).sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


# In the parent


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_plain_parameters(workers: WorkerPool, way: str) -> None:
    """To the bit, wherever they are looked at."""
    for sharded, plain in zip(workers.run(gradients, way, True), workers.run(gradients, way, False), strict=True):
        assert sharded == plain


def test_gradients_have_none_of_their_own(workers: WorkerPool) -> None:
    """Who differentiates twice is told."""
    assert all("differentiate twice" in said for said in workers.run(twice))


def test_torch_says_which_gradients_are_nobody_elses() -> None:
    """A gradient that a node has computed for one other is; one that a sum hands on to both of its summands is not."""
    found = []

    class Asked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
            return weight.view_as(weight)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            found.append(is_no_other_nodes(gradient))
            return gradient

    one, other = (torch.ones(3, 3, requires_grad=True) for _ in range(2))
    (other @ Asked.apply(one)).sum().backward()
    (Asked.apply(one) + Asked.apply(other)).square().sum().backward()
    assert found[:2] == [True, False]
