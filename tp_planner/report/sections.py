"""A report as titled sections of sentences and tables, shown as plain text or as rich renderables."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

WIDTH = 118  # of wrapped sentences; tables are as wide as their cells


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text cells under ``heads``; the columns under ``numbers`` are aligned at their right."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Item:
    """A sentence, and others that go into its details."""

    text: str
    details: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A title with what stands under it: sentences, then items, then a table."""

    title: str
    sentences: tuple[str, ...] = ()
    items: tuple[Item, ...] = ()
    table: Table | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing stands under the title."""
        return not (self.sentences or self.items or self.table)


def sections_to_text(sections: Sequence[Section]) -> str:
    """Return the sections as plain text, an empty line between two of them."""
    return "\n\n".join("\n".join(_lines(section)) for section in sections) + "\n"


def sections_to_renderable(sections: Sequence[Section]) -> RenderableType:
    """Return the sections for a terminal: what the text says, as wide as the terminal."""
    parts: list[RenderableType] = []
    for section in sections:
        parts.append(Text(section.title, "bold"))
        parts += [Padding(Text(text), (0, 0, 0, indent)) for indent, text in _indented(section)]
        parts.append(Text() if section.table is None else _rich_table(section.table))
    return Group(*parts)


def _lines(section: Section) -> Iterator[str]:
    yield section.title
    for indent, text in _indented(section):
        first, rest = " " * indent, " " * (indent + 2)
        yield from textwrap.wrap(
            text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
        )
    if section.table is not None:
        yield from _table_lines(section.table)


def _indented(section: Section) -> Iterator[tuple[int, str]]:
    yield from ((2, sentence) for sentence in section.sentences)
    for item in section.items:
        yield 2, item.text
        yield from ((6, detail) for detail in item.details)


def _table_lines(table: Table) -> Iterator[str]:
    rows = (table.heads, *table.rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if head in table.numbers else cell.ljust(width)
            for head, cell, width in zip(table.heads, row, widths, strict=True)
        ]
        yield f"  {'  '.join(cells)}".rstrip()


def _rich_table(table: Table) -> RichTable:
    rich = RichTable(box=box.SIMPLE_HEAD)
    for head in table.heads:
        number = head in table.numbers
        rich.add_column(head, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in table.rows:
        rich.add_row(*map(Text, row))
    return rich
