"""The device mesh as plain data: named axes and their sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tp_planner.ir.errors import PlanError


@dataclass(frozen=True, slots=True)
class Mesh:
    """Named mesh axes with their sizes, in order, e.g. ``Mesh((("batch", 1), ("model", 8)))``."""

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        problems = []
        if not self.axes:
            problems.append("a mesh needs at least one axis; write for example model=8")
        for name, size in self.axes:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                problems.append(f"mesh axis {name!r} has size {size!r}; sizes are integers of at least 1")
        names = [name for name, _ in self.axes]
        for name in sorted({n for n in names if names.count(n) > 1}):
            problems.append(f"mesh axis {name!r} is named twice; axis names are unique")
        if problems:
            raise PlanError(problems)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(size for _, size in self.axes)

    def axis_size(self, name: str) -> int:
        return dict(self.axes)[name]

    @property
    def model_axis(self) -> str:
        """The one axis that layers are split over: the axis larger than 1, else the last axis.

        Raises PlanError if two axes are larger than 1.
        """
        wide = [name for name, size in self.axes if size > 1]
        if len(wide) > 1:
            shape = ", ".join(f"{name}={size}" for name, size in self.axes)
            raise PlanError(
                f"mesh ({shape}) has {len(wide)} axes larger than 1; tensor parallelism uses one: "
                f"give all but one of them size 1"
            )
        return wide[0] if wide else self.axes[-1][0]

    def to_json(self) -> dict[str, int]:
        return dict(self.axes)

    @classmethod
    def from_json(cls, data: Mapping[str, int]) -> Mesh:
        return cls(tuple((str(name), size) for name, size in data.items()))

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.axes)


def parse_mesh(text: str) -> Mesh:
    """Return the mesh written as ``"model=8"`` or ``"batch=1,model=8"``.

    Raises PlanError where the text is not of that form.
    """
    axes = []
    for part in text.split(","):
        name, equals, size = part.partition("=")
        if not (equals and name.strip() and size.strip().isdigit()):
            raise PlanError(f"mesh {text!r} is not of the form axis=size[,axis=size...], e.g. batch=1,model=8")
        axes.append((name.strip(), int(size)))
    return Mesh(tuple(axes))
