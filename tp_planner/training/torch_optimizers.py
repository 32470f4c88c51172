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

from tp_planner.storage.forwarding import current
from tp_planner.storage.log import logger
from tp_planner.storage.variables import local_tensor

# Those that have updated sharded parameters; in the order of their first such step, which is that of all ranks.
_known: weakref.WeakKeyDictionary[torch.optim.Optimizer, None] = weakref.WeakKeyDictionary()


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
                _known[optimizer] = None
                _cut_as(parameter, optimizer.state.get(parameter, {}))
        _update_one_by_one(group)


def _update_one_by_one(group: dict[str, Any]) -> None:
    """Let parameters of different kinds be updated one after the other: torch's ops on lists take one kind only."""
    meshes = {parameter.device_mesh if isinstance(parameter, DTensor) else None for parameter in group["params"]}
    for name in ("foreach", "fused"):
        if len(meshes) > 1 and group.get(name):
            logger.warning("[ModelParallel] a torch optimizer cannot be %s for sharded and other parameters", name)
            group[name] = False


def _cut_as(parameter: DTensor, state: dict[str, Any]) -> None:
    """Cut what is remembered of a parameter, and as large as it, as the parameter is cut."""
    spec = parameter._spec
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape != parameter.shape:
            continue
        if isinstance(value, DTensor):
            if value._spec.mesh == spec.mesh and value._spec.placements == spec.placements:
                continue
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
                whole = {name: value.full_tensor() for name, value in state.items() if isinstance(value, DTensor)}
                state.update(whole)
