"""Lint rules: what patterns and names tell beyond what makes a layout wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from tp_planner.ir.finding import Finding, some_of
from tp_planner.ir.graph import LayerInfo, VariableInfo
from tp_planner.ir.layout import Layout
from tp_planner.ir.placement import Shape
from tp_planner.passes.check_rules import matching_rules, well_formed
from tp_planner.passes.correct_layout import patterns_of


def lint_rules(
    layout: Layout, layers: Mapping[str, LayerInfo], variables: Mapping[str, VariableInfo], found: Sequence[Finding]
) -> tuple[Finding, ...]:
    """Return what the rules and the names of the variables tell; ``found`` is what ``check_rules`` says of them.

    Raises PlanError if two axes of the mesh are larger than 1.
    """
    explained = [_explained_by_tying(finding, layers, variables) for finding in found]
    return (
        *_one_rank(layout),
        *explained,
        *_shadowed(layout, layers, variables),
        *_number_gaps(layout, variables),
    )


def _one_rank(layout: Layout) -> Iterator[Finding]:
    mesh = layout.mesh
    if mesh.size == 1:
        problem = f"mesh ({mesh}) has one rank: nothing is sharded"
        yield Finding("one-rank", "info", problem, "give the mesh the size that the layout is for")
    elif mesh.axis_size(mesh.model_axis) == 1 and layout.rules:
        yield Finding(
            "one-rank",
            "warning",
            f"axis {mesh.model_axis!r} of mesh ({mesh}) has one rank: layers are not split, the batch is over "
            f"{mesh.batch_axis!r}",
            f"give {mesh.model_axis!r} the size that the layout is for",
        )


def _explained_by_tying(
    finding: Finding, layers: Mapping[str, LayerInfo], variables: Mapping[str, VariableInfo]
) -> Finding:
    """Return the finding that a rule matches nothing, or why: its layer uses a variable of another name."""
    if finding.code != "unmatched-rule" or finding.rule is None:
        return finding
    for layer in layers.values():
        shared = _shared_variable(layer, variables)
        if shared is not None and _names_layer(finding.rule, layer.path):
            return replace(
                finding,
                code="tied-weight",
                problem=f"{finding.problem}: layer {layer.path!r} is tied, its weight is {shared!r}",
                advice=f"one tensor has one placement: remove the rule, and place the weight by its path {shared!r}",
                paths=(shared,),
            )
    return finding


def _shared_variable(layer: LayerInfo, variables: Mapping[str, VariableInfo]) -> str | None:
    """Return the path of a variable that the layer shares with another one, or uses in two ways."""
    foreign = [key for key in layer.variables if variables[key].owner != layer.name]
    mains = [contraction.main_weight for _, contraction in layer.contractions]
    twice = [key for key in mains if mains.count(key) > 1]
    return next((variables[key].path for key in foreign + twice), None)


def _names_layer(pattern: str, path: str) -> bool:
    """Whether the pattern without its last part, the variable's name, matches the layer's path."""
    try:
        return re.fullmatch(pattern.rpartition("/")[0], path) is not None
    except re.error:  # the last slash stands inside a group
        return False


def _shadowed(
    layout: Layout, layers: Mapping[str, LayerInfo], variables: Mapping[str, VariableInfo]
) -> Iterator[Finding]:
    """Yield the rules that place nothing, because every path that they match is the exact pattern of another rule."""
    rules = well_formed(layout)
    paths = [variable.path for variable in variables.values()]
    paths += [f"{layer.path}/output" for layer in layers.values()]
    for rule in rules:
        matched = [path for path in paths if path == rule.pattern or re.fullmatch(rule.pattern, path)]
        if matched and not any(rule in matching_rules(rules, path) for path in matched):
            yield Finding(
                "shadowed-rule",
                "warning",
                f"layout rule {rule.pattern!r} matches {some_of(matched)}, but places nothing: "
                f"exact paths go before patterns",
                f"remove it, or the rule {matched[0]!r}",
                rule.pattern,
                tuple(matched),
            )


def _number_gaps(layout: Layout, variables: Mapping[str, VariableInfo]) -> Iterator[Finding]:
    """Yield the patterns that miss variables of equal blocks: path and shape differ from a match in a number only."""
    rules = well_formed(layout)
    named: dict[tuple[str, Shape], list[tuple[str, str]]] = {}
    unnamed: dict[tuple[str, Shape], list[str]] = {}
    for variable in variables.values():
        alike = (re.sub(r"\d+", "*", variable.path), variable.shape)
        matching = matching_rules(rules, variable.path)
        if not matching:
            unnamed.setdefault(alike, []).append(variable.path)
        elif matching[0].pattern != variable.path:
            named.setdefault(alike, []).append((matching[0].pattern, variable.path))
    for alike, missed in unnamed.items():
        for pattern in dict.fromkeys(pattern for pattern, _ in named.get(alike, ())):
            matched = [path for by, path in named[alike] if by == pattern]
            yield Finding(
                "number-gap",
                "warning",
                f"layout rule {pattern!r} matches {some_of(matched)}, but not {some_of(missed)}, "
                f"which {'differs' if len(missed) == 1 else 'differ'} from it in numbers only",
                f"match every number, as {patterns_of([*matched, *missed])[0]!r} does",
                pattern,
                tuple(missed),
            )
