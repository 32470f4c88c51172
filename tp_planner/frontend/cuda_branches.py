"""Which branches Keras's own code would take on CUDA devices, in calls on fake CPU tensors.

Keras on torch computes in float32 where the CPU had no kernels for float16, and copies what attention reads unless
flash attention takes it; layers of KerasHub call torch's fused attention on GPUs alone.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor

from tp_planner.frontend.keras_internals import nn, numpy
from tp_planner.patches import Patch, replaced, wrapped

_OF_GPUS = ("running_on_gpu", "gpu_supports_fused_attention_op")  # asked by layers of KerasHub, without arguments
_WHY = "what is planned for CUDA takes the branches that it takes there"


@contextlib.contextmanager
def branches_of_cuda(takes_flash: Callable[..., bool]) -> Iterator[None]:
    """Inside, Keras's code takes the branches of CUDA devices.

    Args:
        takes_flash: whether CUDA's flash attention takes a query, a key, a value and a mask, causal or not.
    """
    with contextlib.ExitStack() as stack:
        for patch in _patches(takes_flash):
            stack.enter_context(patch)
        yield


def _patches(takes_flash: Callable[..., bool]) -> Iterator[Patch]:
    for module in (nn, numpy):
        yield wrapped(module, "get_device", _as_if_on_cuda, _WHY)
    yield wrapped(nn, "_can_use_flash_attention", lambda plain: _choosing(plain, takes_flash), _WHY)
    for module in [each for name, each in sys.modules.items() if name.startswith("keras_hub.src.models.")]:
        for name in _OF_GPUS:
            if name in vars(module):
                yield replaced(module, name, lambda: True, _WHY)


class _AsIfOnCuda(str):
    """The name of the CPU, for torch; code that compares it takes it for that of a CUDA device."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other == "cuda"

    def __ne__(self, other: object) -> bool:
        return other != "cuda"

    __hash__ = str.__hash__


def _as_if_on_cuda(plain: Callable[[], Any]) -> Callable[[], Any]:
    def get_device() -> Any:
        device = plain()
        return _AsIfOnCuda(device) if device == "cpu" else device

    return get_device


def _choosing(plain: Callable[..., bool], takes_flash: Callable[..., bool]) -> Callable[..., bool]:
    def can_use_flash_attention(
        query: Any, key: Any, value: Any, mask: Any = None, is_causal: bool = False, raise_error: bool = False
    ) -> bool:
        if not isinstance(query, FakeTensor):
            return plain(query, key, value, mask, is_causal, raise_error)
        return takes_flash(query, key, value, mask, is_causal)

    return can_use_flash_attention
