"""Compare plans: all that one plan has otherwise than another, down to each property of each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from tp_planner.ir.difference import AmountChange, Change, Changed, CollectiveChange, Difference, Unit
from tp_planner.ir.figures import figures_of
from tp_planner.ir.placement import Shape
from tp_planner.ir.plan import Boundary, Gathering, LayerPlan, Plan, RuleReport, VariablePlan
from tp_planner.ir.step import Collective, Holder, MemoryUse, Step

Properties = Mapping[str, str]


def compare_plans(before: Plan, after: Plan) -> Difference:
    """Return what differs from ``before`` to ``after``; it is empty exactly where the plans' JSON is equal."""
    collectives = _changed_collectives(before.collectives, after.collectives)
    amounts = _changed_amounts(before.step, after.step)
    # Other amounts say it shorter.
    held = () if amounts else _changes(_of_holders(before.step), _of_holders(after.step))
    return Difference(
        plan=_changes(_of_plan(before), _of_plan(after)) + _orders(before, after, bool(collectives)) + held,
        rules=_changed(_by_name(before, "rules"), _by_name(after, "rules")),
        variables=_changed(_by_name(before, "variables"), _by_name(after, "variables")),
        layers=_changed(_by_name(before, "layers"), _by_name(after, "layers")),
        collectives=collectives,
        amounts=amounts,
        notes=_changed({note: {} for note in before.notes}, {note: {} for note in after.notes}),
        figures=(figures_of(before), figures_of(after)),
    )


def layer_name(layer: LayerPlan) -> str:
    """Return the layer's name, with the mode of a layer that computes two functions."""
    return f"{layer.layer} [{layer.mode}]" if layer.mode else layer.layer


# --- properties as text --------------------------------------------------------------------------------


def _of_plan(plan: Plan) -> Properties:
    return {
        "model": plan.model,
        "fingerprint of the model": plan.fingerprint,
        "mesh": str(plan.mesh),
        "axis": plan.axis,
        "batch axis": plan.mesh.batch_axis or "",
        "inputs": ", ".join(f"{_shape(shape)} {dtype}" for shape, dtype in plan.inputs),
        "guessed sizes": ", ".join(f"{each.input} dim {each.dim}: {each.size}" for each in plan.guessed),
        "buckets of gradients": "; ".join(f"({', '.join(bucket)})" for bucket in plan.buckets),
        "ZeRO": str(plan.zero),
        "gathers ahead": str(plan.gathers_ahead),
        "gathered together": "; ".join(map(_of_gathering, plan.gatherings)),
        "sequence parallel": "yes" if plan.sequence_parallel else "no",
        "buckets of summands": "; ".join(f"({', '.join(bucket)})" for bucket in plan.sums),
        "gradients of the inputs": "right" if plan.input_gradients else "not right",
        "kernels": plan.device,
        "optimizer": plan.step.optimizer,
        "loss": plan.step.loss,
        "whole update": str(plan.step.whole_update),
        "micro-steps of an update": str(plan.step.micro_steps),
        "phase of the memory peak": plan.step.memory.peak_phase,
    }


def _of_gathering(gathering: Gathering) -> str:
    reads = ", ".join(f"{each.variable} as {each.dtype}" for each in gathering.reads)
    return f"{gathering.layer} ({reads})"


def _of_holders(step: Step) -> Properties:
    return {"held at the memory peak": "; ".join(map(_of_holder, step.holders))}


def _of_holder(holder: Holder) -> str:
    tensor = f"{holder.count} of {holder.dtype} {_shape(holder.shape)}, {holder.bytes} bytes"
    return f"{holder.kind} by {holder.op} in {', '.join(holder.layers)}: {tensor}"


def _by_name(plan: Plan, what: Literal["rules", "variables", "layers"]) -> dict[str, Properties]:
    match what:
        case "rules":
            return {report.rule.pattern: _of_rule(report) for report in plan.rules}
        case "variables":
            return {variable.key: _of_variable(variable) for variable in plan.variables}
        case "layers":
            return {layer_name(layer): _of_layer(layer) for layer in plan.layers}


def _of_rule(report: RuleReport) -> Properties:
    return {
        "axes": str(report.rule).removeprefix(f"{report.rule.pattern!r} -> "),
        "variables": ", ".join(report.variables),
        "outputs": ", ".join(report.outputs),
    }


def _of_variable(variable: VariablePlan) -> Properties:
    """Return what the plan says of a variable; its local shape follows from placement and mesh."""
    return {
        "placement": variable.stored_as,
        "rule": variable.rule or "",
        "reason": variable.reason,
        "shape": _shape(variable.shape),
        "dtype": variable.dtype,
        "bytes of an element": str(variable.itemsize),
        "trainable": "yes" if variable.trainable else "no",
        "path": variable.path,
    }


def _of_layer(layer: LayerPlan) -> Properties:
    properties = {"style": layer.style, "reason": layer.reason}
    for place, boundary in layer.boundaries:
        properties[place] = f"{boundary.forward}, grad {boundary.backward}"
        properties[f"{place}, its tensor"] = _of_tensor(boundary)
    return properties | {
        "sharded inputs": ", ".join(f"{position}: {placement}" for position, placement in layer.sharded_inputs),
        "output placement": "" if layer.output_placement is None else str(layer.output_placement),
        "after the output's boundary": layer.epilogue_after_output,
        "scope of the region": layer.scope,
        "sizes in its code": "; ".join(f"{each}: {each.sizes} {each.scales}" for each in layer.functions),
        "sizes that its code reads": "of the whole" if layer.sees_whole else "",
        "what it makes element by element": "made again" if layer.makes_again else "",
        "order of the dropout mask": _shape(layer.dropout_order) if layer.dropout_order else "",
        "logits stay in shards into the loss": "yes" if layer.into_loss else "no",
        "calls": str(layer.calls),
        "class": layer.class_name,
        "path": layer.path,
    }


def _of_tensor(boundary: Boundary) -> str:
    gradient = "a gradient" if boundary.has_gradient else "no gradient"
    kind = f"{_shape(boundary.shape)} {boundary.dtype} ({boundary.itemsize} bytes)"
    shared = f", shared by {boundary.readers}" if boundary.readers > 1 else ""
    again = ", gathered again" if boundary.again else ""
    behind = ", summed behind those of weights" if boundary.behind else ""
    return f"{boundary.tensor}: {kind}, {gradient}{behind}{shared}{again}"


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"


# --- differences ---------------------------------------------------------------------------------------


def _changes(before: Properties, after: Properties) -> tuple[Change, ...]:
    """Return the properties that differ; a property that is missing and one that is empty are the same."""
    names = dict.fromkeys([*after, *before])
    pairs = ((name, before.get(name, ""), after.get(name, "")) for name in names)
    return tuple(Change(name, old, new) for name, old, new in pairs if old != new)


def _changed(before: Mapping[str, Properties], after: Mapping[str, Properties]) -> tuple[Changed, ...]:
    found = []
    for name, properties in after.items():
        changes = _changes(before.get(name, {}), properties)
        if name not in before:
            found.append(Changed(name, "added", changes))
        elif changes:
            found.append(Changed(name, "changed", changes))
    found += [Changed(name, "removed", _changes(old, {})) for name, old in before.items() if name not in after]
    return tuple(found)


def _changed_collectives(before: tuple[Collective, ...], after: tuple[Collective, ...]) -> tuple[CollectiveChange, ...]:
    had, has = Counter(before), Counter(after)
    return tuple(
        CollectiveChange(
            layer=each.layer,
            place=each.place,
            phase=each.phase,
            kind=each.kind,
            axis=each.axis,
            group_size=each.group_size,
            bytes=each.bytes,
            wire_bytes=each.wire_bytes,
            reason=each.reason,
            cause=each.cause,
            before=had[each],
            after=has[each],
        )
        for each in dict.fromkeys([*after, *before])
        if had[each] != has[each]
    )


def _orders(before: Plan, after: Plan, collectives_differ: bool) -> tuple[Change, ...]:
    """Return a change for each list that has the same entries in another order."""
    lists: dict[str, tuple[list[Any], list[Any]]] = {
        "rules": ([report.rule.pattern for report in before.rules], [report.rule.pattern for report in after.rules]),
        "variables": ([each.key for each in before.variables], [each.key for each in after.variables]),
        "layers": ([layer_name(each) for each in before.layers], [layer_name(each) for each in after.layers]),
        "notes": (list(before.notes), list(after.notes)),
    }
    if not collectives_differ:
        lists["collectives"] = (list(before.collectives), list(after.collectives))
    return tuple(
        Change(f"order of {name}", "", "another")
        for name, (old, new) in lists.items()
        if old != new and Counter(old) == Counter(new)
    )


def _changed_amounts(before: Step, after: Step) -> tuple[AmountChange, ...]:
    had, has = _amounts(before), _amounts(after)
    return tuple(
        AmountChange(what, unit, had.get((what, unit), 0), has.get((what, unit), 0))
        for what, unit in dict.fromkeys([*has, *had])
        if had.get((what, unit)) != has.get((what, unit))
    )


def _amounts(step: Step) -> dict[tuple[str, Unit], int]:
    """Return the numbers of a step by what they count and their unit."""
    amounts: dict[tuple[str, Unit], int] = {}
    if step.memory.reserved is not None:
        amounts["reserved", "bytes"] = step.memory.reserved
    for name, use in (("at the memory peak", step.memory.peak), ("at their largest", step.memory.largest)):
        amounts |= {(f"{field.name} {name}", "bytes"): getattr(use, field.name) for field in fields(MemoryUse)}
    for work in step.work:
        amounts |= {(f"matrix products in {dtype}, {work.phase}", "flops"): n for dtype, n in work.matmul_flops}
        amounts[f"read and written, {work.phase}", "bytes"] = work.memory_bytes
        amounts[f"ops, {work.phase}", "ops"] = work.ops
    return amounts
