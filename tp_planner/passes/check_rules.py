"""Check rules: what is wrong with layout rules before any layer is looked at.

Matching is Keras's own: a key equal to the path wins, else every pattern is tried with ``re.fullmatch`` and
two matches are an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tp_planner.ir.finding import Finding, Severity
from tp_planner.ir.graph import VariableInfo
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.names import fold_names
from tp_planner.ir.placement import Shape

NAMED = 20  # rules that match nothing, each with what is closest; more are counted


def check_rules(
    layout: Layout, variables: Mapping[str, VariableInfo], layer_paths: Mapping[str, str]
) -> tuple[Finding, ...]:
    """Return all problems of the rules themselves; the layout can be planned if none of them is an error.

    Args:
        layout: rules and mesh.
        variables: the model's variables by key.
        layer_paths: Keras path of each layer by name; ``<path>/output`` names its activation.
    """
    malformed = [finding for rule in layout.rules for finding in _malformed(rule, layout)]
    rules = well_formed(layout)
    conflicts = [
        *_ambiguous("variable", (variable.path for variable in variables.values()), rules),
        *_wrong_ranks(variables.values(), rules),
        *_ambiguous("output", (f"{path}/output" for path in layer_paths.values()), rules),
    ]
    unmatched = _unmatched_rules(rules, variables, layer_paths)
    severity: Severity = "error" if rules and len(unmatched) == len(rules) else "warning"
    nothing = [_unmatched(rule, variables, severity) for rule in unmatched[:NAMED]]
    if len(unmatched) > NAMED:
        problem = f"{len(unmatched) - NAMED} more layout rules match no variable"
        nothing.append(Finding("unmatched-rule", severity, problem, "mend those above first"))
    return (*malformed, *conflicts, *nothing)


def well_formed(layout: Layout) -> tuple[LayoutRule, ...]:
    """Return the rules that mean something on the layout's mesh."""
    return tuple(rule for rule in layout.rules if not any(_malformed(rule, layout)))


def matching_rules(rules: Sequence[LayoutRule], path: str) -> list[LayoutRule]:
    """Return the rules that name ``path``: the one that equals it, else all that match it as a whole."""
    exact = [rule for rule in rules if rule.pattern == path]
    return exact or [rule for rule in rules if rule.matches(path)]


def _malformed(rule: LayoutRule, layout: Layout) -> Iterator[Finding]:
    try:
        re.compile(rule.pattern)
    except re.error as error:
        problem = f"layout rule {rule.pattern!r} is not a regular expression: {error}"
        yield Finding("invalid-pattern", "error", problem, "escape special characters", rule.pattern)
    names = rule.axis_names
    for name in dict.fromkeys(names):
        if name not in layout.mesh.names:
            known = ", ".join(repr(axis) for axis in layout.mesh.names)
            problem = f"layout rule {rule} names mesh axis {name!r}, the mesh has {known}"
            yield Finding("unknown-axis", "error", problem, "use one of these or None", rule.pattern)
        elif names.count(name) > 1:
            problem = f"layout rule {rule} uses mesh axis {name!r} twice"
            yield Finding("repeated-axis", "error", problem, "an axis can shard one dim of a tensor", rule.pattern)


def _ambiguous(kind: str, paths: Iterable[str], rules: Sequence[LayoutRule]) -> Iterator[Finding]:
    """Yield one finding for all equal paths that the same rules match."""
    groups: dict[tuple[LayoutRule, ...], list[str]] = {}
    for path in paths:
        matching = tuple(matching_rules(rules, path))
        if len(matching) > 1:
            groups.setdefault(matching, []).append(path)
    for matching, matched in groups.items():
        patterns = ", ".join(repr(rule.pattern) for rule in matching)
        for name in fold_names(matched):
            problem = f"{kind} {str(name)!r} matches {len(matching)} layout rules: {patterns}"
            advice = "make each path match at most one"
            yield Finding("ambiguous-path", "error", problem, advice, matching[0].pattern, name.members)


def _wrong_ranks(variables: Iterable[VariableInfo], rules: Sequence[LayoutRule]) -> Iterator[Finding]:
    """Yield one finding for all variables of a shape that a rule has too many or too few entries for."""
    groups: dict[tuple[LayoutRule, Shape], list[str]] = {}
    for variable in variables:
        rule = next(iter(matching_rules(rules, variable.path)), None)
        if rule is not None and len(rule.axes) != len(variable.shape):
            groups.setdefault((rule, variable.shape), []).append(variable.path)
    for (rule, shape), paths in groups.items():
        for name in fold_names(paths):
            problem = (
                f"layout rule {rule} has {len(rule.axes)} entries, variable {str(name)!r} of shape {shape} has "
                f"{len(shape)} dims"
            )
            yield Finding("wrong-rank", "error", problem, "write one entry per dim", rule.pattern, name.members)


def _unmatched_rules(
    rules: Sequence[LayoutRule], variables: Mapping[str, VariableInfo], layer_paths: Mapping[str, str]
) -> list[LayoutRule]:
    """Return the rules that match no path at all; one that shares all its paths with other rules is none of them."""
    paths = [*(variable.path for variable in variables.values()), *(f"{path}/output" for path in layer_paths.values())]
    return [rule for rule in rules if not any(map(rule.matches, paths))]


def _unmatched(rule: LayoutRule, variables: Mapping[str, VariableInfo], severity: Severity) -> Finding:
    paths = [variable.path for variable in variables.values()]
    found = [path for path in paths if re.search(rule.pattern, path)]
    if found:
        return Finding(
            "partial-match",
            severity,
            f"layout rule {rule.pattern!r} matches no variable as a whole, but a part of {found[0]!r}",
            f"Keras matches whole paths: write '.*{rule.pattern}.*' or the full path",
            rule.pattern,
        )
    literal = re.sub(r"\\(.)", r"\1", re.sub(r"\.\*|[\^$()]", "", rule.pattern))
    closest = difflib.get_close_matches(literal, paths, n=1, cutoff=0.0)
    hint = f"closest: {closest[0]!r}" if closest else ""
    problem = f"layout rule {rule.pattern!r} matches no variable"
    return Finding("unmatched-rule", severity, problem, hint, rule.pattern)
