"""Optimizers of torch's: they update what variables hold now, and what they remember of a tensor is cut as it is.

An optimizer may have been made, and have taken steps, before the model was sharded or restored.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tp_planner.ir.errors import PlanError
from tp_planner.storage.forwarding import current
from tp_planner.storage.log import logger
from tp_planner.storage.sharding import Sharding
from tp_planner.storage.variables import local_tensor, sharded_parameter, stored_in_parts
from tp_planner.training.averaging import require_averaged_in
from tp_planner.training.shares import share_their_updates

# Those that have updated sharded parameters; in the order of their first such step, which is that of all ranks.
# With how those were cut that then were stored in parts, by the parameters' ids.
_known: weakref.WeakKeyDictionary[torch.optim.Optimizer, dict[int, Sharding | None]] = weakref.WeakKeyDictionary()


@functools.cache
def follow_parameters() -> None:
    """Let any torch optimizer look, before each step, at what its parameters have become."""
    register_optimizer_step_pre_hook(_look_at_parameters)


def _look_at_parameters(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        held = group["params"]
        for place, former in enumerate(held):
            parameter = held[place] = current(former)
            if parameter is not former and former in optimizer.state:
                optimizer.state[parameter] = optimizer.state.pop(former)
            if isinstance(parameter, DTensor):
                seen, in_parts = _known.setdefault(optimizer, {}), stored_in_parts(parameter)
                _cut_as(parameter, optimizer.state.get(parameter, {}), in_parts)
                seen[id(parameter)] = in_parts
        _update_one_by_one(group)
    updated = [each for group in optimizer.param_groups for each in group["params"]]
    require_averaged_in(updated)
    if share_their_updates(updated):
        raise PlanError(
            f"torch's {type(optimizer).__name__} updates whole parameters, and of these, planned with zero=1, each "
            f"replica has a part of the gradient; train with a Keras optimizer, optimizer.apply(gradients, variables), "
            f"or plan with zero=0"
        )


def _update_one_by_one(group: dict[str, Any]) -> None:
    """Let parameters of different kinds be updated one after the other: torch's ops on lists take one kind only."""
    meshes = {parameter.device_mesh if isinstance(parameter, DTensor) else None for parameter in group["params"]}
    for name in ("foreach", "fused"):
        if len(meshes) > 1 and group.get(name):
            logger.warning("[ModelParallel] a torch optimizer cannot be %s for sharded and other parameters", name)
            group[name] = False


def _cut_as(parameter: DTensor, state: dict[str, Any], sharding: Sharding | None) -> None:
    """Cut what is remembered of a parameter, and as large as it, as the parameter is cut.

    ``sharding`` is given if the parameter is stored in parts, so that its order is another.
    """
    spec = parameter._spec
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape != parameter.shape:
            continue
        if isinstance(value, DTensor) and value._spec.mesh == spec.mesh and value._spec.placements == spec.placements:
            continue
        if sharding is not None:
            with torch.no_grad():
                local = sharding.own(value.full_tensor() if isinstance(value, DTensor) else value).clone()
                state[name] = sharded_parameter(local, tuple(value.shape), sharding, requires_grad=False).detach()
            continue
        if isinstance(value, DTensor):
            value = value.full_tensor()
        with torch.no_grad():
            state[name] = distribute_tensor(value, spec.mesh, spec.placements, src_data_rank=None).clone()


def gather_states(variables: Iterable[Any]) -> None:
    """Make whole what torch's optimizers remember of sharded variables; every rank has to call it."""
    gc.collect()  # the same optimizers are alive on all ranks
    devices = {id(variable._value): local_tensor(variable).device for variable in variables}
    for optimizer in list(_known):
        for parameter in [each for group in optimizer.param_groups for each in group["params"]]:
            if id(parameter) in devices:
                state = optimizer.state.get(parameter, {})
                shards = {name: value for name, value in state.items() if isinstance(value, DTensor)}
                whole = {name: _whole(value, stored_in_parts(parameter)) for name, value in shards.items()}
                state.update(whole)


def _whole(value: DTensor, sharding: Sharding | None) -> torch.Tensor:
    if sharding is None:
        whole: torch.Tensor = value.full_tensor()
        return whole
    with torch.no_grad():
        return sharding.whole(value._local_tensor, tuple(value.shape))
