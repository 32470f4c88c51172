"""The verdict as users hold it, which prints itself."""

from __future__ import annotations

from tp_planner.ir import verdict as facts
from tp_planner.report.sections import sections_to_text
from tp_planner.report.verdict import verdict_sections


class Verdict(facts.Verdict):
    """Whether a model under a plan is the same function as on one device; ``print`` shows it."""

    def __str__(self) -> str:
        return sections_to_text(verdict_sections(self))
