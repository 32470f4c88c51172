"""A layout as plain data: ordered rules from path patterns to mesh axes per dim."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from tp_planner.ir.mesh import Mesh

DeviceType = Literal["cpu", "cuda"]
Zero = Literal[0, 1, 3]  # the stages of ZeRO (https://arxiv.org/abs/1910.02054) that there are, 0 for none

AxisSpec = str | None | tuple[str, ...]

_compiled = lru_cache(maxsize=2**14)(re.compile)  # Python's own cache is too small for a long layout


@lru_cache(maxsize=2**16)  # a plan asks half a dozen times, and patterns that begin with .* take as long as a small op
def _matches(pattern: str, path: str) -> bool:
    return _compiled(pattern).fullmatch(path) is not None


BATCH = "batch"  # what Keras calls an axis over which the batch is split, where nobody gives it a name


@dataclass(frozen=True, slots=True)
class LayoutRule:
    """One rule: paths that fully match ``pattern`` are sharded as ``axes`` says, one entry per dim."""

    pattern: str
    axes: tuple[AxisSpec, ...]

    @property
    def axis_names(self) -> tuple[str, ...]:
        """The mesh axes that the rule names, in order, one that it names twice twice."""
        entries = [entry if isinstance(entry, tuple) else (entry,) for entry in self.axes]
        return tuple(axis for entry in entries for axis in entry if axis is not None)

    def matches(self, path: str) -> bool:
        """Whether the rule's pattern is the path, or matches it as a whole, as Keras asks."""
        return path == self.pattern or _matches(self.pattern, path)

    def __str__(self) -> str:
        return f"{self.pattern!r} -> ({', '.join(str(axis) for axis in self.axes)})"


@dataclass(frozen=True, slots=True)
class Layout:
    """The rules of a LayoutMap or a layout file, in order, and the mesh they name.

    Where the mesh does not say over which axis the batch is split, the rules do: they name the one of the layers.
    ``devices`` is what the devices of the mesh are, where that is said. With ``sequence_parallel`` tensors between
    regions are shards of the sequence; what is gathered from them for a region is not kept for the backward pass but
    gathered again there, if ``gather_again``. What replicas store in parts is gathered so many gathers ahead.
    ``zero`` says what replicas store in parts beside that: 1 an optimizer's slots, 3 weights too.
    """

    mesh: Mesh
    rules: tuple[LayoutRule, ...]
    devices: DeviceType | None = None
    sequence_parallel: bool = False
    gather_again: bool = True
    gathers_ahead: int = 1
    zero: Zero = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mesh", self.mesh.across(self._axis_left_to_the_batch()))

    def across(self, batch_axis: str | None) -> Layout:
        """Return the layout with the batch split over ``batch_axis`` where it is named.

        Raises PlanError if the mesh has no such axis.
        """
        return replace(self, mesh=self.mesh.across(batch_axis))

    def _axis_left_to_the_batch(self) -> str | None:
        """Return the axis over which the batch is split where nobody says it; None for the mesh's own choice.

        Of several axes larger than 1 it is the one called "batch", else the only one that no rule names. An axis that
        is alone larger than 1 is the batch's if rules name others and not this one, or if it is called "batch".
        """
        mesh = self.mesh
        if mesh.split is not None or len(mesh.axes) == 1:
            return mesh.split
        named = {axis for rule in self.rules for axis in rule.axis_names if axis in mesh.names}
        wide = [name for name, size in mesh.axes if size > 1]
        free = [name for name in wide if name not in named]
        if BATCH in wide and (len(wide) > 1 or named - {BATCH}):
            return BATCH
        return free[0] if len(free) == 1 and (len(wide) > 1 or named) else None
