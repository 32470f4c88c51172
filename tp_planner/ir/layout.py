"""A layout as plain data: ordered rules from path patterns to mesh axes per dim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tp_planner.ir.mesh import Mesh

DeviceType = Literal["cpu", "cuda"]

AxisSpec = str | None | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayoutRule:
    """One rule: paths that fully match ``pattern`` are sharded as ``axes`` says, one entry per dim."""

    pattern: str
    axes: tuple[AxisSpec, ...]

    def __str__(self) -> str:
        return f"{self.pattern!r} -> ({', '.join(str(axis) for axis in self.axes)})"


@dataclass(frozen=True, slots=True)
class Layout:
    """The rules of a LayoutMap or a layout file, in order, and the mesh they name.

    ``devices`` is what the devices of the mesh are, where that is said.
    """

    mesh: Mesh
    rules: tuple[LayoutRule, ...]
    devices: DeviceType | None = None
