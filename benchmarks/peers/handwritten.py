"""The same GPT by hand in plain torch: Megatron-style on local tensors, and the stock styles' nn.Module.

One module serves both. With ``shards`` it holds one process's weights and communicates as Megatron-LM does
(https://arxiv.org/abs/1909.08053): f before the column-parallel matmuls, g after the row-parallel ones.
Without, it is an ordinary module of ``nn.Linear``, for ``parallelize_module``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models.gpt import BLOCKS, VOCABULARY, Size, Weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement

LAYER_NORM_EPSILON = 1e-3  # Keras's default


class _Enter(torch.autograd.Function):
    """Megatron's f: the identity forward, an all-reduce of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        dist.all_reduce(gradient)
        return gradient


class _Leave(torch.autograd.Function):
    """Megatron's g: an all-reduce forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class RowLinear(nn.Linear):
    """A linear layer of which each process holds some rows; the bias is added once, to the sum."""

    def __init__(self, inputs: int, outputs: int, leave: Callable[[Tensor], Tensor]) -> None:
        super().__init__(inputs, outputs)
        self.leave = leave

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.leave(F.linear(x, self.weight)) + self.bias
        return y


class Block(nn.Module):
    """A transformer block, norms before attention and feed-forward."""

    def __init__(self, size: Size, shards: Literal["whole", "communicating", "silent"]) -> None:
        super().__init__()
        width, inner = size.width, size.heads * size.head_size
        self.head_size = size.head_size
        communicating = shards == "communicating"
        self.enter: Callable[[Tensor], Tensor] = _Enter.apply if communicating else _same
        leave: Callable[[Tensor], Tensor] = _Leave.apply if communicating else _same

        def row(inputs: int) -> nn.Linear:
            return nn.Linear(inputs, width) if shards == "whole" else RowLinear(inputs, width, leave)

        self.attention_norm = nn.LayerNorm(width, LAYER_NORM_EPSILON)
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.attention_output = row(inner)
        self.mlp_norm = nn.LayerNorm(width, LAYER_NORM_EPSILON)
        self.up = nn.Linear(width, size.hidden)
        self.down = row(size.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.enter(self.attention_norm(x)))
        y: Tensor = x + self.down(F.gelu(self.up(self.enter(self.mlp_norm(x)))))
        return y

    def attend(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.attention_output(y.transpose(1, 2).flatten(2))
        return result


class Gpt(nn.Module):
    """A causal GPT with learned positions, logits per token.

    Args:
        size: what this process holds: of the whole model, or of one shard.
        weights: by Keras path, of ``size``.
        shards: "whole" for an ordinary module; "communicating" for one process's shards; "silent" for the
            same computation without its collectives, which is not the GPT's function.
    """

    def __init__(
        self, size: Size, weights: Weights, shards: Literal["whole", "communicating", "silent"] = "whole"
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, size.width)
        self.position_embedding = nn.Parameter(torch.empty(size.length, size.width))
        self.blocks = nn.ModuleList(Block(size, shards) for _ in range(BLOCKS))
        self.final_norm = nn.LayerNorm(size.width, LAYER_NORM_EPSILON)
        self.head = nn.Linear(size.width, VOCABULARY)
        self._load(weights)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.position_embedding
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.final_norm(x))
        return logits

    @torch.no_grad()
    def _load(self, weights: Weights) -> None:
        for name, parameter in self.named_parameters():
            weight = torch.from_numpy(weights[_keras_path(name)])
            parameter.copy_(weight.T if parameter.ndim == 2 and "embedding" not in name else weight)


def _same(x: Tensor) -> Tensor:
    return x


def _keras_path(name: str) -> str:
    """Return the path of the Keras variable that ``blocks.0.query.weight`` and its like correspond to."""
    *modules, last = name.split(".")
    if modules and modules[0] == "blocks":
        attention = modules[2] in ("query", "key", "value", "attention_output")
        modules = [f"block_{modules[1]}_attention/{modules[2]}" if attention else f"block_{modules[1]}_{modules[2]}"]
    if "embedding" in name:
        return f"{modules[0] if modules else last}/embeddings"
    is_norm = modules[0].endswith("norm")
    kind = {"weight": "gamma", "bias": "beta"}[last] if is_norm else {"weight": "kernel", "bias": "bias"}[last]
    return f"{modules[0]}/{kind}"


def parallelize_with_stock_styles(model: Gpt, mesh: DeviceMesh) -> Gpt:
    """Shard a whole GPT with torch's own styles, one per layer, and return it."""
    columns = {f"blocks.*.{name}": ColwiseParallel() for name in ("query", "key", "value", "up")}
    rows = {f"blocks.*.{name}": RowwiseParallel() for name in ("attention_output", "down")}
    parallelize_module(model, mesh, {**columns, **rows})
    return model


def _attention_by_heads(tensors: int, results: int) -> Callable[..., Any]:
    """Return the sharding rule of an attention op: everything over heads, or everything whole."""

    def rule(*given: Any, **named: Any) -> list[tuple[list[Placement], list[Placement | None]]]:
        others = [None] * (len(given) - tensors)
        return [([each] * results, [each] * tensors + others) for each in (Shard(1), Replicate())]

    return rule


# DTensor has rules for the attention of GPUs only.
register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)(_attention_by_heads(3, 2))
register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default)(
    _attention_by_heads(6, 3)
)


def make_all_dtensors(model: Gpt, mesh: DeviceMesh) -> Gpt:
    """Make every parameter of a whole GPT a DTensor, sharded as the stock styles do, and return it.

    To be called under ``implicit_replication``; DTensor alone decides where it communicates.
    """
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        for key, parameter in list(module.named_parameters(recurse=False)):
            placement: Placement = Replicate()
            if last in ("query", "key", "value", "up"):
                placement = Shard(0)
            elif last in ("attention_output", "down") and key == "weight":
                placement = Shard(1)
            setattr(module, key, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement])))
    return model


class AdamW:
    """Keras's AdamW, its formula and its defaults, on plain local tensors with torch's foreach ops."""

    learning_rate, weight_decay = 0.001, 0.004
    beta_1, beta_2, epsilon = 0.9, 0.999, 1e-7

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.steps = 0
        self.values = [_local(parameter.detach()) for parameter in self.parameters]
        self.momentums = [torch.zeros_like(value) for value in self.values]
        self.velocities = [torch.zeros_like(value) for value in self.values]

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters from their gradients."""
        gradients = [_local_gradient(parameter) for parameter in self.parameters]
        self.steps += 1
        alpha = self.learning_rate * (1 - self.beta_2**self.steps) ** 0.5 / (1 - self.beta_1**self.steps)
        torch._foreach_mul_(self.values, 1 - self.weight_decay * self.learning_rate)
        torch._foreach_mul_(self.momentums, self.beta_1)
        torch._foreach_add_(self.momentums, gradients, alpha=1 - self.beta_1)
        torch._foreach_mul_(self.velocities, self.beta_2)
        torch._foreach_addcmul_(self.velocities, gradients, gradients, 1 - self.beta_2)
        denominators = torch._foreach_sqrt(self.velocities)
        torch._foreach_add_(denominators, self.epsilon)
        torch._foreach_addcdiv_(self.values, self.momentums, denominators, -alpha)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _local_gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        gradient = gradient.redistribute(placements=parameter.placements)  # it may be a sum that is not done yet
    return _local(gradient)


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local
