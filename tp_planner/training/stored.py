"""Stored: what every rank physically stores of a model, read from storages rather than metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import keras
import torch.distributed as dist

from tp_planner.frontend.layer_tree import named_variables
from tp_planner.job.rendezvous import exchange
from tp_planner.storage.variables import is_sharded, local_tensor
from tp_planner.training.model import applied_to


@dataclass(frozen=True, slots=True)
class StoredVariable:
    """One variable as one rank stores it. ``stored_bytes`` is the size of the storage behind the tensor."""

    key: str
    whole_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    stored_bytes: int
    device: str
    sharded: bool


@dataclass(frozen=True, slots=True)
class Verification:
    """What the ranks store. ``ranks`` has one tuple of variables for each rank, model and optimizer."""

    active: bool
    reason: str
    devices: tuple[str, ...]
    sharded: int
    replicated: int
    ranks: tuple[tuple[StoredVariable, ...], ...]

    def __str__(self) -> str:
        state = "ACTIVE" if self.active else f"NOT ACTIVE: {self.reason}"
        return (
            "[ModelParallel] Verification Summary:\n"
            f"  - Total devices: {len(self.devices)}\n"
            f"  - Sharded variables: {self.sharded}\n"
            f"  - Replicated variables: {self.replicated}\n"
            f"  - Model parallel is {state}"
        )


def verify_model_parallel(model: keras.Model) -> Verification:
    """Return, and print on rank 0, what every rank stores of the model; every rank has to call it.

    ``sharded`` and ``replicated`` count the model's own variables; ``ranks`` lists optimizer slots too.
    """
    stored = [_stored(key, variable) for key, variable in _variables(model).items()]
    ranks = _from_all_ranks(stored) if dist.is_initialized() else (tuple(stored),)
    model_keys = set(named_variables(model))
    own = [variable for variable in ranks[0] if variable.key in model_keys]
    sharded = sum(variable.sharded for variable in own)
    reason = _why_not(model, ranks, sharded)
    devices = tuple(f"{_device(rank)}" for rank in ranks)
    result = Verification(not reason, reason, devices, sharded, len(own) - sharded, ranks)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(result)
    return result


def _variables(model: keras.Model) -> dict[str, Any]:
    variables = dict(named_variables(model))
    if getattr(model, "optimizer", None) is not None:
        variables.update({f"optimizer/{variable.path}": variable for variable in model.optimizer.variables})
    return variables


def _stored(key: str, variable: Any) -> StoredVariable:
    local = local_tensor(variable)
    return StoredVariable(
        key=key,
        whole_shape=tuple(variable.shape),
        local_shape=tuple(local.shape),
        stored_bytes=local.untyped_storage().nbytes(),
        device=str(local.device),
        sharded=is_sharded(variable),
    )


def _from_all_ranks(stored: list[StoredVariable]) -> tuple[tuple[StoredVariable, ...], ...]:
    rows = [[v.key, v.whole_shape, v.local_shape, v.stored_bytes, v.device, v.sharded] for v in stored]
    return tuple(
        tuple(
            StoredVariable(key, tuple(whole), tuple(local), size, device, sharded)
            for key, whole, local, size, device, sharded in json.loads(text)
        )
        for text in exchange("verify_model_parallel", json.dumps(rows))
    )


def _device(rank: tuple[StoredVariable, ...]) -> str:
    return rank[0].device if rank else "no variables"


def _why_not(model: keras.Model, ranks: tuple[tuple[StoredVariable, ...], ...], sharded: int) -> str:
    if applied_to(model) is None:
        return "no plan is applied; call tp_planner.parallelize(model, layout_map)"
    if len(ranks) == 1:
        return "the mesh has one device"
    if not sharded:
        return "no variable is sharded; see the notes of the plan"
    for number, rank in enumerate(ranks):
        for variable in rank:
            if variable.sharded and variable.stored_bytes and variable.local_shape == variable.whole_shape:
                return f"rank {number} stores the whole of {variable.key!r}"
    return ""
