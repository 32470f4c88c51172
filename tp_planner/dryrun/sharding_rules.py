"""DTensor's sharding rules, asked op by op on fake tensors.

An op is run once on DTensors whose local tensors are fake. It follows its inputs' placements if DTensor ran it
on exactly the local tensors it was given: no collective and no slice.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Partial as TorchPartial
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._pytree import tree_flatten, tree_map

from tp_planner.frontend.dispatch import WatchingMode
from tp_planner.frontend.fake_mode import FakeCpuMode
from tp_planner.frontend.quiet import quiet_torch
from tp_planner.ir.errors import in_one_line
from tp_planner.ir.graph import Op, TensorInfo, TensorRef
from tp_planner.ir.placement import PackedShard, Partial, Placement, Replicate, Shard, StridedShard, local_shape
from tp_planner.passes.follow_ops import Followed, Refused
from tp_planner.passes.packed_ops import CONCATENATION, follow_concatenation, follow_packed, parts_wanted
from tp_planner.passes.view_ops import follow_view
from tp_planner.patches import Patch

CPU_ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu.default"
# DTensor takes these for elementwise where their dim is negative.
SCANS = {f"aten.{name}.default" for name in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "_cummax_helper")}
# Ops that look up along a dim. DTensor makes summands of them with a mask that it keeps from one use to the next.
LOOKUPS = {"aten.embedding.default", "aten.gather.default", "aten.index_select.default"}
FLASH_ATTENTION = "aten._scaled_dot_product_flash_attention.default"
EFFICIENT_ATTENTION = "aten._scaled_dot_product_efficient_attention.default"
# Outputs that are sharded as the query is, the result and its sums over keys, and those that are of all: seeds.
ATTENTION_OUTPUTS = {CPU_ATTENTION: (2, 0), FLASH_ATTENTION: (2, 3), EFFICIENT_ATTENTION: (2, 2)}
# Ops that draw random numbers only where their dropout_p is not 0.
ATTENTION_DROPOUT = set(ATTENTION_OUTPUTS)


class DTensorRules:
    """Answers from DTensor, remembered by op, shapes and placements."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self._fake = FakeCpuMode()
        self._answers: dict[Any, Followed | Refused] = {}
        self._questions: dict[Any, int] = {}
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []

    def follow(self, op: Op, tensors: Mapping[int, TensorInfo], inputs: Mapping[int, Placement]) -> Followed | Refused:
        """Return what ``op`` makes of inputs placed so; see ``ShardingRules``."""
        if op.random and op.name not in ATTENTION_DROPOUT:
            return Refused("draws random numbers for a sharded tensor")
        if op.name in SCANS:
            return Refused("runs along a dim")
        if op.name in LOOKUPS and inputs[op.inputs[0]] == Shard(_looked_up_dim(op, tensors)):
            return Refused("looks up what other ranks have")
        placements = tuple(inputs[tensor] for tensor in op.inputs)
        if len(inputs) > 1 and Partial() in placements and op.name not in SUM_RULES:
            return Refused("would combine a sum over the shards with something else")
        key = (self.question(op, tensors), placements)
        if key not in self._answers:
            self._answers[key] = self._answer(op, tensors, inputs)
        answer = self._answers[key]
        # Remembered answers were given to an equal op, which had other tensors.
        if isinstance(answer, Refused) and answer.op is not None and answer.op is not op:
            return replace(answer, op=op, tensor=op.inputs[answer.op.inputs.index(answer.tensor)])
        return answer

    def _answer(self, op: Op, tensors: Mapping[int, TensorInfo], inputs: Mapping[int, Placement]) -> Followed | Refused:
        if op.name == CONCATENATION and (side_by_side := follow_concatenation(op, tensors, inputs)) is not None:
            return side_by_side
        if any(isinstance(placement, PackedShard) for placement in inputs.values()):
            return follow_packed(op, tensors, inputs, self._mesh.size(), lambda plain: self.follow(op, tensors, plain))
        own = SUM_RULES[op.name] if Partial() in inputs.values() and len(inputs) > 1 else OWN_RULES.get(op.name)
        if own is not None:
            answer: Followed | Refused = own(op, tensors, inputs, self._mesh.size())
            return answer
        asked = self._ask(op, tensors, inputs)
        if isinstance(asked, Refused) and (view := follow_view(op, tensors, inputs, self._mesh.size())) is not None:
            return view
        if isinstance(asked, Refused) and (parts := parts_wanted(op, tensors, inputs[op.inputs[0]])):
            return replace(asked, parts=parts, op=op, tensor=op.inputs[0])
        return asked

    def question(self, op: Op, tensors: Mapping[int, TensorInfo]) -> int:
        """Return a number that is the same for equal ops on tensors of equal shapes; equal blocks share arguments."""
        known = self._numbers.get(id(op.arguments))
        if known is None:
            leaves, structure = tree_flatten(op.arguments)
            constants = tuple((type(leaf).__name__, leaf) for leaf in leaves if not isinstance(leaf, TensorRef))
            infos = tuple((i.shape, i.stride, i.dtype) for i in (tensors[tensor] for tensor in op.inputs))
            known = self._questions.setdefault((op.name, str(structure), constants, infos), len(self._questions))
            self._numbers[id(op.arguments)] = known
            self._kept.append(op.arguments)  # keeps its id from being used again
        return known

    def _ask(self, op: Op, tensors: Mapping[int, TensorInfo], inputs: Mapping[int, Placement]) -> Followed | Refused:
        function = resolve_op(op.name)
        given: dict[int, torch.Tensor] = {}
        with self._fake, quiet_torch(), Patch(_StridedShard, "_split_tensor", _cut_at_once, _CUT_AT_ONCE):

            def as_dtensor(leaf: Any) -> Any:
                if not isinstance(leaf, TensorRef):
                    return leaf
                number = op.inputs[leaf.position]
                tensor = _fake_dtensor(tensors[number], inputs[number], self._mesh)
                given[leaf.position] = tensor._local_tensor
                return tensor

            args, kwargs = tree_map(as_dtensor, op.arguments)
            watch = _LocalCalls(function)
            try:
                with watch:
                    result = function(*args, **kwargs)
            except Exception as error:  # DTensor raises many kinds for "cannot shard this"
                return Refused(f"has no sharding rule for it ({in_one_line(error)[:160]})")
        expected = [given[leaf.position] for leaf in tree_flatten(op.arguments)[0] if isinstance(leaf, TensorRef)]
        if watch.communicated:
            return Refused("needs communication between the shards")
        same = len(watch.tensors) == len(expected) and all(map(operator.is_, watch.tensors, expected))
        if not same:  # also of the same shape: a whole tensor that became a summand
            return Refused("needs its inputs placed in another way")
        return _outputs(result, watch.arguments, self._mesh.size())


_CUT_AT_ONCE = "torch makes a tensor of each part of a part, hundreds of them; here only their size matters"


def _cut_at_once(before: Callable[..., Any]) -> Callable[..., Any]:
    def split(
        placement: Any, tensor: torch.Tensor, num_chunks: int, **options: Any
    ) -> tuple[list[torch.Tensor], list[int]]:
        length = tensor.shape[placement.dim]
        if length % (placement.split_factor * num_chunks):
            unequal: tuple[list[torch.Tensor], list[int]] = before(placement, tensor, num_chunks, **options)
            return unequal
        chunk = tensor.narrow(placement.dim, 0, length // num_chunks)
        return [chunk] * num_chunks, [0] * num_chunks if options.get("with_padding", True) else []

    return split


def _looked_up_dim(op: Op, tensors: Mapping[int, TensorInfo]) -> int:
    if op.name == "aten.embedding.default":
        return 0
    dim: int = op.arguments[0][1]
    return dim % max(len(tensors[op.inputs[0]].shape), 1)


class _LocalCalls(WatchingMode):
    """Remembers how the op was last run on local tensors, and whether anything was communicated."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.communicated = False
        self.tensors: list[torch.Tensor] = []
        self.arguments: tuple[Any, ...] = ()

    def watch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace == "_c10d_functional":
            self.communicated = True
        if func is self.function:
            leaves = tree_flatten((args, kwargs))[0]
            self.tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            self.arguments = tuple(leaf for leaf in leaves if not isinstance(leaf, torch.Tensor))
        return func(*args, **kwargs)


def resolve_op(name: str) -> Any:
    """Return torch's op of this name."""
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def to_torch_placement(placement: Placement) -> Any:
    """Return the DTensor placement."""
    match placement:
        case Replicate():
            return TorchReplicate()
        case Shard(dim):
            return TorchShard(dim)
        case Partial():
            return TorchPartial()
        case StridedShard(dim, split):
            return _StridedShard(dim, split_factor=split)


def _from_torch_placement(placement: Any) -> Placement | None:
    if isinstance(placement, _StridedShard):
        return StridedShard(placement.dim, int(placement.split_factor))
    if placement.is_replicate():
        return Replicate()
    if placement.is_shard():
        return Shard(placement.dim)
    if type(placement) is TorchPartial and placement.is_partial("sum"):
        return Partial()
    return None


def _fake_dtensor(info: TensorInfo, placement: Placement, mesh: DeviceMesh) -> DTensor:
    shape = local_shape(info.shape, placement, mesh.size())
    local = torch.empty_strided(shape, local_stride(info, shape), dtype=getattr(torch, info.dtype), device="cpu")
    return DTensor.from_local(
        local, mesh, [to_torch_placement(placement)], run_check=False, shape=torch.Size(info.shape), stride=info.stride
    )


def local_stride(info: TensorInfo, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a shard laid out in the same order of dims; dims of stride 0 keep it."""
    strides, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda d: (info.stride[d], -d)):
        if info.stride[dim]:
            strides[dim] = step
            step *= shape[dim]
    return tuple(strides)


def _outputs(result: Any, arguments: tuple[Any, ...], parts: int) -> Followed | Refused:
    """Return the outputs' placements, distrusting DTensor's rules where they contradict themselves.

    Its rule for convolutions, for one, takes a kernel sharded over space and calls the output whole.
    """
    placements = []
    for leaf in tree_flatten(result)[0]:
        if not isinstance(leaf, torch.Tensor):
            continue
        placement = _from_torch_placement(leaf.placements[0]) if isinstance(leaf, DTensor) else None
        if placement is None:
            return Refused("leaves something other than shards or a sum over them")
        if placement == Replicate():
            return Refused("has a sharding rule that cannot be right: shards alone cannot give a whole tensor")
        assert isinstance(leaf, DTensor)
        if leaf._local_tensor.shape != local_shape(tuple(leaf.shape), placement, parts):
            return Refused("has a sharding rule that cannot be right: its shards are of another shape")
        placements.append(placement)
    return Followed(tuple(placements), arguments)


def _follow_attention(
    op: Op, tensors: Mapping[int, TensorInfo], inputs: Mapping[int, Placement], parts: int
) -> Followed | Refused:
    """Torch's fused attention works on each batch entry and head alone; DTensor has no rule for that of CPUs.

    query (B, H, T, D), key (B, H, S, D), value (B, H, S, V), attn_mask broadcastable to (B, H, T, S).
    """
    leaves, _ = tree_flatten(op.arguments)
    if _attention_dropout(op):
        return Refused("draws random numbers for a sharded tensor")
    query, key, value, *masks = [op.inputs[leaf.position] for leaf in leaves if isinstance(leaf, TensorRef)]
    placement = inputs[query]
    same = inputs[key] == placement and inputs[value] == placement
    if not (same and isinstance(placement, Shard) and placement.dim in (0, 1)):
        return Refused("works on each batch entry and head alone; query, key and value must be sharded alike there")
    for mask in masks:
        shape = tensors[mask].shape
        broadcast = len(shape) < 4 or shape[placement.dim] == 1
        if inputs[mask] != (Replicate() if broadcast else placement):
            return Refused("takes a mask that is not sharded like the query")
    sharded, whole = ATTENTION_OUTPUTS[op.name]
    return Followed((placement,) * sharded + (Replicate(),) * whole, _constants(op))


def _attention_dropout(op: Op) -> float:
    """Return the probability with which the op drops a weight; code that leaves it out drops none."""
    arguments, named = op.arguments
    names = [each.name for each in resolve_op(op.name)._schema.arguments]
    given = dict(zip(names, arguments, strict=False)) | named
    return float(given.get("dropout_p", 0.0))


def _follow_convolution(
    op: Op, tensors: Mapping[int, TensorInfo], inputs: Mapping[int, Placement], parts: int
) -> Followed | Refused:
    """Convolutions mix all channels of a group and shift in space; DTensor's rule is about sharded space alone.

    input (N, C, *space), weight (O, C / groups, *window), for a transposed one (C, O / groups, *window), bias (O).
    """
    arguments, _ = op.arguments
    transposed, groups = arguments[6], arguments[8]
    data, weight, *bias = (inputs[op.inputs[each.position]] for each in arguments[:3] if isinstance(each, TensorRef))
    taken, made = (Shard(0), Shard(1)) if transposed else (Shard(1), Shard(0))
    constants = _constants(op)
    if groups == 1 and (data, weight) == (Replicate(), made) and all(each == Shard(0) for each in bias):
        return Followed((Shard(1),), constants)
    if groups == 1 and (data, weight) == (Shard(1), taken) and all(each == Partial() for each in bias):
        return Followed((Partial(),), constants)
    if groups % parts == 0 and (data, weight) == (Shard(1), Shard(0)) and all(each == Shard(0) for each in bias):
        return Followed((Shard(1),), (*constants[:-1], groups // parts), ((groups, groups // parts),))
    return Refused("works on all channels at once; sharded are the output channels, or the input channels of both")


def _follow_addmm(
    op: Op, tensors: Mapping[int, TensorInfo], inputs: Mapping[int, Placement], parts: int
) -> Followed | Refused:
    """A product over a sharded dim is a sum over the ranks, to which one of them adds. bias, (N, K), (K, M)."""
    if tuple(inputs[tensor] for tensor in op.inputs) != (Partial(), Shard(1), Shard(0)):
        return Refused("adds a summand to something else than a sum over the shards")
    return Followed((Partial(),), _constants(op))


def _follow_addition(
    op: Op, tensors: Mapping[int, TensorInfo], inputs: Mapping[int, Placement], parts: int
) -> Followed | Refused:
    """A sum of sums over the shards is one."""
    if any(inputs[tensor] != Partial() for tensor in op.inputs):
        return Refused("adds a summand to something else than a sum over the shards")
    return Followed((Partial(),), _constants(op))


def _follow_squeeze(
    op: Op, tensors: Mapping[int, TensorInfo], inputs: Mapping[int, Placement], parts: int
) -> Followed | Refused:
    """Dims of length 1 go, those behind them move up; DTensor answers for this op by running another one."""
    placement, shape = inputs[op.inputs[0]], tensors[op.inputs[0]].shape
    given = op.arguments[0][1]
    dims = {dim % len(shape) for dim in ([given] if isinstance(given, int) else given)}
    if isinstance(placement, Shard):
        if placement.dim in dims:
            return Refused("may take away a dim that is longer than a shard of it")
        gone = sum(shape[dim] == 1 for dim in dims if dim < placement.dim)
        placement = replace(placement, dim=placement.dim - gone)
    return Followed((placement,), _constants(op))


def _follow_stack(
    op: Op, tensors: Mapping[int, TensorInfo], inputs: Mapping[int, Placement], parts: int
) -> Followed | Refused:
    """A new dim comes, those behind it move down; with torch 2.11 DTensor does not move them."""
    placement, ndim = inputs[op.inputs[0]], len(tensors[op.inputs[0]].shape)
    args, kwargs = op.arguments
    new = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % (ndim + 1)
    if not isinstance(placement, Shard) or any(inputs[tensor] != placement for tensor in op.inputs):
        return Refused("needs its inputs placed in another way")
    return Followed((replace(placement, dim=placement.dim + (placement.dim >= new)),), _constants(op))


def _follow_pooling(
    op: Op, tensors: Mapping[int, TensorInfo], inputs: Mapping[int, Placement], parts: int
) -> Followed | Refused:
    """Windows are of one channel (N, C, H, W), and numbers in it; with torch 2.11 DTensor has no rule."""
    placement = inputs[op.inputs[0]]
    if not isinstance(placement, Shard) or placement.dim >= len(tensors[op.inputs[0]].shape) - 2:
        return Refused("takes windows of sharded dims")
    return Followed((placement,) * len(op.outputs), _constants(op))


def _constants(op: Op) -> tuple[Any, ...]:
    return tuple(leaf for leaf in tree_flatten(op.arguments)[0] if not isinstance(leaf, TensorRef))


# Rules for ops for which DTensor has none, or a wrong one.
OWN_RULES: Mapping[str, Callable[..., Followed | Refused]] = {
    CPU_ATTENTION: _follow_attention,
    FLASH_ATTENTION: _follow_attention,
    EFFICIENT_ATTENTION: _follow_attention,
    "aten.convolution.default": _follow_convolution,
    "aten.squeeze.dim": _follow_squeeze,
    "aten.squeeze.dims": _follow_squeeze,
    "aten.stack.default": _follow_stack,
    "aten.max_pool2d_with_indices.default": _follow_pooling,
}
# Rules for ops of several tensors of which one is a summand on every rank.
SUM_RULES: Mapping[str, Callable[..., Followed | Refused]] = {
    "aten.add.Tensor": _follow_addition,
    "aten.add_.Tensor": _follow_addition,
    "aten.addmm.default": _follow_addmm,
    "aten.convolution.default": _follow_convolution,
}
