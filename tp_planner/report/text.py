"""A plan as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from tp_planner.ir.plan import Plan
from tp_planner.report.rows import (
    COLLECTIVE_HEADS,
    VARIABLE_HEADS,
    Explanation,
    LayerRow,
    collective_rows,
    collectives_heading,
    heading,
    layer_rows,
    memory_lines,
    style_reasons,
    summary,
    variable_reasons,
)

WIDTH = 118  # of wrapped sentences; tables are as wide as their cells


def plan_to_text(plan: Plan) -> str:
    """Return the plan as plain text: layers with variables and boundaries, collectives, reasons, notes."""
    layers: list[tuple[str, ...]] = [("layer", "style", *VARIABLE_HEADS, "boundaries")]
    for row in layer_rows(plan):
        layers += _lines_of(row)
    sections = [heading(plan), _table(layers), summary(plan)]
    collectives = collective_rows(plan)
    sections.append([collectives_heading(plan), *(_table([COLLECTIVE_HEADS, *collectives]) if collectives else [])])
    sections.append(memory_lines(plan))
    sections.append(["why layers are computed so", *_explained(style_reasons(plan))])
    sections.append(["why variables are stored so", *_explained(variable_reasons(plan))])
    if plan.notes:
        sections.append(["notes", *(line for note in plan.notes for line in _wrapped(note, "  ", "    "))])
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _lines_of(row: LayerRow) -> Iterator[tuple[str, ...]]:
    """Yield the lines of one layer: as many as it has variables or boundaries, at least one."""
    empty = ("",) * len(VARIABLE_HEADS)
    head = (row.layer, row.style)
    for variable, boundary in list(zip_longest(row.variables, row.boundaries)) or [(None, None)]:
        yield (*head, *(variable or empty), boundary or "")
        head = ("", "")


def _explained(explanations: Sequence[Explanation]) -> list[str]:
    lines = []
    for each in explanations:
        lines += _wrapped(each.reason, "  ", "    ")
        lines += _wrapped(", ".join(each.names), "      ", "      ")
    return lines


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
