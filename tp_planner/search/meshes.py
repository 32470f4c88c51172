"""Search meshes: a layout for each way to share devices between replicas and the model axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import keras

from tp_planner.frontend.inputs import sized_inputs
from tp_planner.frontend.training_loss import TrainingLoss
from tp_planner.ir.errors import PlanError
from tp_planner.ir.found import FoundFigures
from tp_planner.ir.hardware import Figure, Hardware
from tp_planner.ir.mesh import Mesh
from tp_planner.search.find import search
from tp_planner.search.found import Found


@dataclass(frozen=True, slots=True)
class MeshTried:
    """A mesh, and what was found for it; else why nothing was."""

    mesh: Mesh
    found: Found | None
    problem: str

    @property
    def figures(self) -> FoundFigures | None:
        """What was found in figures."""
        return None if self.found is None else self.found.figures


def search_meshes(
    model: keras.Model,
    devices: int,
    devices_per_node: int | None,
    batch: int,
    hardware: Hardware,
    optimizer: keras.optimizers.Optimizer | None = None,
    loss: TrainingLoss | None = None,
    memory: float | None = None,
) -> tuple[MeshTried, ...]:
    """Return what is found on each mesh of so many devices, the shortest step first.

    Each mesh has replicas over the axis "batch", which share a batch of this size, and layers split over the axis
    "model", which lies within a node. What replicas send between nodes is priced by the links between them.

    Args:
        model: as for ``search``.
        devices: their number.
        devices_per_node: how many of them are on a node; None for as many as ``hardware`` says.
        batch: the size of the batch that all devices train on in one step.
        hardware: as for ``search``.
        optimizer: as for ``search``.
        loss: as for ``search``.
        memory: as for ``search``.
    """
    if devices_per_node is not None:
        hardware = replace(hardware, node_size=Figure(float(devices_per_node), "as asked"))
    meshes = _meshes(devices, int(hardware.node_size.value))
    tried = [_tried(model, mesh, batch, hardware, optimizer, loss, memory) for mesh in meshes]
    return tuple(sorted(tried, key=lambda each: (each.found is None, each.found.cost if each.found else 0.0)))


def _meshes(devices: int, devices_per_node: int) -> Iterator[Mesh]:
    for size in range(1, devices_per_node + 1):
        if devices % size == 0 and devices_per_node % size == 0:
            yield Mesh((("batch", devices // size), ("model", size)))


def _tried(
    model: keras.Model,
    mesh: Mesh,
    batch: int,
    hardware: Hardware,
    optimizer: keras.optimizers.Optimizer | None,
    loss: TrainingLoss | None,
    memory: float | None,
) -> MeshTried:
    replicas = mesh.axis_size("batch")
    if batch % replicas:
        return MeshTried(mesh, None, f"a batch of {batch} does not divide by {replicas} replicas")
    try:
        inputs = sized_inputs(model, batch // replicas)
        found = search(model, mesh.across("batch"), hardware, inputs, optimizer, loss, memory)
    except PlanError as error:
        return MeshTried(mesh, None, "; ".join(error.problems))
    return MeshTried(mesh, found, "")
