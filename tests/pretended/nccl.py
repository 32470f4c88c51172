"""NCCL's rules, over gloo: a process group that says of what it is given what NCCL would not take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tests.pretended.reports import report
from tests.pretended.storages import said

DTYPES = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
}  # fmt: skip


class NcclRules(dist.ProcessGroup):
    """Passes everything on to gloo, and reports what NCCL refuses."""

    def __init__(self, gloo: Any, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._gloo = gloo

    def getBackendName(self) -> str:
        return "nccl"

    def _get_backend(self, device: torch.device) -> NcclRules:
        """Return what torch asks since 2.14 whether it takes sends and receives together; it does not."""
        return self

    @property
    def group_name(self) -> str:
        name: str = dist.distributed_c10d._world.pg_names[self]
        return name

    def _checked(self, what: str, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            if said(tensor) is False:  # nothing is said of buffers that torch makes itself, on the input's device
                report(f"NCCL: {what} is given a tensor of the host, {tuple(tensor.shape)} {tensor.dtype}")
            if tensor.dtype not in DTYPES:
                report(f"NCCL: {what} has no type for {tensor.dtype}")
            if not tensor.is_contiguous():
                report(f"NCCL: {what} is given a tensor that is not contiguous")

    def _of_one_size(self, what: str, tensors: Sequence[torch.Tensor]) -> None:
        if len({tensor.numel() for tensor in tensors}) > 1:
            report(f"NCCL: {what} of unequal sizes: {[tuple(tensor.shape) for tensor in tensors]}")

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        self._checked("all_reduce", *tensors)
        return self._gloo.allreduce(tensors, *([] if opts is None else [opts]))

    def broadcast(self, tensors: Any, opts: Any = None) -> Any:
        self._checked("broadcast", *tensors)
        return self._gloo.broadcast(tensors, *([] if opts is None else [opts]))

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        self._checked("all_gather", *inputs, *(each for one in outputs for each in one))
        for one, given in zip(outputs, inputs, strict=True):
            self._of_one_size("all_gather", [given, *one])
        return self._gloo.allgather(outputs, inputs, *([] if opts is None else [opts]))

    def all_gather_single(self, output: Any, given: Any, opts: Any = None) -> Any:
        self._checked("all_gather", output, given)
        if output.numel() != given.numel() * self.size():
            report(f"NCCL: all_gather of {tuple(given.shape)} into {tuple(output.shape)}")
        return self._gloo._allgather_base(output, given, *([] if opts is None else [opts]))

    def reduce_scatter_single(self, output: Any, given: Any, opts: Any = None) -> Any:
        self._checked("reduce_scatter", output, given)
        if given.numel() != output.numel() * self.size():
            report(f"NCCL: reduce_scatter of {tuple(given.shape)} into {tuple(output.shape)}")
        return self._gloo._reduce_scatter_base(output, given, *([] if opts is None else [opts]))

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return _last(self.all_gather_single(*pair) for pair in zip(outputs, inputs, strict=True))

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return _last(self.reduce_scatter_single(*pair, opts) for pair in zip(outputs, inputs, strict=True))

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        return self.allreduce(tensors, opts)

    # The names that torch had before 2.13.
    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def barrier(self, opts: Any = None) -> Any:
        return self._gloo.barrier(*([] if opts is None else [opts]))

    def send(self, tensors: Any, peer: int, tag: int) -> Any:
        self._checked("send", *tensors)
        return self._gloo.send(tensors, peer, tag)

    def recv(self, tensors: Any, peer: int, tag: int) -> Any:
        self._checked("recv", *tensors)
        return self._gloo.recv(tensors, peer, tag)


def _last(works: Iterable[Any]) -> Any:
    """Wait for all but the last, which stands for them."""
    *before, last = works
    for work in before:
        work.wait()
    return last


def create(store: Any, rank: int, size: int, timeout: Any) -> NcclRules:
    """Make the group for torch, which knows it as a backend."""
    return NcclRules(dist.ProcessGroupGloo(store, rank, size, timeout=timeout), rank, size)
