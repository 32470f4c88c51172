"""Answers: what Python is told of a tensor's device, and where tensors come to be that Python asks for.

A torch-function mode, so it sees what code asks of torch, and not what torch's own kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tests.pretended.reports import report, waits
from tests.pretended.storages import on_device, plain, said, say, tensors_in

CPU = torch.device("cpu")
_ATTRIBUTES: dict[Any, Callable[[Any], Any]] = {}  # filled below: descriptor's getter -> answer of a device tensor
_TO_HOST = {"numpy", "__array__", "__dlpack__"}
# What makes tensors of Python's values. On the host, unless a device is named.
_FACTORIES = {
    "tensor", "as_tensor", "asarray", "from_numpy", "zeros", "ones", "empty", "full", "rand", "randn", "randint",
    "randperm", "arange", "eye", "linspace", "normal", "bernoulli", "tril_indices", "triu_indices", "empty_strided",
}  # fmt: skip
_OF_VALUES = {"tensor", "as_tensor", "asarray"}  # copied from the host, which waits for it
current_device = [0]


def is_faking() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def type_of(device: Any) -> str | None:
    """Return "cuda", "cpu" or "meta" for what names a device, None for anything else."""
    if isinstance(device, torch.device):
        return device.type
    if isinstance(device, str) and device.partition(":")[0] in ("cuda", "cpu", "meta"):
        return device.partition(":")[0]
    return None


class Answers(TorchFunctionMode):
    """Answers questions for devices, and makes tensors where they are asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func in _ATTRIBUTES and on_device(args[0]):
            return _ATTRIBUTES[func](args[0])
        if is_faking():
            return func(*args, **kwargs)
        if name in _TO_HOST and on_device(args[0]):
            report(f"Tensor.{name} of a tensor on the device")
        if name == "tolist" and on_device(args[0]):
            waits("a list of a tensor's values")
        if name == "new_tensor" and on_device(args[0]):
            waits("new_tensor of values of the host")
        if name == "pin_memory":  # memory of the host
            return args[0].clone()
        if name == "get_device" and on_device(args[0]):
            return current_device[0]
        if name in ("to", "cuda", "cpu") and args and isinstance(args[0], torch.Tensor):
            return _moved(name, args[0], args[1:], kwargs)
        return _made(func, name, args, kwargs)


def _moved(name: str, tensor: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
    """``Tensor.to`` and its like: another storage where the device changes, as with real devices."""
    wanted, args = _destination(name, args, kwargs)
    before = on_device(tensor)
    if wanted is not None and wanted != before and plain(tensor) is not None and not kwargs.get("non_blocking"):
        waits(f"Tensor.{name} {'to' if wanted else 'from'} the device")
    moved = torch.Tensor.to(tensor, *args, **kwargs)
    source, result = plain(tensor), plain(moved)
    if wanted is None or source is None or result is None:
        if wanted is not None:
            say(moved, wanted)
        return moved
    with torch._C.DisableTorchFunction():
        shared = result.untyped_storage()._cdata == source.untyped_storage()._cdata
    if shared and before != wanted:
        moved = moved.clone()
    if not shared or before != wanted:
        say(moved, wanted)
    return moved


def _destination(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[bool | None, Any]:
    """Return whether a move goes to the device (None: neither there nor to the host), and its arguments for the CPU."""
    if name != "to":
        return name == "cuda", (CPU,)
    if args and isinstance(args[0], torch.Tensor):  # as the other is
        other = args[0]
        return on_device(other), (CPU if not other.is_meta else torch.device("meta"), other.dtype, *args[1:])
    places = [type_of(each) for each in (*args[:1], kwargs.get("device"))]
    asked = next((each for each in places if each is not None), None)
    if asked == "cuda":
        args = (CPU, *args[1:]) if places[0] else args
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
    return (None if asked is None or asked == "meta" else asked == "cuda"), args


def _made(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """What else Python calls: a tensor is made where ``device`` says, or on the host, or where its arguments are."""
    device = kwargs.get("device")
    asked = "cuda" if isinstance(device, int) and not isinstance(device, bool) else type_of(device)
    if asked == "cuda":
        kwargs["device"] = CPU
        if name in _OF_VALUES and not on_device(args[0]):
            waits(f"{name} of values of the host")
    args = tuple(CPU if isinstance(each, torch.device) and each.type == "cuda" else each for each in args)
    made = func(*args, **kwargs)
    if asked == "cuda":
        say(made, True)
    elif asked == "cpu" and (name.endswith("_like") or name.startswith("new_")):
        say(made, False)
    elif name in _FACTORIES and (asked == "cpu" or not any(isinstance(each, torch.Tensor) for each in args)):
        for tensor in tensors_in(made):
            if said(tensor) is None:
                say(tensor, False)
    return made


_ATTRIBUTES[torch.Tensor.device.__get__] = lambda tensor: torch.device("cuda", current_device[0])  # type: ignore[attr-defined]
_ATTRIBUTES[torch.Tensor.is_cuda.__get__] = lambda tensor: True  # type: ignore[attr-defined]
_ATTRIBUTES[torch.Tensor.is_cpu.__get__] = lambda tensor: False  # type: ignore[attr-defined]
