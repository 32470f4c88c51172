"""One model at several degrees of tensor parallelism, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from tp_planner.ir.figures import Figures


@dataclass(frozen=True, slots=True)
class Degree:
    """The plan for one size of the mesh axis, in figures.

    ``gathered`` are (layer, reason) of the layers whose weights are stored sharded and gathered at use,
    ``left_early`` of those whose sharded output is gathered behind them. Where the layout is refused, ``figures``
    is None and ``problems`` says why.
    """

    size: int
    figures: Figures | None
    gathered: tuple[tuple[str, str], ...]
    left_early: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sweep:
    """The degrees of one mesh axis. ``other_axes`` are the axes that the rules name besides, each of size 1."""

    model: str
    axis: str
    other_axes: tuple[str, ...]
    inputs: tuple[str, ...]
    degrees: tuple[Degree, ...]
