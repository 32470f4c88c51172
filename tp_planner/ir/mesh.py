"""The device mesh as plain data: named axes and their sizes."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from tp_planner.ir.errors import PlanError

LARGEST = 2**16  # devices; what is planned is one of them, but what is uneven is planned for each


@dataclass(frozen=True, slots=True)
class Mesh:
    """Named mesh axes with their sizes, in order, e.g. ``Mesh((("batch", 1), ("model", 8)))``.

    Ranks are counted along the last axis first. ``split`` names the axis over which the batch is split, where that
    is said; ``across`` sets it.
    """

    axes: tuple[tuple[str, int], ...]
    split: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if not self.axes:
            problems.append("a mesh needs at least one axis; write for example model=8")
        for name, size in self.axes:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                problems.append(f"mesh axis {name!r} has size {size!r}; sizes are integers of at least 1")
        if not problems and self.size > LARGEST:
            problems.append(f"mesh ({self}) has {self.size} devices; plans are for {LARGEST} at most")
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
    def batch_axis(self) -> str | None:
        """The axis over which the batch is split: the one that is named, else the first of several larger than 1."""
        wide = [name for name, size in self.axes if size > 1]
        return self.split if self.split is not None or len(wide) < 2 else self.axes[0][0]

    @property
    def model_axis(self) -> str:
        """The one axis that layers are split over: of all but the batch axis the one larger than 1, else the last.

        Raises PlanError if two of these are larger than 1.
        """
        batch = self.batch_axis
        others = [(name, size) for name, size in self.axes if name != batch]
        wide = [name for name, size in others if size > 1]
        if len(wide) > 1:
            raise PlanError(
                f"mesh ({self}) has {len(wide)} axes larger than 1 besides {batch!r}, over which the batch is split; "
                f"layers are split over one: give all but one of {', '.join(map(repr, wide))} size 1, or name "
                f"another batch_axis"
            )
        return wide[0] if wide else others[-1][0]

    @property
    def replicas(self) -> int:
        """Number of copies of the model, each of which sees its own share of the batch."""
        return 1 if self.batch_axis is None else self.axis_size(self.batch_axis)

    def across(self, batch_axis: str | None) -> Mesh:
        """Return this mesh with the batch split over ``batch_axis``; where there is no other axis, with one of size 1.

        Raises PlanError if the mesh has no such axis.
        """
        if batch_axis is None:
            return self
        if batch_axis not in self.names:
            known = ", ".join(map(repr, self.names))
            raise PlanError(f"batch_axis is {batch_axis!r}, the mesh has {known}; name one of these")
        alone = len(self.axes) == 1
        model = "model" if batch_axis != "model" else "layers"
        return Mesh((*self.axes, (model, 1)) if alone else self.axes, batch_axis)

    def coordinate(self, rank: int, axis: str) -> int:
        """Return the place of a rank on an axis.

        >>> Mesh((("batch", 2), ("model", 4))).coordinate(6, "batch")
        1
        """
        following = self.axes[self.names.index(axis) + 1 :]
        return rank // math.prod(size for _, size in following) % self.axis_size(axis)

    def on_nodes(self, axis: str, devices_per_node: int) -> OnNodes:
        """Return how groups of ranks along an axis lie on nodes of so many devices, neighbours in order of rank.

        >>> Mesh((("batch", 8), ("model", 4))).on_nodes("batch", 8)
        OnNodes(nodes=4, neighbours=2)
        """
        return _on_nodes(self, axis, devices_per_node)

    def to_json(self) -> dict[str, int]:
        return dict(self.axes)

    @classmethod
    def from_json(cls, data: Mapping[str, int]) -> Mesh:
        return cls(tuple((str(name), size) for name, size in data.items()))

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.axes)


@dataclass(frozen=True, slots=True)
class OnNodes:
    """How groups of ranks lie on nodes: the most nodes of a group, and the fewest ranks that one has on a node."""

    nodes: int
    neighbours: int


@functools.lru_cache(maxsize=64)
def _on_nodes(mesh: Mesh, axis: str, devices_per_node: int) -> OnNodes:
    following = mesh.axes[mesh.names.index(axis) + 1 :]
    stride = math.prod(size for _, size in following)
    groups: dict[int, Counter[int]] = {}
    for rank in range(mesh.size):
        first = rank - stride * mesh.coordinate(rank, axis)
        groups.setdefault(first, Counter())[rank // devices_per_node] += 1
    return OnNodes(max(map(len, groups.values())), min(min(each.values()) for each in groups.values()))


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
