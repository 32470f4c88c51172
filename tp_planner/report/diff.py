"""What differs between two plans, as sections of a report; equal changes of equal blocks are one row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tp_planner.ir.difference import AmountChange, Change, Changed, CollectiveChange, Difference, Fate
from tp_planner.ir.figures import Figures
from tp_planner.ir.names import fold_names, without_numbers_of
from tp_planner.report.amounts import bytes_text, change_text, count_text
from tp_planner.report.sections import Item, Section, Table

# What is shown of a rule, a variable or a layer that only one plan has.
_MAIN = {"axes", "placement", "shape", "rule", "style", "reason"}
# What follows from the style of a layer, and is shown where the style is the same.
_OF_STYLE = {"output placement", "sharded inputs", "after the output's boundary", "scope of the region"}


def difference_sections(difference: Difference, before: str, after: str) -> list[Section]:
    """Return the report on what differs from the plan called ``before`` to the one called ``after``."""
    title = f"from {before} to {after}"
    if difference.is_empty:
        return [Section(f"{title}: no difference")]
    sections = [
        Section(title, tuple(map(_said, difference.plan))),
        Section("one training step on one rank", table=_figures(*difference.figures)),
        Section("rules", items=tuple(map(_item, difference.rules))),  # patterns have numbers of their own
        Section("variables", items=_folded_items(difference.variables)),
        Section("layers", items=_folded_items(difference.layers)),
        Section("collectives of one training step", table=_collectives(difference.collectives)),
        Section("memory and work", table=_amounts(difference.amounts)),
        Section("notes", tuple(f"{note.fate}: {note.name}" for note in difference.notes)),
    ]
    return [sections[0], *(section for section in sections[1:] if not section.is_empty)]


def _figures(before: Figures, after: Figures) -> Table:
    rows = [
        ("collectives", str(before.collectives), str(after.collectives), _sign(before.collectives, after.collectives))
    ]
    sizes = {
        "bytes into collectives": (before.bytes, after.bytes),
        "wire bytes": (before.wire_bytes, after.wire_bytes),
        "parameters": (before.parameter_bytes, after.parameter_bytes),
        "peak memory": (before.peak_bytes, after.peak_bytes),
    }
    for what, (old, new) in sizes.items():
        rows.append((what, bytes_text(old), bytes_text(new), change_text(new - old, bytes_text) if old != new else ""))
    return Table(("what", "before", "after", "change"), tuple(rows), frozenset({"before", "after", "change"}))


def _sign(before: int, after: int) -> str:
    return f"{after - before:+}" if before != after else ""


def _said(change: Change) -> str:
    return f"{change.what}: was {change.before or 'none'}; now {change.after or 'none'}"


# --- rules, variables, layers --------------------------------------------------------------------------


def _item(changed: Changed) -> Item:
    shown = [change for change in changed.changes if _is_shown(change, changed)]
    return Item(f"{changed.fate}: {changed.name}", _details(changed.fate, shown))


def _folded_items(changed: Sequence[Changed]) -> tuple[Item, ...]:
    """Return an item for each group of things that change alike but for their numbers."""
    groups: dict[tuple[Fate, tuple[Change, ...]], list[Changed]] = {}
    for each in changed:
        shown = Changed(each.name, each.fate, tuple(change for change in each.changes if _is_shown(change, each)))
        groups.setdefault((each.fate, _starred(shown)), []).append(shown)
    items = []
    for (fate, starred), members in groups.items():
        equal = len({member.changes for member in members}) == 1
        names = ", ".join(map(str, fold_names(member.name for member in members)))
        items.append(Item(f"{fate}: {names}", _details(fate, members[0].changes if equal else starred)))
    return tuple(items)


def _details(fate: Fate, changes: Sequence[Change]) -> tuple[str, ...]:
    if fate == "changed":
        return tuple(map(_said, changes))
    return tuple(f"{change.what}: {change.after or change.before}" for change in changes)


def _starred(changed: Changed) -> tuple[Change, ...]:
    """Return the changes without the numbers of the name."""

    def star(text: str) -> str:
        return without_numbers_of(changed.name, text)

    return tuple(Change(star(each.what), star(each.before), star(each.after)) for each in changed.changes)


def _is_shown(change: Change, changed: Changed) -> bool:
    """Whether a change says more than the others of the same thing.

    The reason for a placement repeats its rule, a boundary that changes takes its tensor with it, and much of a layer
    follows from its style.
    """
    if changed.fate != "changed":
        return change.what in _MAIN
    names = {each.what for each in changed.changes}
    if "style" in names and (change.what in _OF_STYLE or change.what.startswith("variable ")):
        return False
    return not (
        change.what.removesuffix(", its tensor") in names - {change.what}
        or (change.what == "reason" and "rule" in names)
    )


# --- collectives and amounts ---------------------------------------------------------------------------


def _collectives(changed: Sequence[CollectiveChange]) -> Table | None:
    groups: dict[tuple[str, ...], list[CollectiveChange]] = {}
    for each in changed:
        place = each.place.partition(" (")[0].rpartition("/")[2]
        cells = (each.phase, each.kind, place, str(each.group_size), bytes_text(each.bytes), each.cause)
        groups.setdefault((*cells, str(each.before), str(each.after)), []).append(each)
    rows: list[tuple[str, ...]] = []
    for (phase, kind, place, ranks, size, cause, *_), members in groups.items():
        for name in fold_names(member.layer for member in members):
            own = [member for member in members if member.layer in name.members]
            before, after = sum(member.before for member in own), sum(member.after for member in own)
            wire = sum((member.after - member.before) * member.wire_bytes for member in own)
            rows.append(
                (_sign(before, after), phase, kind, str(name), place, ranks, size, change_text(wire, bytes_text), cause)
            )
    heads: tuple[str, ...] = (
        "times",
        "phase",
        "collective",
        "layer",
        "where",
        "ranks",
        "bytes each",
        "wire bytes",
        "cause",
    )
    if not any(each.cause for each in changed):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    return _table(heads, rows, {"times", "ranks", "bytes each", "wire bytes"})


def _amounts(changed: Sequence[AmountChange]) -> Table | None:
    rows = []
    for each in changed:
        text = bytes_text if each.unit == "bytes" else count_text
        unit = "" if each.unit == "bytes" else f" {each.unit}"
        change = change_text(each.after - each.before, text)
        rows.append((each.what, *(f"{number}{unit}" for number in (text(each.before), text(each.after), change))))
    return _table(("what", "before", "after", "change"), rows, {"before", "after", "change"})


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]], numbers: Iterable[str] = ()) -> Table | None:
    listed = tuple(rows)
    return Table(heads, listed, frozenset(numbers)) if listed else None
