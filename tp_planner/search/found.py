"""Found: a layout that a search chose, and how good it is proven to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from tp_planner.ir.figures import figures_of
from tp_planner.ir.found import CandidateFigures, FoundFigures
from tp_planner.ir.layout import AxisSpec, Layout, LayoutRule
from tp_planner.readable_plan import Plan


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout that was planned: what its plan costs, and what the program says that it costs. Seconds of a step.

    What the program does not know of stands on top of a candidate without it.
    """

    layout: Layout
    plan: Plan
    cost: float
    program_cost: float
    on_top_of: Candidate | None = None

    @property
    def proven(self) -> Candidate:
        """The candidate of which the program knows all."""
        return self if self.on_top_of is None else self.on_top_of.proven

    @property
    def figures(self) -> CandidateFigures:
        """The candidate in figures."""
        beyond = () if self.on_top_of is None else self._beyond(self.on_top_of)
        return CandidateFigures(self.layout.rules, self.cost, self.program_cost, figures_of(self.plan), beyond)

    def _beyond(self, below: Candidate) -> tuple[str, ...]:
        if self.layout.zero != below.layout.zero:
            what = "slots in parts" if self.layout.zero == 1 else "weights in parts"
        else:
            what = "stream in shards" if self.layout.sequence_parallel else "unequal parts"
        return (*below.figures.beyond, what)


ERROR = 0.02  # by which the program's cost may differ from the plan's


def is_as_planned(candidate: Candidate) -> bool:
    """Whether the program says of a layout what its plan does."""
    return abs(candidate.cost / candidate.program_cost - 1) <= ERROR


def known_bound(bound: float, candidates: Sequence[Candidate]) -> float | None:
    """Return what no layout costs less than, if no plan shows that the program asks too much of some.

    ``candidates`` are those that may be found: where memory is short, those that fit.
    """
    planned = [each for each in candidates if each.on_top_of is None]
    if any(each.cost < (1 - ERROR) * max(bound, each.program_cost) for each in planned):
        return None
    return min((bound, *(each.cost for each in planned)))


@dataclass(frozen=True, slots=True)
class Found:
    """The cheapest layout of a search.

    ``cost`` is what its plan's training step is estimated to take, in seconds (the high end of ``estimate_time``);
    ``bound`` is what no layout in the search space takes less than, as the solver proves of the program; None where it
    is not known, for a plan costs less than the program said. Of what stands
    on top of a layout, such as the stream in shards, the proof does not speak: error, gap and bound are then
    of the layout without it, which is ``best.proven``. ``whole`` has nothing sharded. ``runners_up`` are the other
    layouts that were planned, the cheapest first.
    """

    model: str
    hardware: str
    best: Candidate
    bound: float | None
    whole: Candidate
    runners_up: tuple[Candidate, ...]

    @property
    def layout(self) -> Layout:
        return self.best.layout

    @property
    def plan(self) -> Plan:
        return self.best.plan

    @property
    def cost(self) -> float:
        return self.best.cost

    @property
    def error(self) -> float:
        """By which fraction the plan costs more than the program says; less than 0 where it costs less."""
        return self.best.proven.cost / self.best.proven.program_cost - 1

    @property
    def gap(self) -> float | None:
        """By which fraction a better layout could be cheaper; 0 where there is none, None where that is not known.

        Where program and plan agree it is said in the program's costs, else of the plan's.
        """
        if self.bound is None:
            return None
        proven = self.best.proven
        reached = proven.program_cost if is_as_planned(proven) else proven.cost
        return max(0.0, 1 - self.bound / min(reached, proven.cost))

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of the proof."""
        proven = self.best.proven
        if is_as_planned(proven):
            return ()
        return (
            f"the plan's step takes {1e3 * proven.cost:.4g} ms, the program said {1e3 * proven.program_cost:.4g} ms: "
            f"they are more than {ERROR:.0%} apart",
        )

    @property
    def figures(self) -> FoundFigures:
        """All of it in figures."""
        return FoundFigures(
            model=self.model,
            mesh=str(self.layout.mesh),
            hardware=self.hardware,
            best=self.best.figures,
            proven=self.best.proven.figures,
            bound=self.bound,
            gap=self.gap,
            whole=self.whole.figures,
            runners_up=tuple(each.figures for each in self.runners_up),
            notes=self.notes,
        )

    @property
    def toml(self) -> str:
        """The layout as a file for ``--layout``."""
        return layout_to_toml(self.layout, self.model, f"Found for {self.model} on a mesh of {self.layout.mesh}.")

    def layout_map(self, devices: Sequence[str] | None = None) -> keras.distribution.LayoutMap:
        """Return the layout for Keras, on a mesh of these devices; by default of the first CPUs."""
        mesh = self.layout.mesh
        names = list(devices) if devices is not None else [f"cpu:{rank}" for rank in range(mesh.size)]
        shape, axes = tuple(size for _, size in mesh.axes), list(mesh.names)
        layout_map = keras.distribution.LayoutMap(keras.distribution.DeviceMesh(shape, axes, names))
        for rule in self.layout.rules:
            layout_map[rule.pattern] = rule.axes
        layout_map.sequence_parallel, layout_map.zero = self.layout.sequence_parallel, self.layout.zero
        return layout_map


def layout_to_toml(layout: Layout, name: str, description: str) -> str:
    """Return a layout as the text of a layout file."""
    lines = [f"name = {_quoted(name)}", f"description = {_quoted(description)}"]
    lines += ["sequence_parallel = true"] if layout.sequence_parallel else []
    lines += [f"zero = {layout.zero}"] if layout.zero else []
    for rule in layout.rules:
        lines += ["", "[[rules]]", f"pattern = {_quoted(rule.pattern)}", f"axes = [{_entries(rule)}]"]
    return "\n".join(lines) + "\n"


def _entries(rule: LayoutRule) -> str:
    return ", ".join(map(_entry, rule.axes))


def _entry(axis: AxisSpec) -> str:
    if isinstance(axis, tuple):
        return f"[{', '.join(map(_quoted, axis))}]"
    return _quoted(axis or "")


def _quoted(text: Any) -> str:
    return f"'{text}'" if "\\" in text else f'"{text}"'
