"""What the linter found, as sections: every rule with what it does to which variables, then the findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tp_planner.ir.finding import SEVERITIES, Finding, LintReport, VariableEffect, count_of
from tp_planner.ir.names import fold_names, without_numbers_of
from tp_planner.ir.placement import Replicate, Shape
from tp_planner.report.sections import Item, Section


def lint_sections(report: LintReport) -> list[Section]:
    """Return the report; findings and variables of equal blocks are one line."""
    heading = f"Lint of layout {report.layout!r} for model {report.model!r} on mesh ({report.mesh})"
    found = Section(_counts(report), items=tuple(_findings(report)))
    if not report.variables:  # the layout file could not be read
        return [Section(f"Lint of layout {report.layout!r}"), found]
    legend = ["S(d): sharded on dim d; the shape per rank is that of rank 0, the largest"]
    if any(map(_across, report.variables)):
        legend.append(
            "batch S(d), slots S(d): in parts over the batch axis, the variable or an optimizer's slots alone"
        )
    return [Section(heading, tuple(legend)), Section("what the rules do", items=tuple(_rules(report))), found]


def _counts(report: LintReport) -> str:
    found = [count_of(report.count(severity), severity) for severity in SEVERITIES if report.count(severity)]
    return "findings: " + (", ".join(found) or "none")


def _rules(report: LintReport) -> Iterator[Item]:
    """Yield each rule with the variables that it alone names, then those that several name, then those none does."""
    for number, rule in enumerate(report.rules):
        named = [variable for variable in report.variables if variable.rules == (rule.pattern,)]
        yield Item(f"rules[{number}] {rule}", tuple(_effects(named)) or ("no variable",))
    contested = [variable for variable in report.variables if len(variable.rules) > 1]
    if contested:
        yield Item("more than one rule", tuple(_effects(contested)))
    unnamed = [variable for variable in report.variables if not variable.rules]
    if unnamed:
        yield Item(f"no rule: {_size(unnamed)} bytes on every rank", tuple(_effects(unnamed)))


def _effects(variables: Iterable[VariableEffect]) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for variable in variables:
        groups.setdefault(_effect(variable), []).append(variable.path)
    for effect, paths in groups.items():
        yield f"{', '.join(map(str, fold_names(paths)))}: {effect}"


def _effect(variable: VariableEffect) -> str:
    if variable.placement is None or variable.local_shape is None:
        return f"{_shape(variable.shape)}, not planned"
    if variable.placement == Replicate() and not _across(variable):
        return f"{_shape(variable.shape)}, whole on every rank"
    shards = (
        f"{_shape(variable.shape)} as {variable.placement}{_across(variable)}, {_shape(variable.local_shape)} per rank"
    )
    return f"{shards}, {variable.style}" if variable.style else shards


def _across(variable: VariableEffect) -> str:
    """Return how it is stored over the batch axis, "" for whole."""
    placed = {"batch": variable.batch_placement, "slots": variable.slot_placement}
    return "".join(f", {what} {placement}" for what, placement in placed.items() if placement != Replicate())


def _findings(report: LintReport) -> Iterator[Item]:
    """Yield one item for each group of findings that differ in the numbers of their own paths only."""
    places = {rule.pattern: f" rules[{number}]" for number, rule in enumerate(report.rules)}
    groups: dict[tuple[str, str, str | None, str], list[Finding]] = {}
    for finding in report.findings:
        alike = without_numbers_of(" ".join(finding.paths), finding.text)
        groups.setdefault((finding.severity, finding.code, finding.rule, alike), []).append(finding)
    for (severity, code, rule, alike), members in groups.items():
        first = members[0]
        paths = [path for member in members for path in member.paths]
        details = [f"next: {first.advice}"] if first.advice and len(members) == 1 else []
        details += [f"in: {', '.join(map(str, fold_names(paths)))}"] if len(paths) > 1 else []
        text = first.problem if len(members) == 1 else alike
        yield Item(f"{severity} {code}{places.get(rule or '', '')}: {text}", tuple(details))


def _size(variables: Iterable[VariableEffect]) -> int:
    total = 0
    for variable in variables:
        size = variable.itemsize
        for length in variable.shape:
            size *= length
        total += size
    return total


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
