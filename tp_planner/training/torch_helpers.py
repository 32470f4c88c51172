"""Helpers of torch's on the gradients and parameters of a parallel model, which are DTensors and plain tensors at once.

torch has no op for both. Norms and clipping work on what each rank stores; a norm is that of the whole gradients. One
vector of all parameters would be the whole model on every rank, so that is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad, convert_parameters

from tp_planner.ir.errors import PlanError
from tp_planner.job.axes import Axes
from tp_planner.patches import wrap_for_good
from tp_planner.regions.calls import standing_at
from tp_planner.storage.forwarding import current
from tp_planner.storage.unequal_parts import is_in_unequal_parts
from tp_planner.training.averaging import require_averaged_gradients
from tp_planner.training.optimizer import CLIPPING

_meshes: set[DeviceMesh] = set()  # those of parallel models: DTensors of others are none of ours


def help_with_parameters_of(axes: Axes) -> None:
    """Let torch's helpers work with parameters on these axes."""
    _meshes.update({axes.mesh, *(axis.mesh for axis in axes.all)})
    why = "gradients of parallel models are DTensors and plain tensors"
    for module, name, wrapper in HELPERS:
        wrap_for_good(module, name, wrapper, why)


def _is_ours(tensor: Any) -> bool:
    return isinstance(tensor, DTensor) and (tensor.device_mesh in _meshes or is_in_unequal_parts(tensor))


def _total_norm(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the norm of tensors of which some are in shards, as on one device: of the norms of all."""

    @functools.wraps(plain)
    def total_norm(tensors: Any, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        require_averaged_gradients(tensors)
        if any(map(_is_ours, tensors)):
            tensors = _norms(tensors, float(norm_type))
        return plain(tensors, norm_type, *args, **kwargs)

    return total_norm


def _norms(tensors: Sequence[torch.Tensor], order: float) -> list[torch.Tensor]:
    """Return the norm of each tensor, plain; those of one placement are summed over the ranks at once."""
    norms = [torch.linalg.vector_norm(_stored(each), order) for each in tensors]
    alike: dict[Any, list[int]] = {}
    for number, each in enumerate(tensors):
        if isinstance(each, DTensor):
            cut = tuple(dim for dim, placement in enumerate(each.placements) if not placement.is_replicate())
            alike.setdefault((each.device_mesh, cut, norms[number].dtype), []).append(number)
    for (mesh, cut, _), numbers in alike.items():
        whole = _over_ranks(torch.stack([norms[number] for number in numbers]), order, mesh, cut)
        for number, norm in zip(numbers, whole, strict=True):
            norms[number] = norm
    return norms


def _over_ranks(norms: torch.Tensor, order: float, mesh: DeviceMesh, dims: Iterable[int]) -> torch.Tensor:
    """Return the norms of whole tensors, given those of a rank's shards."""
    largest = abs(order) == float("inf")
    reduction = "sum" if not largest else "max" if order > 0 else "min"
    powers = norms if largest or order == 0 else norms**order
    for dim in dims:
        with standing_at(CLIPPING):
            powers = functional.wait_tensor(functional.all_reduce(powers, reduction, (mesh, dim)))
    return powers if largest or order == 0 else powers ** (1 / order)


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True, slots=True)
class _Stored:
    """What a helper takes for a parameter of which it only asks the gradient: that which this rank stores."""

    grad: torch.Tensor


def _on_what_is_stored(plain: Callable[..., None]) -> Callable[..., None]:
    """Return a helper that changes gradients in place, element by element, working on this rank's shards."""

    @functools.wraps(plain)
    def change(parameters: Any, *args: Any, **kwargs: Any) -> None:
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        gradients = [each.grad for each in parameters if each.grad is not None]
        require_averaged_gradients(gradients)
        if any(map(_is_ours, gradients)):
            parameters = [_Stored(_stored(each)) for each in gradients]
        return plain(parameters, *args, **kwargs)

    return change


def _in_one_vector(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a helper that takes parameters, which refuses those in shards before it changes any."""
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def convert(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.arguments["parameters"] = parameters = list(call.arguments["parameters"])
        for each in parameters:
            _refuse_vector(each)
        return plain(*call.args, **call.kwargs)

    return convert


def _checked_for_vector(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch's check of each parameter, for those who have imported the helpers before."""

    @functools.wraps(plain)
    def check_param_device(param: Any, *args: Any) -> Any:
        _refuse_vector(param)
        return plain(param, *args)

    return check_param_device


def _refuse_vector(parameter: Any) -> None:
    if _is_ours(current(parameter)):
        raise PlanError(
            f"a parameter of shape {tuple(parameter.shape)} is stored in shards; one vector of all parameters would be "
            f"the whole model on every rank, and is not made by torch's parameters_to_vector nor read by "
            f"vector_to_parameters; call tp_planner.restore(model) first on all ranks"
        )


# torch's package has two of them under other names.
HELPERS: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
    (clip_grad, "_get_total_norm", _total_norm),
    (torch.nn.utils, "get_total_norm", _total_norm),
    (clip_grad, "_clip_grads_with_norm_", _on_what_is_stored),
    (torch.nn.utils, "clip_grads_with_norm_", _on_what_is_stored),
    (clip_grad, "clip_grad_value_", _on_what_is_stored),
    (torch.nn.utils, "clip_grad_value_", _on_what_is_stored),
    (convert_parameters, "_check_param_device", _checked_for_vector),
    *((module, "parameters_to_vector", _in_one_vector) for module in (convert_parameters, torch.nn.utils)),
    *((module, "vector_to_parameters", _in_one_vector) for module in (convert_parameters, torch.nn.utils)),
)
