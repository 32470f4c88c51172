"""What the linter says of a layout: findings, and what becomes of every variable."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tp_planner.ir.layout import LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.placement import WHOLE, Placement, Shape

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know about a layout; ``plans/lint.md`` lists the codes.

    ``problem`` says what is wrong, with the path and the numbers, ``advice`` what to do next. ``rule`` is the pattern
    of the layout rule at fault, ``paths`` are the variables or outputs that it is about.
    """

    code: str
    severity: Severity
    problem: str
    advice: str = ""
    rule: str | None = None
    paths: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The finding in one sentence, as a PlanError says it."""
        return f"{self.problem}; {self.advice}" if self.advice else self.problem


@dataclass(frozen=True, slots=True)
class VariableEffect:
    """What a layout makes of one variable.

    ``rules`` are the patterns that match it. ``placement`` and ``local_shape``, of rank 0, are None where the layout
    cannot be planned; ``batch_placement`` and ``slot_placement`` are those over the batch axis, of the variable and of
    an optimizer's slots. ``style`` is that of the layer that uses shards of the variable, if one does.
    """

    path: str
    shape: Shape
    itemsize: int
    rules: tuple[str, ...]
    placement: Placement | None
    local_shape: Shape | None
    style: str
    batch_placement: Placement = WHOLE
    slot_placement: Placement = WHOLE


@dataclass(frozen=True, slots=True)
class LintReport:
    """All findings about one layout for one model, errors first, and what becomes of every variable.

    ``layout`` is what the user calls the layout. Of a layout file that cannot be read nothing but findings is known.
    """

    layout: str
    model: str
    mesh: Mesh
    rules: tuple[LayoutRule, ...]
    findings: tuple[Finding, ...]
    variables: tuple[VariableEffect, ...]

    def count(self, severity: Severity) -> int:
        """Return the number of findings of one severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_json(self) -> str:
        """Return the report as JSON text: sorted keys, versioned, byte-identical for equal reports."""
        return json.dumps(_encode(self), indent=1, sort_keys=True) + "\n"


def some_of(paths: Sequence[str]) -> str:
    """Return the first path and how many others there are.

    >>> some_of(["block_0/up/kernel", "block_1/up/kernel"])
    "'block_0/up/kernel' and 1 other"
    """
    others = len(paths) - 1
    return repr(paths[0]) + (f" and {count_of(others, 'other')}" if others else "")


def count_of(number: int, noun: str) -> str:
    """Return the number with the noun, in the plural where there is not one.

    >>> count_of(2, "rank")
    '2 ranks'
    """
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _encode(report: LintReport) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "layout": report.layout,
        "model": report.model,
        "mesh": [[name, size] for name, size in report.mesh.axes],
        "rules": [{"pattern": rule.pattern, "axes": list(rule.axes)} for rule in report.rules],
        "findings": [
            {
                "code": each.code,
                "severity": each.severity,
                "problem": each.problem,
                "advice": each.advice,
                "rule": each.rule,
                "paths": list(each.paths),
            }
            for each in report.findings
        ],
        "variables": [
            {
                "path": each.path,
                "shape": list(each.shape),
                "itemsize": each.itemsize,
                "rules": list(each.rules),
                "placement": None if each.placement is None else str(each.placement),
                "local_shape": None if each.local_shape is None else list(each.local_shape),
                "style": each.style,
                "batch_placement": str(each.batch_placement),
                "slot_placement": str(each.slot_placement),
            }
            for each in report.variables
        ],
    }
