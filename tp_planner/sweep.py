"""Sweep: plan one model at several sizes of a mesh axis."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from tp_planner.frontend.training_loss import TrainingLoss
from tp_planner.ir.degrees import Degree, Sweep
from tp_planner.ir.errors import PlanError
from tp_planner.ir.figures import figures_of
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.plan import Plan
from tp_planner.passes.compare_plans import layer_name
from tp_planner.planner import make_plan


def sweep(
    model: keras.Model,
    rules: Sequence[LayoutRule],
    axis: str,
    sizes: Sequence[int],
    inputs: Any = None,
    optimizer: keras.optimizers.Optimizer | None = None,
    loss: TrainingLoss | None = None,
) -> Sweep:
    """Return what becomes of ``model`` under ``rules`` at each of ``sizes`` of ``axis``; the model is as before.

    Other axes that the rules name get size 1. ``inputs``, ``optimizer`` and ``loss`` are those of ``make_plan``.

    Raises:
        PlanError: if no rule names ``axis``, or if every size is refused for the same reason.
    """
    named = _axes(rules)
    if axis not in named:
        raise PlanError(
            f"no layout rule names mesh axis {axis!r}; the rules name {', '.join(map(repr, named)) or 'none'}"
        )
    others = tuple(name for name in named if name != axis)
    make = functools.partial(make_plan, model, inputs=inputs, optimizer=optimizer, loss=loss)
    planned = [_plan_at(make, rules, others, axis, size) for size in sizes]
    degrees = tuple(_degree(size, plan) for size, plan in zip(sizes, planned, strict=True))
    plans = [plan for plan in planned if isinstance(plan, Plan)]
    if not plans and len({degree.problems for degree in degrees}) == 1:
        raise PlanError(degrees[0].problems)
    shown = tuple("x".join(map(str, shape)) + f" {dtype}" for shape, dtype in plans[0].inputs) if plans else ()
    return Sweep(model.name, axis, others, shown, degrees)


def _axes(rules: Sequence[LayoutRule]) -> tuple[str, ...]:
    """Return the mesh axes that the rules name, in order of first appearance."""
    entries = [entry for rule in rules for entry in rule.axes if entry]
    return tuple(dict.fromkeys(name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry)))


def _plan_at(
    make: Callable[[Layout], Plan], rules: Sequence[LayoutRule], others: Sequence[str], axis: str, size: int
) -> Plan | PlanError:
    mesh = Mesh((*((name, 1) for name in others), (axis, size)))  # layers are split over the last axis, if all are 1
    try:
        return make(Layout(mesh, tuple(rules)))
    except PlanError as error:
        return error


def _degree(size: int, plan: Plan | PlanError) -> Degree:
    if isinstance(plan, PlanError):
        return Degree(size, None, (), (), (), plan.problems)
    gathered = [layer for layer in plan.layers if layer.style == "gathered"]
    left_early = [
        layer for layer in plan.layers if layer.output is not None and layer.output.forward.collective == "all_gather"
    ]
    return Degree(
        size=size,
        figures=figures_of(plan),
        gathered=tuple((layer_name(layer), layer.reason) for layer in gathered),
        left_early=tuple((layer_name(layer), layer.reason) for layer in left_early),
        notes=plan.notes,
        problems=(),
    )
