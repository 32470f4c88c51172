"""The mesh axes of a running job, as one of its processes sees them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Axis:
    """One mesh axis of a running job: its 1-D device mesh, and this process's place on it."""

    mesh: DeviceMesh
    name: str
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Axis:
        assert mesh.ndim == 1 and mesh.mesh_dim_names is not None
        return cls(mesh, mesh.mesh_dim_names[0], mesh.size(), mesh.get_local_rank())

    @functools.cached_property
    def group(self) -> str:
        """The name of the axis's process group."""
        name: str = self.mesh.get_group().group_name
        return name


@dataclass(frozen=True)
class Axes:
    """The axes of a running job. ``batch`` is None where there is one replica; ``mesh`` has the model axis first."""

    mesh: DeviceMesh
    model: Axis
    batch: Axis | None = None

    @property
    def all(self) -> tuple[Axis, ...]:
        return (self.model,) if self.batch is None else (self.model, self.batch)
