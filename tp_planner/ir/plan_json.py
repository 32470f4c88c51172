"""The JSON form of plans: versioned, with sorted keys; a plan that was damaged is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import DeviceType, LayoutRule, Zero
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.placement import Replicate, local_shape, parse_placement
from tp_planner.ir.plan import (
    Boundary,
    FunctionPlan,
    Gathering,
    GuessedDim,
    LayerPlan,
    PartRead,
    Plan,
    RuleReport,
    Transition,
    VariablePlan,
    VariableUse,
)
from tp_planner.ir.step import Collective, decode_step, encode_step

FORMAT_VERSION = 7


def plan_to_json(plan: Plan) -> str:
    """Return the plan as JSON text: sorted keys, versioned, byte-identical for equal plans."""
    return json.dumps(_encode_plan(plan), indent=1, sort_keys=True) + "\n"


def plan_hash(plan: Plan) -> str:
    """Return the SHA-256 of the JSON text; equal on all ranks that made the same decisions."""
    return hashlib.sha256(plan_to_json(plan).encode()).hexdigest()


def plan_from_json(text: str) -> Plan:
    """Return the plan that ``plan_to_json`` wrote.

    Raises PlanError for text that is not a plan, or a plan of another format version.
    """
    try:
        data = json.loads(text, parse_constant=_refuse)
    except ValueError as error:
        raise PlanError(f"plan is not JSON: {error}; write plans with plan.to_json()") from None
    except RecursionError:
        raise PlanError("plan is not JSON: it is nested too deeply; write plans with plan.to_json()") from None
    if not isinstance(data, dict) or "format_version" not in data:
        raise PlanError("JSON document is not a plan: it has no format_version; write plans with plan.to_json()")
    if data["format_version"] != FORMAT_VERSION:
        raise PlanError(
            f"plan has format version {data['format_version']!r}, this tp_planner reads {FORMAT_VERSION}; "
            f"plan the model again"
        )
    try:
        return _decode_plan(data)
    except PlanError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"plan is damaged ({type(error).__name__}: {error}); plan the model again") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _encode_transition(transition: Transition) -> list[str]:
    return [str(transition.source), str(transition.target)]


def _decode_transition(data: list[str]) -> Transition:
    return Transition(parse_placement(data[0]), parse_placement(data[1]))


def _encode_boundary(boundary: Boundary | None) -> dict[str, Any] | None:
    if boundary is None:
        return None
    return {
        "tensor": boundary.tensor,
        "shape": list(boundary.shape),
        "dtype": boundary.dtype,
        "itemsize": boundary.itemsize,
        "forward": _encode_transition(boundary.forward),
        "backward": _encode_transition(boundary.backward),
        "has_gradient": boundary.has_gradient,
        "readers": boundary.readers,
        "again": boundary.again,
        "behind": boundary.behind,
    }


def _decode_boundary(data: Mapping[str, Any]) -> Boundary:
    return Boundary(
        data["tensor"],
        tuple(data["shape"]),
        data["dtype"],
        data["itemsize"],
        _decode_transition(data["forward"]),
        _decode_transition(data["backward"]),
        data["has_gradient"],
        data["readers"],
        data["again"],
        data["behind"],
    )


def _encode_variable(variable: VariablePlan) -> dict[str, Any]:
    return {
        "key": variable.key,
        "path": variable.path,
        "shape": list(variable.shape),
        "local_shape": list(variable.local_shape),
        "dtype": variable.dtype,
        "itemsize": variable.itemsize,
        "trainable": variable.trainable,
        "placement": str(variable.placement),
        "batch_placement": str(variable.batch_placement),
        "slot_placement": str(variable.slot_placement),
        "rule": variable.rule,
        "reason": variable.reason,
    }


def _decode_variable(data: Mapping[str, Any], parts: int, replicas: int) -> VariablePlan:
    shape, placement = tuple(data["shape"]), parse_placement(data["placement"])
    across = parse_placement(data["batch_placement"])
    if tuple(data["local_shape"]) != local_shape(local_shape(shape, placement, parts), across, replicas):
        cut = f"{placement}, {across}" if across != Replicate() else f"{placement}"
        raise ValueError(f"local shape {data['local_shape']} of {data['key']!r} is not {cut} of {list(shape)}")
    return VariablePlan(
        data["key"],
        data["path"],
        shape,
        tuple(data["local_shape"]),
        data["dtype"],
        data["itemsize"],
        data["trainable"],
        placement,
        data["rule"],
        data["reason"],
        across,
        parse_placement(data["slot_placement"]),
    )


def _encode_function(function: FunctionPlan) -> dict[str, Any]:
    return {
        "name": function.name,
        "number": function.number,
        "inputs": [[position, _encode_boundary(boundary)] for position, boundary in function.inputs],
        "output": _encode_boundary(function.output),
        "sizes": [list(size) for size in function.sizes],
        "scales": list(function.scales),
    }


def _decode_function(data: Mapping[str, Any]) -> FunctionPlan:
    return FunctionPlan(
        data["name"],
        data["number"],
        tuple((position, _decode_boundary(boundary)) for position, boundary in data["inputs"]),
        None if data["output"] is None else _decode_boundary(data["output"]),
        tuple((position, whole, local) for position, whole, local in data["sizes"]),
        tuple(data["scales"]),
    )


def _encode_layer(layer: LayerPlan) -> dict[str, Any]:
    return {
        "layer": layer.layer,
        "path": layer.path,
        "class": layer.class_name,
        "mode": layer.mode,
        "style": layer.style,
        "reason": layer.reason,
        "inputs": [[position, _encode_boundary(boundary)] for position, boundary in layer.inputs],
        "uses": [[use.variable, _encode_boundary(use.boundary)] for use in layer.uses],
        "output": _encode_boundary(layer.output),
        "output_placement": None if layer.output_placement is None else str(layer.output_placement),
        "epilogue_after_output": layer.epilogue_after_output,
        "sharded_inputs": [[position, str(placement)] for position, placement in layer.sharded_inputs],
        "scope": layer.scope,
        "dropout_order": list(layer.dropout_order),
        "functions": [_encode_function(function) for function in layer.functions],
        "calls": layer.calls,
        "into_loss": layer.into_loss,
        "sees_whole": layer.sees_whole,
        "makes_again": layer.makes_again,
    }


def _decode_layer(data: Mapping[str, Any]) -> LayerPlan:
    placed = data["output_placement"]
    return LayerPlan(
        layer=data["layer"],
        path=data["path"],
        class_name=data["class"],
        mode=data["mode"],
        style=data["style"],
        reason=data["reason"],
        inputs=tuple((position, _decode_boundary(boundary)) for position, boundary in data["inputs"]),
        uses=tuple(VariableUse(key, _decode_boundary(boundary)) for key, boundary in data["uses"]),
        output=None if data["output"] is None else _decode_boundary(data["output"]),
        output_placement=None if placed is None else parse_placement(placed),
        epilogue_after_output=data["epilogue_after_output"],
        sharded_inputs=tuple((position, parse_placement(text)) for position, text in data["sharded_inputs"]),
        scope=data["scope"],
        dropout_order=tuple(data["dropout_order"]),
        functions=tuple(_decode_function(function) for function in data["functions"]),
        calls=data["calls"],
        into_loss=data["into_loss"],
        sees_whole=data["sees_whole"],
        makes_again=data["makes_again"],
    )


def _encode_gathering(gathering: Gathering) -> dict[str, Any]:
    reads = [{"layer": each.layer, "variable": each.variable, "dtype": each.dtype} for each in gathering.reads]
    return {"layer": gathering.layer, "reads": reads, "once": gathering.once}


def _decode_gathering(data: Mapping[str, Any]) -> Gathering:
    reads = tuple(PartRead(each["layer"], each["variable"], each["dtype"]) for each in data["reads"])
    return Gathering(data["layer"], reads, data["once"])


def _decode_flops(data: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(data.items()))


_COLLECTIVE_FIELDS = (
    *("kind", "axis", "group_size", "bytes", "layer", "place", "phase", "reason", "cause", "early", "once"),
)


def _encode_plan(plan: Plan) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "mesh": [[name, size] for name, size in plan.mesh.axes],
        "axis": plan.axis,
        "batch_axis": plan.mesh.batch_axis,
        "inputs": [[list(shape), dtype] for shape, dtype in plan.inputs],
        "rules": [
            {
                "pattern": report.rule.pattern,
                "axes": [list(axis) if isinstance(axis, tuple) else axis for axis in report.rule.axes],
                "variables": list(report.variables),
                "outputs": list(report.outputs),
            }
            for report in plan.rules
        ],
        "variables": [_encode_variable(variable) for variable in plan.variables],
        "layers": [_encode_layer(layer) for layer in plan.layers],
        "collectives": [
            {name: getattr(each, name) for name in _COLLECTIVE_FIELDS} | {"behind": dict(each.behind)}
            for each in plan.collectives
        ],
        "step": encode_step(plan.step),
        "input_gradients": plan.input_gradients,
        "notes": list(plan.notes),
        "buckets": [list(bucket) for bucket in plan.buckets],
        "gathers_ahead": plan.gathers_ahead,
        "zero": plan.zero,
        "gatherings": [_encode_gathering(each) for each in plan.gatherings],
        "sequence_parallel": plan.sequence_parallel,
        "sums": [list(bucket) for bucket in plan.sums],
        "device": plan.device,
        "guessed": [{"input": each.input, "dim": each.dim, "size": each.size} for each in plan.guessed],
    }


def _decode_rule(data: Mapping[str, Any]) -> RuleReport:
    axes = tuple(tuple(axis) if isinstance(axis, list) else axis for axis in data["axes"])
    return RuleReport(LayoutRule(data["pattern"], axes), tuple(data["variables"]), tuple(data["outputs"]))


def _decode_device(name: str) -> DeviceType:
    match name:
        case "cpu" | "cuda":
            return name
    raise ValueError(f"device {name!r} is neither 'cpu' nor 'cuda'")


def _decode_zero(stage: object) -> Zero:
    match stage:
        case 0 | 1 | 3:
            return stage
    raise ValueError(f"zero is {stage!r}, not 0, 1 or 3")


def _decode_plan(data: Mapping[str, Any]) -> Plan:
    mesh = Mesh(tuple((name, size) for name, size in data["mesh"])).across(data["batch_axis"])
    parts = mesh.axis_size(data["axis"])
    return Plan(
        model=data["model"],
        fingerprint=data["fingerprint"],
        mesh=mesh,
        axis=data["axis"],
        inputs=tuple((tuple(shape), dtype) for shape, dtype in data["inputs"]),
        rules=tuple(_decode_rule(rule) for rule in data["rules"]),
        variables=tuple(_decode_variable(variable, parts, mesh.replicas) for variable in data["variables"]),
        layers=tuple(_decode_layer(layer) for layer in data["layers"]),
        collectives=tuple(
            Collective(
                **{name: each[name] for name in _COLLECTIVE_FIELDS}, behind=tuple(sorted(each["behind"].items()))
            )
            for each in data["collectives"]
        ),
        step=decode_step(data["step"]),
        input_gradients=data["input_gradients"],
        notes=tuple(data["notes"]),
        buckets=tuple(tuple(bucket) for bucket in data["buckets"]),
        sequence_parallel=data["sequence_parallel"],
        sums=tuple(tuple(bucket) for bucket in data["sums"]),
        device=_decode_device(data["device"]),
        guessed=tuple(GuessedDim(each["input"], each["dim"], each["size"]) for each in data["guessed"]),
        gatherings=tuple(map(_decode_gathering, data["gatherings"])),
        gathers_ahead=data["gathers_ahead"],
        zero=_decode_zero(data["zero"]),
    )
