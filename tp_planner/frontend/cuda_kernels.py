"""Which kernels CUDA would run where the CPU runs others, in calls on fake CPU tensors.

Backward on fake CUDA tensors needs a device, so plans for CUDA are made on fake CPU tensors, and CUDA's ops are called
in place of the CPU's. They differ in what they keep for the backward pass and in what they work on for a moment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import autograd
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from tp_planner.frontend.cuda_branches import branches_of_cuda
from tp_planner.ir.layout import DeviceType
from tp_planner.patches import wrapped

Attention = Literal["flash", "efficient", "math"]

_LARGEST_FLASH_HEAD = 256
_FLASH_HEAD_MULTIPLE = 8  # heads of other sizes are padded
_BIAS_MULTIPLE = 8  # elements at whose multiples the rows of a bias begin; others are copied


@contextlib.contextmanager
def kernels_of(device: DeviceType) -> Iterator[None]:
    """Inside, fake CPU tensors meet the kernels of ``device``."""
    if device == "cpu":
        yield
        return
    mode = CudaKernels()

    def with_mode(run: Callable[..., Any]) -> Callable[..., Any]:
        def run_with_mode(*args: Any, **kwargs: Any) -> Any:
            with mode:
                return run(*args, **kwargs)

        return run_with_mode

    why = "a mode is off inside of torch functions, and backward is one, in which layers may run again"
    with mode, branches_of_cuda(_takes_flash), wrapped(autograd, "_engine_run_backward", with_mode, why):
        yield


class CudaKernels(TorchFunctionMode):
    """Runs CUDA's attention, dropout and norms on fake CPU tensors.

    A mode, and not a patch of ``torch.nn.functional``: functions are known by the names that layers call them by, in
    plans and when they run, and code may have imported this one by its own name.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kernel = _KERNELS.get(func)
        if kernel is not None and isinstance(args[0] if args else next(iter(kwargs.values())), FakeTensor):
            return kernel(*args, **kwargs)
        return func(*args, **kwargs)


def choose_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Attention:
    """Return the kernel that ``scaled_dot_product_attention`` takes on devices of compute capability 8.0 and above.

    The first that can is taken of flash, memory-efficient and math
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html, conditions as
    ``torch.backends.cuda.can_use_flash_attention(params, debug=True)`` and its sibling report them). Devices on which
    torch prefers cuDNN's, and Keras does not ask for flash, keep an output and a sum per query and head as flash does.

    Args:
        query: (B, H, T, D); ``key`` (B, G, S, D), ``value`` (B, G, S, V).
        key: see ``query``.
        value: see ``query``.
        attn_mask: broadcastable to (B, H, T, S).
        is_causal: whether queries see earlier keys only.
        enable_gqa: whether there may be fewer heads of keys than of queries.
    """
    tensors = (query, key, value)
    half = query.dtype in (torch.float16, torch.bfloat16)
    size = query.shape[-1]
    if any(each.dim() != 4 or 0 in each.shape or each.stride(-1) != 1 for each in tensors):
        return "math"
    same_batch = query.shape[0] == key.shape[0] == value.shape[0]
    same_heads = query.shape[1] == key.shape[1] == value.shape[1]
    same_sizes = size == key.shape[-1] == value.shape[-1]
    square = not is_causal or query.shape[2] == key.shape[2]
    grouped = enable_gqa and key.shape[1] == value.shape[1] and query.shape[1] % key.shape[1] == 0
    fits_flash = same_sizes and square and size <= _LARGEST_FLASH_HEAD
    if half and attn_mask is None and same_batch and (same_heads or grouped) and fits_flash:
        return "flash"
    multiple = 8 if half else 4  # 16 bytes
    aligned = size % multiple == 0 and value.shape[-1] % multiple == 0 and size == key.shape[-1]
    if (half or query.dtype == torch.float32) and same_batch and same_heads and aligned:
        return "efficient"
    return "math"


def _takes_flash(query: Any, key: Any, value: Any, mask: Any, is_causal: bool) -> bool:
    return choose_attention(query, key, value, mask, is_causal) == "flash"


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    match choose_attention(query, key, value, attn_mask, is_causal, enable_gqa):
        case "flash":
            made = _flash(query, key, value, dropout_p, is_causal, scale)
        case "efficient":
            tensors = (query, key, value)
            keeps = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
            bias = None if attn_mask is None else _as_bias(attn_mask, query.dtype)
            made, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
                *tensors, bias, keeps, dropout_p, is_causal, scale=scale
            )
        case "math":
            made, *_ = torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
            )
    attended: torch.Tensor = made
    return attended


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, is_causal: bool, scale: float | None
) -> torch.Tensor:
    size = query.shape[-1]
    scale = size**-0.5 if scale is None else scale
    more = -size % _FLASH_HEAD_MULTIPLE
    tensors = [pad(each, (0, more)) if more else each for each in (query, key, value)]
    made: torch.Tensor
    made, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*tensors, dropout_p, is_causal, False, scale=scale)
    return made[..., :size] if more else made


def _as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to the products, in the dtype of the query, its rows aligned.

    CUDA's is a view of it in the shape of the products, which takes no memory, and is not made here: a mask for all
    heads has no heads to shard. That of a bias which is trained has a gradient in that shape, which is not counted.
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))
    bias = mask.to(dtype)
    *outer, inner = bias.stride()
    if inner == 1 and not any(stride % _BIAS_MULTIPLE for stride in outer):
        return bias
    size = bias.shape[-1]
    return pad(bias, (0, _BIAS_MULTIPLE - size % _BIAS_MULTIPLE))[..., :size]


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Return what is left by CUDA's kernel, which keeps a byte of each element where the CPU keeps a number."""
    if not training or inplace or not 0 < p < 1:
        return torch.nn.functional.dropout(input, p, training, inplace)
    made: torch.Tensor
    made, _ = torch.native_dropout(input, p, training)
    return made


def _rms_norm(
    input: torch.Tensor, normalized_shape: Any, weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """Return what CUDA's fused norm makes, which keeps its input and a number of each row.

    The CPU has it as a dozen ops, and no other op for it: a layer norm keeps the same, and a second number of each row.
    """
    if not input.is_floating_point() or (weight is not None and weight.dtype != input.dtype):
        return torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)
    made: torch.Tensor
    made, *_ = torch.native_layer_norm(input, normalized_shape, weight, None, eps or torch.finfo(input.dtype).eps)
    return made


_KERNELS: dict[Any, Callable[..., torch.Tensor]] = {
    torch.nn.functional.scaled_dot_product_attention: _attention,
    torch.nn.functional.dropout: _dropout,
    torch.nn.functional.rms_norm: _rms_norm,
}
