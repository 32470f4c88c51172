"""The linter: everything that is worth knowing about a layout for a model, found at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import keras

from tp_planner.frontend.blocks import find_blocks
from tp_planner.frontend.layout_map import read_layout_map, read_zero
from tp_planner.frontend.quick_rules import require_quick_rules
from tp_planner.frontend.survey import survey
from tp_planner.frontend.trace import require_built, trace
from tp_planner.ir.errors import PlanError
from tp_planner.ir.finding import Finding, LintReport
from tp_planner.ir.graph import ModelGraph
from tp_planner.ir.layout import Layout, Zero
from tp_planner.ir.plan import Plan
from tp_planner.passes.check_rules import check_rules
from tp_planner.passes.correct_layout import Strain, find_strains, propose_corrections
from tp_planner.passes.lint_layout import (
    Adopted,
    cost,
    lint_plan,
    list_effects,
    sorted_by_severity,
)
from tp_planner.passes.lint_mesh import lint_nodes, lint_replicas
from tp_planner.passes.lint_rules import lint_rules
from tp_planner.planner import make_plan


def lint(
    model: keras.Model,
    layout_map: keras.distribution.LayoutMap | Layout,
    inputs: Any = None,
    zero: Zero | None = None,
    devices_per_node: int | None = None,
) -> tuple[Finding, ...]:
    """Return all findings about ``layout_map`` for ``model``, errors first; the model is as before.

    Args:
        model: a built Keras model on the torch backend, on any device ("meta" for one that fits nowhere).
        layout_map: as for ``plan``.
        inputs: as for ``plan``.
        zero: as for ``plan``.
        devices_per_node: how many devices fast links connect, neighbours in the order of the mesh; None for all.

    Raises:
        PlanError: if model, mesh or inputs cannot be planned under any rules.

    >>> for finding in lint(model, layout_map):  # doctest: +SKIP
    ...     print(finding.severity, finding.code, finding.text)
    """
    return examine(model, layout_map, inputs, zero=zero, devices_per_node=devices_per_node).findings


def examine(
    model: keras.Model,
    layout_map: keras.distribution.LayoutMap | Layout,
    inputs: Any = None,
    name: str = "layout",
    zero: Zero | None = None,
    devices_per_node: int | None = None,
) -> LintReport:
    """Return what ``lint`` finds, with what becomes of every variable; ``name`` is what the layout is called.

    A layout with errors is not planned: only what its rules say can then be looked at.
    """
    require_built(model)
    layout = read_layout_map(layout_map)
    if zero is not None:
        layout = replace(layout, zero=read_zero(zero))
    layers, variables = survey(model)
    require_quick_rules(layout.rules, layers, variables)
    found = check_rules(layout, variables, {name: layer.path for name, layer in layers.items()})
    findings = lint_rules(layout, layers, variables, found)
    if devices_per_node is not None:
        findings += tuple(lint_nodes(layout.mesh, devices_per_node))
    plan = None
    if not any(finding.severity == "error" for finding in found):
        graph = trace(model, inputs, blocks=find_blocks(model))
        try:
            plan = make_plan(model, layout, inputs)
            adopted, strains = _correct(layout, plan, graph, _planner(model, inputs))
            findings += (*lint_replicas(plan), *lint_plan(plan, layers, variables, adopted, strains))
        except PlanError as refusal:
            findings += (Finding("no-plan", "error", str(refusal)),)
    return LintReport(
        layout=name,
        model=model.name,
        mesh=layout.mesh,
        rules=layout.rules,
        findings=sorted_by_severity(findings),
        variables=list_effects(layout, variables, plan),
    )


def _correct(
    layout: Layout, plan: Plan, graph: ModelGraph, plan_of: Callable[[Layout], Plan | None]
) -> tuple[tuple[Adopted, ...], tuple[Strain, ...]]:
    """Return the changes that make the plan cheaper, the best one first, and the strains that none of them ends."""
    adopted: list[Adopted] = []
    while True:
        settled = {path for each in adopted for path in each.correction.weights}
        strains = tuple(strain for strain in find_strains(plan, graph) if settled.isdisjoint(strain.weights))
        best = _best_change(layout, plan, graph, strains, plan_of)
        if best is None:
            return tuple(adopted), strains
        adopted.append(best)
        layout, plan = best.correction.applied_to(layout), best.after


def _best_change(
    layout: Layout,
    plan: Plan,
    graph: ModelGraph,
    strains: Sequence[Strain],
    plan_of: Callable[[Layout], Plan | None],
) -> Adopted | None:
    """Return the change that makes the plan cheapest, or the first one that leaves no strain; None if none helps."""
    best: Adopted | None = None
    for strain in strains:
        for correction in propose_corrections(layout, plan, graph, strain):
            after = plan_of(correction.applied_to(layout))
            if after is not None and cost(after) < cost(best.after if best else plan):
                best = Adopted(correction, plan, after)
        if best is not None and not find_strains(best.after, graph):
            break
    return best


def _planner(model: keras.Model, inputs: Any) -> Callable[[Layout], Plan | None]:
    """Return a function that plans the model under a proposed layout, each only once; None where there is no plan."""

    @cache
    def plan_of(layout: Layout) -> Plan | None:
        try:
            return make_plan(model, layout, inputs)
        except PlanError:
            return None

    return plan_of
