"""The linter: everything that is worth knowing about a layout for a model, found at once."""

from __future__ import annotations

from typing import Any

import keras

from tp_planner.frontend.layout_map import read_layout_map
from tp_planner.frontend.survey import survey
from tp_planner.frontend.trace import require_built, trace
from tp_planner.ir.errors import PlanError
from tp_planner.ir.finding import Finding, LintReport
from tp_planner.ir.graph import ModelGraph
from tp_planner.ir.layout import Layout
from tp_planner.ir.plan import Plan
from tp_planner.passes.check_rules import check_rules
from tp_planner.passes.correct_layout import Strain, find_strains, propose_corrections
from tp_planner.passes.lint_layout import Adopted, lint_layout, list_effects, wire_bytes
from tp_planner.planner import make_plan


def lint(
    model: keras.Model, layout_map: keras.distribution.LayoutMap | Layout, inputs: Any = None
) -> tuple[Finding, ...]:
    """Return all findings about ``layout_map`` for ``model``, errors first; the model is as before.

    Args:
        model: a built Keras model on the torch backend, on any device ("meta" for one that fits nowhere).
        layout_map: as for ``plan``.
        inputs: as for ``plan``.

    Raises:
        PlanError: if model, mesh or inputs cannot be planned under any rules.

    >>> for finding in lint(model, layout_map):  # doctest: +SKIP
    ...     print(finding.severity, finding.code, finding.text)
    """
    return examine(model, layout_map, inputs).findings


def examine(model: keras.Model, layout_map: keras.distribution.LayoutMap | Layout, inputs: Any = None) -> LintReport:
    """Return what ``lint`` finds, with what becomes of every variable.

    A layout with errors is not planned: only what its rules say can then be looked at.
    """
    require_built(model)
    layout = read_layout_map(layout_map)
    layers, variables = survey(model)
    found = check_rules(layout, variables, {name: layer.path for name, layer in layers.items()})
    plan, adopted, remaining = None, (), ()
    if not any(finding.severity == "error" for finding in found):
        plan = make_plan(model, layout, inputs)
        graph = trace(model, inputs, training=False)
        adopted, remaining = _correct(model, layout, inputs, plan, graph)
    return LintReport(
        model=model.name,
        mesh=layout.mesh,
        rules=layout.rules,
        findings=lint_layout(layout, layers, variables, found, plan, adopted, remaining),
        variables=list_effects(layout, variables, plan),
    )


def _correct(
    model: keras.Model, layout: Layout, inputs: Any, plan: Plan, graph: ModelGraph
) -> tuple[tuple[Adopted, ...], tuple[Strain, ...]]:
    """Return the changes that make the plan cheaper, the best one first, and the strains that none of them ends."""
    adopted: list[Adopted] = []
    while strains := find_strains(plan, graph):
        tried = [
            (replanned, correction)
            for correction in propose_corrections(layout, plan, graph, strains)
            if (replanned := _plan_of(model, correction.applied_to(layout), inputs)) is not None
        ]
        best, correction = min(tried, key=lambda pair: wire_bytes(pair[0]), default=(plan, None))
        if correction is None or wire_bytes(best) >= wire_bytes(plan):
            break
        adopted.append(Adopted(correction, plan, best))
        layout, plan = correction.applied_to(layout), best
    return tuple(adopted), strains


def _plan_of(model: keras.Model, layout: Layout, inputs: Any) -> Plan | None:
    """Return the plan under a proposed layout, None where it has none."""
    try:
        return make_plan(model, layout, inputs)
    except PlanError:
        return None
