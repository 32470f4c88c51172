"""Resolve rules: decide for every variable which layout rule places it, and how.

All problems of a layout are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tp_planner.ir.errors import PlanError
from tp_planner.ir.graph import VariableInfo
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.names import fold_names
from tp_planner.ir.placement import WHOLE, Placement, Replicate, Shard, chunk_sizes_text
from tp_planner.ir.plan import RuleReport
from tp_planner.passes.check_rules import check_rules, matching_rules


@dataclass(frozen=True, slots=True)
class Resolved:
    """One variable's placement on the model axis, the pattern that decided and why, and that on the batch axis."""

    placement: Placement
    rule: str | None
    reason: str
    batch_placement: Placement = WHOLE


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
    findings = check_rules(layout, variables, layer_paths)
    if any(finding.severity == "error" for finding in findings):
        raise PlanError(finding.text for finding in findings)
    owner = {key: _naming(layout, variable.path) for key, variable in variables.items()}
    outputs = {name: _naming(layout, f"{path}/output") for name, path in layer_paths.items()}
    named = {name: rule for name, rule in outputs.items() if rule is not None}
    resolved = {key: _resolve(variable, owner[key], layout.mesh) for key, variable in variables.items()}
    reports = tuple(_report(rule, owner, named) for rule in layout.rules)
    return Resolution(
        resolved, named, reports, (*(finding.text for finding in findings), *_kept_whole(resolved, variables))
    )


def _kept_whole(resolved: Mapping[str, Resolved], variables: Mapping[str, VariableInfo]) -> Iterator[str]:
    """Yield a note for all equal variables that one rule names in vain."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key, each in resolved.items():
        if each.rule is not None and each.reason == variables[key].kept_whole:
            groups.setdefault((each.rule, each.reason), []).append(variables[key].path)
    for (rule, reason), paths in groups.items():
        for name in fold_names(paths):
            yield f"variable {str(name)!r} is named by layout rule {rule!r} but stays whole: {reason}"


def _naming(layout: Layout, path: str) -> LayoutRule | None:
    return next(iter(matching_rules(layout.rules, path)), None)


def _report(rule: LayoutRule, owner: Mapping[str, LayoutRule | None], outputs: Mapping[str, LayoutRule]) -> RuleReport:
    return RuleReport(
        rule,
        tuple(key for key, chosen in owner.items() if chosen is rule),
        tuple(name for name, chosen in outputs.items() if chosen is rule),
    )


def sharded_dim(rule: LayoutRule, axis: str) -> int | None:
    """Return the dim that the rule shards over ``axis``, or None."""
    for dim, entry in enumerate(rule.axes):
        if entry == axis or (isinstance(entry, tuple) and axis in entry):
            return dim
    return None


def _resolve(variable: VariableInfo, rule: LayoutRule | None, mesh: Mesh) -> Resolved:
    if rule is None:
        return Resolved(Replicate(), None, "no layout rule names it")
    axis, parts = mesh.model_axis, mesh.axis_size(mesh.model_axis)
    dim, batch_dim = sharded_dim(rule, axis), _batch_dim(rule, mesh)
    whole_in_replica = dim is None or parts == 1
    if variable.kept_whole and not (whole_in_replica and batch_dim is None):
        return Resolved(Replicate(), rule.pattern, variable.kept_whole)
    across, stored = Replicate() if batch_dim is None else Shard(batch_dim), ""
    if batch_dim is not None:
        stored = f"; stored in {mesh.replicas} parts over {mesh.batch_axis!r}, put together for use"
    if dim is None:
        return Resolved(Replicate(), rule.pattern, f"rule {rule} does not shard it over {axis!r}{stored}", across)
    if parts == 1:
        return Resolved(Replicate(), rule.pattern, f"mesh axis {axis!r} has size 1{stored}", across)
    uneven = ""
    if variable.shape[dim] % parts:
        length = variable.shape[dim]
        uneven = f"; {length} does not divide by {parts}, so ranks hold {chunk_sizes_text(length, parts)}"
    return Resolved(Shard(dim), rule.pattern, f"rule {rule}{uneven}{stored}", across)


def _batch_dim(rule: LayoutRule, mesh: Mesh) -> int | None:
    """Return the dim that the rule shards over the batch axis, where that has more than one rank."""
    return sharded_dim(rule, mesh.batch_axis) if mesh.batch_axis is not None and mesh.replicas > 1 else None
