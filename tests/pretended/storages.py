"""Storages: which are said to be on the pretended device. All are on the CPU in truth.

The mark is on the storage, so that views and what shares it are on the same device, whoever made them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves


def plain(value: Any) -> torch.Tensor | None:
    """Return the tensor that holds memory: the local one of a DTensor; None for fake ones, and what is no tensor."""
    with torch._C.DisableTorchFunction():
        if isinstance(value, DTensor):
            value = value._local_tensor
        if isinstance(value, AsyncCollectiveTensor):
            value = value.elem
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or value.is_meta:
            return None
        return value


def tensors_in(*values: Any) -> list[torch.Tensor]:
    """Return the tensors with memory among nested values."""
    found = (plain(leaf) for leaf in tree_leaves(values))
    return [tensor for tensor in found if tensor is not None]


def said(tensor: torch.Tensor) -> bool | None:
    """Return whether the tensor is said to be on the device; None where nothing is said of it, as of a constant."""
    with torch._C.DisableTorchFunction():
        return getattr(tensor.untyped_storage(), "on_device", None)


def on_device(value: Any) -> bool:
    tensor = plain(value)
    return tensor is not None and said(tensor) is True


def say(value: Any, where: bool) -> None:
    """Say of all tensors in a value that they are on the device, or on the host."""
    for tensor in tensors_in(value):
        with torch._C.DisableTorchFunction():
            tensor.untyped_storage().on_device = where  # type: ignore[attr-defined]
