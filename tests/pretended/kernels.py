"""Kernels: tensors of the host and of the device must not meet in one, but where torch lets them.

A dispatch mode, so it sees every op, whoever calls it; what an op makes is where its arguments are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretended.answers import CPU, is_faking, type_of
from tests.pretended.reports import report, waits
from tests.pretended.storages import said, say, tensors_in

# Ops that copy between devices, or take indices and scalars of the host.
MAY_MIX = {
    "copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_", "set_", "_local_scalar_dense",
    "_pin_memory",
}  # fmt: skip
# Ops for whose result's size, or value, the host waits.
WAITED_FOR = {"nonzero", "masked_select", "equal", "_unique2", "unique_consecutive", "unique_dim", "bincount"}
_GATHER = torch.ops._c10d_functional.all_gather_into_tensor_out.default


class Kernels(TorchDispatchMode):
    """Reports ops of tensors on two devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(issubclass(each, DTensor | AsyncCollectiveTensor) for each in types):
            return NotImplemented
        if is_faking() or any(issubclass(each, FakeTensor) for each in types):
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        given = tensors_in(args, kwargs)
        # What an op makes of no marked tensor, a constant of torch's own, is nowhere yet.
        marks = {said(tensor) for tensor in given if tensor.dim() or said(tensor)}
        if func.namespace == "_c10d_functional":  # which may copy what it is given before NCCL sees it
            for tensor in given:
                if said(tensor) is False:
                    report(f"NCCL: {name} is given a tensor of the host, {tuple(tensor.shape)} {tensor.dtype}")
        elif {True, False} <= marks and name not in MAY_MIX and func.namespace != "c10d":
            shapes = [f"{'cuda' if said(each) else 'cpu'} {tuple(each.shape)}" for each in given]
            report(f"{func} of tensors on two devices: {', '.join(shapes)}")
        if why := _waits(name, args, kwargs, given, marks):
            waits(why)
        asked = type_of(kwargs.get("device")) == "cuda"  # torch's own code is told the true device, and names that
        if asked:
            kwargs["device"] = CPU
        made = _gathered(*args, **kwargs) if func is _GATHER else func(*args, **kwargs)
        where = True if asked else _where(name, given, marks)
        if where is not None:
            for tensor in tensors_in(made):
                if where or said(tensor) is None:
                    say(tensor, where)
        return made


def _gathered(part: torch.Tensor, size: int, group: str, out: torch.Tensor) -> torch.Tensor:
    """Gather by the op that asks Python's groups; the one that takes its output passes them by."""
    functional = torch.ops._c10d_functional
    return out.copy_(functional.wait_tensor(functional.all_gather_into_tensor(part, size, group)))


def _waits(name: str, args: Any, kwargs: Any, given: list[torch.Tensor], marks: set[bool | None]) -> str:
    """Return for what the host waits in an op, "" if it does not."""
    if name == "_local_scalar_dense" and said(given[0]):
        return "a value of a tensor"
    if name in WAITED_FOR and True in marks:
        return f"what {name} finds"
    if name in ("index", "index_put", "index_put_") and any(
        each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
    ):
        return "places of a mask"
    if name == "copy_" and {True, False} <= marks and not any(each is True for each in (*args[2:], *kwargs.values())):
        return "a copy between the host and the device"
    return ""


def _where(name: str, given: list[torch.Tensor], marks: set[bool | None]) -> bool | None:
    """Return where an op's results are: on the device if an argument is; of ops that mix, where the first is."""
    if name in MAY_MIX:
        return said(given[0]) if given else None
    return True if True in marks else (False if False in marks else None)
