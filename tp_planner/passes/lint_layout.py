"""Lint a layout: what its plan tells that the user should know, and what becomes of every variable.

What a layout costs is read off its plan; what another one would cost, off the plan of that other one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tp_planner.ir.finding import SEVERITIES, Finding, VariableEffect, count_of, some_of
from tp_planner.ir.graph import LayerInfo, VariableInfo
from tp_planner.ir.layout import Layout
from tp_planner.ir.placement import WHOLE, Placement, Replicate, Shape, Shard, chunk_sizes_text, divides, without_parts
from tp_planner.ir.plan import Plan, VariablePlan
from tp_planner.ir.step import Collective
from tp_planner.passes.check_rules import matching_rules, well_formed
from tp_planner.passes.correct_layout import Correction, Strain, axes_with, bias_dim, rules_to_write

LARGE_SHARE = 10  # in percent of what a rank stores, from which on variables without a rule are worth a line


@dataclass(frozen=True, slots=True)
class Adopted:
    """A correction that makes the plan cheaper, and the plans without and with it."""

    correction: Correction
    before: Plan
    after: Plan


def lint_plan(
    plan: Plan,
    layers: Mapping[str, LayerInfo],
    variables: Mapping[str, VariableInfo],
    adopted: Sequence[Adopted] = (),
    strains: Sequence[Strain] = (),
) -> tuple[Finding, ...]:
    """Return what the plan of a layout tells.

    Args:
        plan: the layout's plan.
        layers: the model's layers by name.
        variables: the model's variables by key.
        adopted: corrections that make the plan cheaper.
        strains: layers without a partner, for which no correction does.
    """
    if plan.axis_size == 1:
        return ()
    if all(variable.placement == Replicate() for variable in plan.variables):
        return (_nothing_sharded(plan),)
    moved = {path for each in adopted for path, _ in each.correction.axes}
    return (
        *_kept_whole(plan, variables),
        *_uneven(plan),
        *(_corrected(each, "With the corrections above a" if number else "A") for number, each in enumerate(adopted)),
        *(_strained(plan, strain) for strain in strains),
        *_biases(plan, layers, moved),
        *_gathered(plan, layers),
        *_output_rules(plan),
        *_unnamed(plan),
    )


def sorted_by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings, errors first; those of one severity keep their order."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


def list_effects(
    layout: Layout, variables: Mapping[str, VariableInfo], plan: Plan | None
) -> tuple[VariableEffect, ...]:
    """Return what becomes of every variable, in the model's order."""
    rules = well_formed(layout)
    planned = {variable.key: variable for variable in plan.variables} if plan else {}
    styles = _styles(plan) if plan else {}
    return tuple(
        VariableEffect(
            path=variable.path,
            shape=variable.shape,
            itemsize=variable.itemsize,
            rules=tuple(rule.pattern for rule in matching_rules(rules, variable.path)),
            placement=planned[key].placement if key in planned else None,
            local_shape=planned[key].local_shape if key in planned else None,
            style=", ".join(styles.get(key, {})),
            batch_placement=planned[key].batch_placement if key in planned else WHOLE,
            slot_placement=planned[key].slot_placement if key in planned else WHOLE,
        )
        for key, variable in variables.items()
    )


def cost(plan: Plan) -> tuple[int, int]:
    """Return the bytes that a rank sends in a training step, and those it stores: the better plan has the less."""
    return sum(collective.wire_bytes for collective in plan.collectives), _stored(plan)


def _nothing_sharded(plan: Plan) -> Finding:
    return Finding(
        "nothing-sharded",
        "warning",
        f"no layout rule shards a variable over {plan.axis!r}, the axis of mesh ({plan.mesh}) that has "
        f"{plan.axis_size} ranks: each of them stores and computes the whole model",
        f"name {plan.axis!r} in the rules, or give the size to the axis that they name",
    )


def _kept_whole(plan: Plan, variables: Mapping[str, VariableInfo]) -> Iterator[Finding]:
    for variable in plan.variables:
        if variable.rule is not None and variable.reason == variables[variable.key].kept_whole:
            yield Finding(
                "kept-whole",
                "warning",
                f"layout rule {variable.rule!r} names variable {variable.path!r}, which stays whole: {variable.reason}",
                "make the pattern narrower, so that it does not match it",
                variable.rule,
                (variable.path,),
            )


def _uneven(plan: Plan) -> Iterator[Finding]:
    """Yield the variables gathered because their sharded dim does not divide, by rule and length of the dim."""
    styles = _styles(plan)
    groups: dict[tuple[str, int, int], list[VariablePlan]] = {}
    for variable in plan.variables:
        in_parts = styles.get(variable.key, {}).keys() <= {"vocabulary", "column"} and variable.key in styles
        if isinstance(variable.placement, Shard) and not _is_even(variable, plan) and not in_parts:
            dim = variable.placement.dim
            groups.setdefault((variable.rule or "", dim, variable.shape[dim]), []).append(variable)
    for (rule, dim, length), members in groups.items():
        yield (_short if length < plan.axis_size else _indivisible)(plan, rule, dim, length, members)


def _short(plan: Plan, rule: str, dim: int, length: int, members: Sequence[VariablePlan]) -> Finding:
    paths = tuple(variable.path for variable in members)
    empty = plan.axis_size - length
    return Finding(
        "short-dim",
        "warning",
        f"layout rule {rule!r} shards dim {dim} of {some_of(paths)}, of length {length}, over {plan.axis_size} ranks: "
        f"{empty} of them store nothing of it, and it is gathered at use. "
        f"That takes {_own_cost(plan, members)}",
        f"use {length} ranks, or take {_them(paths)} out of the rule: then a rank stores {_size(members)} more",
        rule,
        paths,
    )


def _indivisible(plan: Plan, rule: str, dim: int, length: int, members: Sequence[VariablePlan]) -> Finding:
    paths = tuple(variable.path for variable in members)
    sizes = chunk_sizes_text(length, plan.axis_size)
    return Finding(
        "uneven-dim",
        "warning",
        f"layout rule {rule!r} shards dim {dim} of {some_of(paths)}, of length {length}, over {plan.axis_size} ranks: "
        f"they store {sizes} of it, and it is gathered at use. That takes {_own_cost(plan, members)}",
        f"use a number of ranks that divides {length}, or take {_them(paths)} out of the rule: "
        f"then a rank stores {_size(members)} more",
        rule,
        paths,
    )


def _corrected(adopted: Adopted, given: str) -> Finding:
    correction, before = adopted.correction, adopted.before
    rules = rules_to_write(correction, before)
    own = {variable.path for variable in before.variables if variable.rule == correction.rule}
    also = "" if correction.rule is None or own <= dict(correction.axes).keys() else _apart(correction.rule, rules)
    now, then = _plan_costs(before, adopted.after)
    strain = _strain_text(correction.code, correction.rule, correction.weights, before)
    return Finding(
        correction.code,
        "warning",
        f"{strain}. {given} training step takes {now}",
        f"write {' and '.join(map(str, rules))}{also}: {then}",
        correction.rule,
        correction.weights,
    )


def _plan_costs(before: Plan, after: Plan) -> tuple[str, str]:
    """Return what each of two plans costs, with what a rank stores where that is not the same."""
    costs = []
    for plan in (before, after):
        stored = f", and {_stored(plan)} bytes of variables per rank" if _stored(before) != _stored(after) else ""
        costs.append(_cost(plan.collectives) + stored)
    return costs[0], costs[1]


def _apart(rule: str, rules: Sequence[object]) -> str:
    return f", and keep rule {rule!r} off {_them(rules)}"


def _strain_text(code: str, rule: str | None, weights: Sequence[str], plan: Plan) -> str:
    if code == "missing-rule":
        return f"no layout rule names {some_of(weights)}, beside layers that are sharded"
    variable = next(variable for variable in plan.variables if variable.path == weights[0])
    assert isinstance(variable.placement, Shard)
    shards = f"layout rule {rule!r} shards dim {variable.placement.dim} of {some_of(weights)}"
    layer = next(layer for layer in plan.layers if variable.key in {use.variable for use in layer.uses})
    if code == "contracted-dim":
        tensor = layer.inputs[0][1].tensor if layer.inputs else "the input"
        return f"{shards}; this dim is contracted with a whole tensor, {tensor!r}, and the output summed over the ranks"
    if layer.output is None:
        return f"{shards}; the output meets a whole tensor, which is cut for it"
    return f"{shards}; the output is made whole ({layer.reason})"


def _strained(plan: Plan, strain: Strain) -> Finding:
    layers = {layer for layer, _ in strain.layers}
    cost = _cost([each for each in plan.collectives if each.layer in layers])
    return Finding(
        strain.code,
        "info",
        f"{_strain_text(strain.code, strain.rule, strain.weights, plan)}. That takes {cost}",
        "no other dim was found to be cheaper",
        strain.rule,
        strain.weights,
    )


def _biases(plan: Plan, layers: Mapping[str, LayerInfo], moved: set[str]) -> Iterator[Finding]:
    """Yield the biases that are placed in another way than their kernel's sharding needs, by rules."""
    groups: dict[tuple[str | None, str | None, Placement, int | None], list[tuple[VariablePlan, VariablePlan]]] = {}
    for kernel, bias, dim in _kernels_with_biases(plan, layers):
        needed = Replicate() if dim is None else Shard(dim)
        settled = kernel.path in moved or bias.path in moved or not _is_even(kernel, plan)
        if without_parts(bias.placement) != needed and not settled:
            groups.setdefault((kernel.rule, bias.rule, kernel.placement, dim), []).append((kernel, bias))
    for (_, rule, _, dim), pairs in groups.items():
        yield _bias_mismatch(plan, rule, dim, [kernel for kernel, _ in pairs], [bias for _, bias in pairs])


def _kernels_with_biases(
    plan: Plan, layers: Mapping[str, LayerInfo]
) -> Iterator[tuple[VariablePlan, VariablePlan, int | None]]:
    """Yield the kernel and the bias of each contraction that has both, and the dim the bias should be sharded on."""
    variables = {variable.key: variable for variable in plan.variables}
    for layer in layers.values():
        for _, contraction in layer.contractions[:1]:
            if contraction.bias is not None:
                kernel = variables[contraction.main_weight]
                dim = bias_dim(contraction, kernel.placement.dim) if isinstance(kernel.placement, Shard) else None
                yield kernel, variables[contraction.bias], dim


def _bias_mismatch(
    plan: Plan, rule: str | None, dim: int | None, kernels: Sequence[VariablePlan], biases: Sequence[VariablePlan]
) -> Finding:
    paths = tuple(bias.path for bias in biases)
    axes = tuple((bias.path, axes_with(plan.axis, dim, len(bias.shape))) for bias in biases)
    rules = rules_to_write(Correction("bias-mismatch", rule, paths, axes), plan)
    are, its = ("is", "its bias is") if len(biases) == 1 else ("are", "their biases are")
    needed = "whole" if dim is None else f"sharded on dim {dim}"
    return Finding(
        "bias-mismatch",
        "warning",
        f"{some_of([kernel.path for kernel in kernels])} {are} {_placed(kernels[0])}, "
        f"but {its} {_placed(biases[0])}, not {needed}. That takes {_own_cost(plan, biases)}",
        f"take {_them(paths)} out of rule {rule!r}" if dim is None else f"write {' and '.join(map(str, rules))}",
        rule,
        paths,
    )


def _them(members: Sequence[object]) -> str:
    return "it" if len(members) == 1 else "them"


def _placed(variable: VariablePlan) -> str:
    return f"sharded on dim {variable.placement.dim}" if isinstance(variable.placement, Shard) else "whole"


def _gathered(plan: Plan, layers: Mapping[str, LayerInfo]) -> Iterator[Finding]:
    """Yield the variables that are stored sharded and put together at each use, by rule."""
    variables = {variable.key: variable for variable in plan.variables}
    biases = {contraction.bias for layer in layers.values() for _, contraction in layer.contractions}
    groups: dict[str, dict[str, str]] = {}
    for layer in plan.layers:
        for use in layer.uses:
            variable = variables[use.variable]
            is_gathered = layer.style == "gathered" and use.boundary.forward.collective == "all_gather"
            if is_gathered and variable.key not in biases and _is_even(variable, plan):
                groups.setdefault(variable.rule or "", {}).setdefault(variable.key, layer.reason)
    for rule, reasons in groups.items():
        members = [variables[key] for key in reasons]
        paths = tuple(variable.path for variable in members)
        yield Finding(
            "gathered-weight",
            "warning",
            f"layout rule {rule!r} shards {some_of(paths)}, but shards are of no use there "
            f"({next(iter(reasons.values()))}). That takes {_own_cost(plan, members)}",
            f"take {_them(paths)} out of the rule: then a rank stores {_size(members)} more",
            rule,
            paths,
        )


def _is_even(variable: VariablePlan, plan: Plan) -> bool:
    return divides(variable.shape, variable.placement, plan.axis_size)


def _output_rules(plan: Plan) -> Iterator[Finding]:
    """Yield the plan's notes on rules that name outputs."""
    for report in plan.rules:
        for note in plan.notes:
            if report.outputs and note.startswith(f"layout rule {report.rule} "):
                paths = tuple(f"{layer}/output" for layer in report.outputs)
                yield Finding("output-rule", "warning", note, "remove the rule", report.rule.pattern, paths)


def _unnamed(plan: Plan) -> Iterator[Finding]:
    """Yield what no rule names, where that is a large part of what each rank stores."""
    stored = _stored(plan)
    unnamed = [variable for variable in plan.variables if variable.rule is None]
    size = sum(_bytes(variable.shape, variable) for variable in unnamed)
    if not unnamed or 100 * size < LARGE_SHARE * stored:
        return
    largest = max(unnamed, key=lambda variable: _bytes(variable.shape, variable))
    yield Finding(
        "unnamed-variables",
        "info",
        f"no layout rule names {count_of(len(unnamed), 'variable')}, which every rank stores whole: {size} of its "
        f"{stored} bytes ({100 * size // stored}%), {_bytes(largest.shape, largest)} of them for {largest.path!r} "
        f"of shape {largest.shape}",
        "write a rule for the large ones if ranks are short of memory",
        paths=tuple(variable.path for variable in unnamed),
    )


# Words


def _styles(plan: Plan) -> dict[str, dict[str, None]]:
    """Return the styles of the layers that use each variable in another way than whole as it is stored, by its key."""
    styles: dict[str, dict[str, None]] = {}
    for layer in plan.layers:
        for use in layer.uses:
            styles.setdefault(use.variable, {})[layer.style] = None
    return styles


def _cost(collectives: Sequence[Collective]) -> str:
    size = sum(collective.wire_bytes for collective in collectives)
    return f"{count_of(len(collectives), 'collective')}, in which a rank sends {size} bytes"


def _own_cost(plan: Plan, members: Sequence[VariablePlan]) -> str:
    """Return the cost of these variables' own collectives in a training step."""
    keys = {variable.key for variable in members}
    return _cost([collective for collective in plan.collectives if collective.place in keys])


def _stored(plan: Plan) -> int:
    return sum(_bytes(variable.local_shape, variable) for variable in plan.variables)


def _size(members: Iterable[VariablePlan]) -> str:
    size = sum(_bytes(each.shape, each) - _bytes(each.local_shape, each) for each in members)
    return f"{size} bytes"


def _bytes(shape: Shape, variable: VariablePlan) -> int:
    size = variable.itemsize
    for length in shape:
        size *= length
    return size
