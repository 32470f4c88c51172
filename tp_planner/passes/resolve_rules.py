"""Resolve rules: decide for every variable which layout rule places it, and how.

Matching is Keras's own: a key equal to the path wins, else every pattern is tried with ``re.fullmatch`` and
two matches are an error. All problems of a layout are reported at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tp_planner.ir.errors import PlanError
from tp_planner.ir.graph import VariableInfo
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.placement import Placement, Replicate, Shard, chunk_sizes
from tp_planner.ir.plan import RuleReport


@dataclass(frozen=True, slots=True)
class Resolved:
    """One variable's placement on the model axis, the pattern that decided and why."""

    placement: Placement
    rule: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Resolution:
    """Every variable's placement, what became of every rule, and what the user should hear of."""

    variables: Mapping[str, Resolved]
    outputs: Mapping[str, LayoutRule]  # layer name -> the rule that names its output
    rules: tuple[RuleReport, ...]
    notes: tuple[str, ...]


def resolve_rules(layout: Layout, variables: Mapping[str, VariableInfo], layer_paths: Mapping[str, str]) -> Resolution:
    """Return the placement of each variable.

    Args:
        layout: rules and mesh.
        variables: the model's variables by key.
        layer_paths: Keras path of each layer by name; ``<path>/output`` names its activation.

    Raises:
        PlanError: with every rule that is malformed, names an unknown axis, has the wrong rank, or shares a
            variable with another rule; and if no rule matches anything.
    """
    axis = layout.mesh.model_axis
    malformed = {rule: list(_malformed(rule, layout)) for rule in layout.rules}
    problems = [problem for rule in layout.rules for problem in malformed[rule]]
    rules = tuple(rule for rule in layout.rules if not malformed[rule])
    owner: dict[str, LayoutRule | None] = {}
    for key, variable in variables.items():
        matching = _matching(rules, variable.path)
        if len(matching) > 1:
            problems.append(_ambiguous("variable", variable.path, matching))
        owner[key] = matching[0] if matching else None
        if owner[key] is not None and len(matching[0].axes) != len(variable.shape):
            problems.append(_wrong_rank(matching[0], variable))
    outputs: dict[str, LayoutRule] = {}
    for name, path in layer_paths.items():
        matching = _matching(rules, f"{path}/output")
        if len(matching) > 1:
            problems.append(_ambiguous("output", f"{path}/output", matching))
        if matching:
            outputs[name] = matching[0]
    reports = tuple(_report(rule, owner, outputs) for rule in rules)
    unmatched = [report.rule for report in reports if not _matches_anything(report, layer_paths, variables)]
    if problems or (reports and len(unmatched) == len(reports)):
        raise PlanError(problems + [_unmatched(rule, variables.values()) for rule in unmatched])
    parts = layout.mesh.axis_size(axis)
    resolved = {key: _resolve(variable, owner[key], axis, parts) for key, variable in variables.items()}
    ignored = [
        f"variable {variables[key].path!r} is named by layout rule {each.rule!r} but stays whole: {each.reason}"
        for key, each in resolved.items()
        if each.rule is not None and each.reason == variables[key].kept_whole
    ]
    notes = [_unmatched(rule, variables.values()) for rule in unmatched] + ignored
    return Resolution(resolved, outputs, reports, tuple(notes))


def _malformed(rule: LayoutRule, layout: Layout) -> Iterable[str]:
    try:
        re.compile(rule.pattern)
    except re.error as error:
        yield f"layout rule {rule.pattern!r} is not a regular expression: {error}; escape special characters"
    names = [name for axis in rule.axes for name in ((axis,) if isinstance(axis, str) else axis or ())]
    for name in dict.fromkeys(names):
        if name not in layout.mesh.names:
            known = ", ".join(repr(axis) for axis in layout.mesh.names)
            yield f"layout rule {rule} names mesh axis {name!r}, the mesh has {known}; use one of these or None"
        elif names.count(name) > 1:
            yield f"layout rule {rule} uses mesh axis {name!r} twice; an axis can shard one dim of a tensor"


def _matching(rules: tuple[LayoutRule, ...], path: str) -> list[LayoutRule]:
    exact = [rule for rule in rules if rule.pattern == path]
    return exact or [rule for rule in rules if re.fullmatch(rule.pattern, path)]


def _ambiguous(kind: str, path: str, rules: list[LayoutRule]) -> str:
    patterns = ", ".join(repr(rule.pattern) for rule in rules)
    return f"{kind} {path!r} matches {len(rules)} layout rules: {patterns}; make each path match at most one"


def _wrong_rank(rule: LayoutRule, variable: VariableInfo) -> str:
    return (
        f"layout rule {rule} has {len(rule.axes)} entries, variable {variable.path!r} of shape {variable.shape} "
        f"has {len(variable.shape)} dims; write one entry per dim"
    )


def _unmatched(rule: LayoutRule, variables: Iterable[VariableInfo]) -> str:
    paths = [variable.path for variable in variables]
    found = [path for path in paths if re.search(rule.pattern, path)]
    if found:
        return (
            f"layout rule {rule.pattern!r} matches no variable as a whole, but a part of {found[0]!r}; "
            f"Keras matches whole paths: write '.*{rule.pattern}.*' or the full path"
        )
    literal = re.sub(r"\\(.)", r"\1", re.sub(r"\.\*|[\^$()]", "", rule.pattern))
    closest = difflib.get_close_matches(literal, paths, n=1, cutoff=0.0)
    hint = f"; closest: {closest[0]!r}" if closest else ""
    return f"layout rule {rule.pattern!r} matches no variable{hint}"


def _report(rule: LayoutRule, owner: Mapping[str, LayoutRule | None], outputs: Mapping[str, LayoutRule]) -> RuleReport:
    return RuleReport(
        rule,
        tuple(key for key, chosen in owner.items() if chosen is rule),
        tuple(name for name, chosen in outputs.items() if chosen is rule),
    )


def _matches_anything(
    report: RuleReport, layer_paths: Mapping[str, str], variables: Mapping[str, VariableInfo]
) -> bool:
    """Whether the rule matches a path, be it one that another rule claims too."""
    if report.variables or report.outputs:
        return True
    paths = [*(variable.path for variable in variables.values()), *(f"{path}/output" for path in layer_paths.values())]
    return any(re.fullmatch(report.rule.pattern, path) for path in paths)


def sharded_dim(rule: LayoutRule, axis: str) -> int | None:
    """Return the dim that the rule shards over ``axis``, or None."""
    for dim, entry in enumerate(rule.axes):
        if entry == axis or (isinstance(entry, tuple) and axis in entry):
            return dim
    return None


def _resolve(variable: VariableInfo, rule: LayoutRule | None, axis: str, parts: int) -> Resolved:
    if rule is None:
        return Resolved(Replicate(), None, "no layout rule names it")
    dim = sharded_dim(rule, axis)
    if dim is None:
        return Resolved(Replicate(), rule.pattern, f"rule {rule} does not shard it over {axis!r}")
    if parts == 1:
        return Resolved(Replicate(), rule.pattern, f"mesh axis {axis!r} has size 1")
    if variable.kept_whole:
        return Resolved(Replicate(), rule.pattern, variable.kept_whole)
    if variable.shape[dim] % parts:
        sizes = chunk_sizes(variable.shape[dim], parts)
        uneven = f"; {variable.shape[dim]} does not divide by {parts}, so ranks hold {', '.join(map(str, sizes))}"
        return Resolved(Shard(dim), rule.pattern, f"rule {rule}{uneven}")
    return Resolved(Shard(dim), rule.pattern, f"rule {rule}")
