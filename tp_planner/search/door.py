"""``find_layout``: the search as users call it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import keras

from tp_planner.frontend.hardware_file import find_hardware_file, read_hardware_file
from tp_planner.frontend.layout_map import read_device_mesh
from tp_planner.frontend.optimizer import read_optimizer
from tp_planner.frontend.training_loss import TrainingLoss
from tp_planner.ir.errors import PlanError
from tp_planner.ir.hardware import Hardware
from tp_planner.ir.mesh import Mesh, parse_mesh
from tp_planner.search.find import search
from tp_planner.search.found import Found

HARDWARE = "h100"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", re.IGNORECASE)


def find_layout(
    model: keras.Model,
    mesh: Mesh | keras.distribution.DeviceMesh | str,
    inputs: Any = None,
    optimizer: str | keras.optimizers.Optimizer | None = None,
    loss: Any = None,
    hardware: Hardware | str | Path = HARDWARE,
    memory: float | str | None = None,
) -> Found:
    """Return the layout of ``model`` whose training step is estimated to take the least time, with its plan.

    The search is exact: an integer program over all layouts that shard any dims that divide, equal blocks alike, solved
    with a bound on what a better one could take. Its costs are those of the planner's own boundaries and of the ops on
    shards. Needs no device and changes nothing.

    Args:
        model: as for ``plan``.
        mesh: the mesh, also written as ``"model=8"``. Variables are sharded over its model axis.
        inputs: as for ``plan``. What is best depends on the batch: give one of the size you train with.
        optimizer: as for ``plan``.
        loss: as for ``plan``.
        hardware: a profile, its file, or the name of one: a100, cpu, h100, h200.
        memory: bytes that a rank may hold at its peak, also written as ``"80GB"``; by default they do not count.

    Raises:
        PlanError: if the model cannot be planned, or no layout that was planned fits the memory.

    >>> found = tp_planner.find_layout(model, "model=8", inputs)  # doctest: +SKIP
    >>> print(found.toml, found.gap)  # doctest: +SKIP
    """
    profile = hardware if isinstance(hardware, Hardware) else read_hardware_file(find_hardware_file(hardware))
    return search(
        model,
        _mesh(mesh),
        profile,
        inputs,
        read_optimizer(optimizer, model),
        TrainingLoss.of(model, loss),
        None if memory is None else read_memory(memory),
    )


def _mesh(mesh: Mesh | keras.distribution.DeviceMesh | str) -> Mesh:
    if isinstance(mesh, str):
        return parse_mesh(mesh)
    return mesh if isinstance(mesh, Mesh) else read_device_mesh(mesh)


def read_memory(memory: float | str) -> float:
    """Return bytes.

    Raises PlanError for what is no size.

    >>> read_memory("80GB"), read_memory("16 GiB"), read_memory(1000)
    (80000000000.0, 17179869184.0, 1000.0)
    """
    match = _MEMORY.fullmatch(str(memory).strip())
    if match is None:
        raise PlanError(f"memory is {memory!r}; write a number of bytes, or for example '80GB' or '16GiB'")
    return float(match[1]) * _UNITS[match[2].lower()]
