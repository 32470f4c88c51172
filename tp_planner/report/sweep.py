"""One model at several degrees of tensor parallelism, as sections of a report."""

from __future__ import annotations

from collections.abc import Sequence

from tp_planner.ir.degrees import Degree, Sweep
from tp_planner.ir.names import fold_names, without_numbers_of
from tp_planner.report.amounts import bytes_text
from tp_planner.report.sections import Section, Table

_NUMBERS = ("collectives", "wire bytes", "parameters", "peak memory", "gathered", "left early")
_LEGEND = (
    "each row is one training step on one rank",
    "gathered: layers whose weights are stored sharded and gathered at use, which is right and slow",
    "left early: layers whose sharded output is gathered behind them",
)


def sweep_sections(sweep: Sweep) -> list[Section]:
    """Return the report: a row for each degree, then why degrees are refused and layers gathered, and notes."""
    sizes = ", ".join(str(degree.size) for degree in sweep.degrees)
    facts = [f"traced with inputs {', '.join(sweep.inputs)}"] if sweep.inputs else []
    facts += [f"the layout names mesh axis {name!r} too: it has size 1 here" for name in sweep.other_axes]
    heads = (sweep.axis, *_NUMBERS, "verdict")
    table = Table(heads, tuple(map(_cells, sweep.degrees)), frozenset(heads[:-1]))
    sections = [
        Section(f"{sweep.model!r} with sizes {sizes} of mesh axis {sweep.axis!r}", (*facts, *_LEGEND), table=table)
    ]
    reasons: dict[str, dict[int, Sequence[tuple[str, str]]]] = {
        "refused": {degree.size: [("", problem) for problem in degree.problems] for degree in sweep.degrees},
        "why weights are gathered": {degree.size: degree.gathered for degree in sweep.degrees},
        "why outputs are gathered": {degree.size: degree.left_early for degree in sweep.degrees},
        "notes": {degree.size: [("", note) for note in degree.notes] for degree in sweep.degrees},
    }
    sections += [Section(title, _explained(of_sizes)) for title, of_sizes in reasons.items()]
    return [section for section in sections if not section.is_empty]


def _cells(degree: Degree) -> tuple[str, ...]:
    if degree.figures is None:
        return (str(degree.size), *[""] * len(_NUMBERS), "refused")
    figures = degree.figures
    return (
        str(degree.size),
        str(figures.collectives),
        bytes_text(figures.wire_bytes),
        bytes_text(figures.parameter_bytes),
        bytes_text(figures.peak_bytes),
        str(len(degree.gathered)),
        str(len(degree.left_early)),
        "gathers" if degree.gathered else "divides",
    )


def _explained(of_sizes: dict[int, Sequence[tuple[str, str]]]) -> tuple[str, ...]:
    """Return a sentence for each reason: the sizes and the layers it holds for, and the reason itself."""
    sizes: dict[tuple[str, str], list[int]] = {}
    for size, pairs in of_sizes.items():
        for names, reason in _alike(pairs):
            sizes.setdefault((names, reason), []).append(size)
    return tuple(
        f"at {', '.join(map(str, at))}: {f'{names}: ' if names else ''}{reason}"
        for (names, reason), at in sizes.items()
    )


def _alike(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return each reason with its names folded; reasons that differ in the numbers of their names are one."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, reason in pairs:
        groups.setdefault(without_numbers_of(name, reason), []).append((name, reason))
    alike = []
    for starred, members in groups.items():
        reason = members[0][1] if len({reason for _, reason in members}) == 1 else starred
        alike.append((", ".join(map(str, fold_names(name for name, _ in members))), reason))
    return alike
