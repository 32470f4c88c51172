"""What a search for a layout found, in figures."""

from __future__ import annotations

from dataclasses import dataclass

from tp_planner.ir.figures import Figures
from tp_planner.ir.layout import LayoutRule


@dataclass(frozen=True, slots=True)
class CandidateFigures:
    """A layout that was planned: its rules, the seconds of its step, and what else its plan comes to.

    ``program_seconds`` are what the search's program says of it; ``beyond`` is what it has that the program does not
    know.
    """

    rules: tuple[LayoutRule, ...]
    seconds: float
    program_seconds: float
    figures: Figures
    beyond: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FoundFigures:
    """The cheapest layout of a search, and what it is compared with. Times are the high ends of estimates.

    ``proven`` is the best without what the program does not know, of which ``bound`` and ``gap`` speak: no layout that
    the program knows takes less; None where that is not known. ``whole`` has nothing sharded.
    """

    model: str
    mesh: str
    hardware: str
    best: CandidateFigures
    proven: CandidateFigures
    bound: float | None
    gap: float | None
    whole: CandidateFigures
    runners_up: tuple[CandidateFigures, ...]
    notes: tuple[str, ...]
