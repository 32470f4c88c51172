"""A plan as rich renderables, for a terminal in colour."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

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

_COLOURS = {
    "column": "green",
    "row": "blue",
    "vocabulary": "magenta",
    "batched": "cyan",
    "sequence": "cyan",
    "elementwise": "cyan",
    "gathered": "yellow",
    "replicated": "dim",
}


def plan_to_renderable(plan: Plan) -> RenderableType:
    """Return the plan as tables and lists: what ``plan_to_text`` says, in colour and as wide as the terminal."""
    first, *rest = heading(plan)
    parts: list[RenderableType] = [Text(first, "bold"), *map(Text, rest), _layer_table(layer_rows(plan))]
    parts += [*map(Text, summary(plan)), Text()]
    parts += [Text(collectives_heading(plan), "bold"), _collective_table(collective_rows(plan))]
    parts += [*(Text(line, "bold red" if line.startswith("  GUESSED") else "") for line in memory_lines(plan)), Text()]
    parts += _explanations("why layers are computed so", style_reasons(plan))
    parts += _explanations("why variables are stored so", variable_reasons(plan))
    if plan.notes:
        parts += [Text("notes", "bold"), *(Padding(Text(note, "yellow"), (0, 0, 0, 2)) for note in plan.notes)]
    return Group(*parts)


def _layer_table(rows: Sequence[LayerRow]) -> Table:
    table = _table(("layer", "style", *VARIABLE_HEADS, "boundaries"))
    for row in rows:
        colour = _COLOURS.get(row.style, "")
        columns = [_lines(cells) for cells in zip(*row.variables, strict=True)] or [Text()] * len(VARIABLE_HEADS)
        table.add_row(Text(row.layer), Text(row.style, colour), *columns, _lines(row.boundaries))
    return table


def _collective_table(rows: Sequence[tuple[str, ...]]) -> RenderableType:
    if not rows:
        return Text()
    table = _table(COLLECTIVE_HEADS)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _table(heads: Iterable[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for head in heads:
        # Only these two may wrap: the lines of the other columns belong together.
        table.add_column(head, overflow="fold", no_wrap=head not in ("layer", "boundaries"))
    return table


def _explanations(title: str, explanations: Sequence[Explanation]) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(title, "bold")]
    for each in explanations:
        parts.append(Padding(Text(each.reason), (0, 0, 0, 2)))
        parts.append(Padding(Text(", ".join(each.names), "dim"), (0, 0, 0, 6)))
    return [*parts, Text()]


def _lines(cells: Sequence[str]) -> Text:
    return Text("\n".join(cells))
