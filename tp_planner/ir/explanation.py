"""Why one layer or variable is planned as it is, and what the alternatives cost, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from tp_planner.ir.figures import Figures
from tp_planner.ir.placement import Shape
from tp_planner.ir.step import Collective


@dataclass(frozen=True, slots=True)
class StoredVariable:
    """Where a variable is stored, and the bytes of it: as one device stores it, and on rank 0."""

    key: str
    shape: Shape
    local_shape: Shape
    dtype: str
    trainable: bool
    placement: str
    whole_bytes: int
    local_bytes: int
    rule: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Crossing:
    """A tensor at an end of a layer: an input, a variable that it reads, or its output.

    ``forward`` and ``backward`` are the placements of the tensor and of its gradient, before and after where they
    change; "" where no gradient flows. ``shared_with`` are the other layers that read the tensor through the same
    boundary: it is crossed once for all of them.
    """

    place: str
    tensor: str
    shape: Shape
    forward: str
    backward: str
    shared_with: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ComputedLayer:
    """How a layer is computed; ``after_output`` is what of it runs after its output's boundary."""

    layer: str
    class_name: str
    style: str
    reason: str
    crossings: tuple[Crossing, ...]
    after_output: str


@dataclass(frozen=True, slots=True)
class Alternative:
    """What the plan would be if other rules named some variables: really planned.

    ``placements`` are (variable, placement) of those whose rules are exchanged, ``styles`` (layer, style, reason) of
    the layers that have them. ``changed`` are the other layers that are planned differently then. Where the layout
    is refused, ``figures`` is None and ``problem`` says why.
    """

    placements: tuple[tuple[str, str], ...]
    styles: tuple[tuple[str, str, str], ...]
    changed: tuple[str, ...]
    figures: Figures | None
    problem: str


@dataclass(frozen=True, slots=True)
class PathExplanation:
    """One layer or variable of a plan.

    ``kind`` says what ``path`` names. ``equals`` are what is planned alike in other blocks, itself included;
    ``alternatives`` are for itself alone, ``alternatives_for_equals`` for all of these together.
    ``collectives`` are those of its layers and those that its layers share.
    """

    model: str
    mesh: str
    path: str
    kind: str
    variables: tuple[StoredVariable, ...]
    layers: tuple[ComputedLayer, ...]
    collectives: tuple[Collective, ...]
    figures: Figures
    equals: tuple[str, ...]
    alternatives: tuple[Alternative, ...]
    alternatives_for_equals: tuple[Alternative, ...]
