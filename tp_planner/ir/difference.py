"""What differs between two plans, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tp_planner.ir.figures import Figures
from tp_planner.ir.step import CollectiveKind, Phase

Unit = Literal["bytes", "flops", "ops"]
Fate = Literal["added", "removed", "changed"]


@dataclass(frozen=True, slots=True)
class Change:
    """A property that two plans give different values, in the words of the plans; "" stands for none."""

    what: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Changed:
    """A rule, a variable or a layer that is in one plan only, or planned differently.

    ``changes`` are all its properties where it is in one plan only.
    """

    name: str
    fate: Fate
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class CollectiveChange:
    """Equal collectives of which the plans have different numbers; ``bytes`` are those of one of them."""

    layer: str
    place: str
    phase: Phase
    kind: CollectiveKind
    axis: str
    group_size: int
    bytes: int
    wire_bytes: int
    reason: str
    cause: str
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class AmountChange:
    """A number of the simulated step that differs."""

    what: str
    unit: Unit
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Difference:
    """All that differs between two plans, in the order of the second; what only the first has comes last.

    ``plan`` are properties of the whole: model, mesh, inputs, optimizer. ``notes`` are those of one plan only.
    ``figures`` are those of both plans, equal or not.
    """

    plan: tuple[Change, ...]
    rules: tuple[Changed, ...]
    variables: tuple[Changed, ...]
    layers: tuple[Changed, ...]
    collectives: tuple[CollectiveChange, ...]
    amounts: tuple[AmountChange, ...]
    notes: tuple[Changed, ...]
    figures: tuple[Figures, Figures]

    @property
    def is_empty(self) -> bool:
        """Whether the plans are equal: their JSON is the same, byte for byte."""
        parts = (self.plan, self.rules, self.variables, self.layers, self.collectives, self.amounts, self.notes)
        return not any(parts)
