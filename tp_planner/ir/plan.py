"""The plan: every decision about a model as plain, frozen data with a stable JSON form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.placement import (
    CollectiveKind,
    Placement,
    Shape,
    collective_between,
    local_shape,
    parse_placement,
)

FORMAT_VERSION = 1

Style = Literal["column", "row", "vocabulary", "batched", "elementwise", "gathered", "replicated"]


@dataclass(frozen=True, slots=True)
class Transition:
    """A change of placement: of a tensor on the way forward, or of its gradient on the way back."""

    source: Placement
    target: Placement

    @property
    def collective(self) -> CollectiveKind | None:
        return collective_between(self.source, self.target)

    def __str__(self) -> str:
        return str(self.source) if self.source == self.target else f"{self.source}->{self.target}"


@dataclass(frozen=True, slots=True)
class Boundary:
    """Where a tensor changes its placement: the change forward and the change of its gradient.

    ``shape`` is the global shape in the traced call, ``tensor`` names the tensor: boundaries of one call
    of the model with the same tensor and transitions are executed once and shared.
    """

    tensor: str
    shape: Shape
    dtype: str
    itemsize: int
    forward: Transition
    backward: Transition
    has_gradient: bool  # whether a gradient flows back here in the traced step

    @property
    def is_identity(self) -> bool:
        """Whether nothing happens: equal placements and no collective in either direction."""
        return self.forward.source == self.forward.target and self.backward.source == self.backward.target


@dataclass(frozen=True, slots=True)
class VariablePlan:
    """Where one variable is stored."""

    key: str
    path: str
    shape: Shape
    local_shape: Shape  # on rank 0
    dtype: str
    itemsize: int
    trainable: bool
    placement: Placement
    rule: str | None  # pattern of the layout rule that decided, if any
    reason: str


@dataclass(frozen=True, slots=True)
class VariableUse:
    """How a layer reads a variable during its call: as stored, or after a boundary."""

    variable: str
    boundary: Boundary


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How one layer computes on the model axis.

    ``inputs`` maps positions among the flattened call arguments to boundaries; ``output`` is the boundary
    after the layer; ``epilogue_after_output`` says that bias and activation run after that boundary.
    ``sharded_inputs`` are the placements of the arguments that arrive sharded. Where the layer takes or
    returns sharded tensors, ``scope`` is the layer inside whose call the whole region lies. For dropout on a
    sharded tensor ``dropout_order`` is the order in memory, outermost first, of the dims of the whole tensor, in
    which a single device draws the mask.
    """

    layer: str
    path: str
    class_name: str
    mode: str
    style: Style
    reason: str
    inputs: tuple[tuple[int, Boundary], ...] = ()
    uses: tuple[VariableUse, ...] = ()
    output: Boundary | None = None
    output_placement: Placement | None = None
    epilogue_after_output: Literal["", "activation", "bias+activation"] = ""
    sharded_inputs: tuple[tuple[int, Placement], ...] = ()
    scope: str = ""
    dropout_order: tuple[int, ...] = ()
    calls: int = 1

    @property
    def boundaries(self) -> Iterator[tuple[str, Boundary]]:
        """The boundaries of one call with the place they stand at."""
        for position, boundary in self.inputs:
            yield f"input {position}", boundary
        for use in self.uses:
            yield f"variable {use.variable}", use.boundary
        if self.output is not None:
            yield "output", self.output


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective of a training step. ``bytes`` is the size of each rank's input to it."""

    kind: CollectiveKind
    axis: str
    group_size: int
    bytes: int
    layer: str
    place: str
    phase: Literal["forward", "backward"]
    reason: str


@dataclass(frozen=True, slots=True)
class RuleReport:
    """What became of one layout rule."""

    rule: LayoutRule
    variables: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions for one model, layout and mesh.

    ``fingerprint`` identifies the model the plan was made for: its variables (path, shape, dtype) and
    layers, in order. ``inputs`` are the global shapes and dtypes the model was traced with.
    """

    model: str
    fingerprint: str
    mesh: Mesh
    axis: str
    inputs: tuple[tuple[Shape, str], ...]
    rules: tuple[RuleReport, ...]
    variables: tuple[VariablePlan, ...]
    layers: tuple[LayerPlan, ...]
    collectives: tuple[Collective, ...]
    input_gradients: bool  # whether gradients with respect to the model's inputs are right, not only its variables'
    notes: tuple[str, ...]

    @property
    def axis_size(self) -> int:
        """Number of ranks the layers are split over."""
        return self.mesh.axis_size(self.axis)

    @property
    def hash(self) -> str:
        """SHA-256 of the JSON form; equal on all ranks that made the same decisions."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the plan as JSON text: sorted keys, versioned, byte-identical for equal plans."""
        return json.dumps(_encode_plan(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that ``to_json`` wrote.

        Raises PlanError for text that is not a plan, or a plan of another format version.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"plan is not JSON: {error}; write plans with plan.to_json()") from None
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

    def __str__(self) -> str:
        from tp_planner.report.text import plan_to_text

        return plan_to_text(self)


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
        "rule": variable.rule,
        "reason": variable.reason,
    }


def _decode_variable(data: Mapping[str, Any], parts: int) -> VariablePlan:
    shape, placement = tuple(data["shape"]), parse_placement(data["placement"])
    if tuple(data["local_shape"]) != local_shape(shape, placement, parts):
        raise ValueError(f"local shape {data['local_shape']} of {data['key']!r} is not {placement} of {list(shape)}")
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
        "calls": layer.calls,
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
        calls=data["calls"],
    )


_COLLECTIVE_FIELDS = ("kind", "axis", "group_size", "bytes", "layer", "place", "phase", "reason")


def _encode_plan(plan: Plan) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "mesh": [[name, size] for name, size in plan.mesh.axes],
        "axis": plan.axis,
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
            {name: getattr(collective, name) for name in _COLLECTIVE_FIELDS} for collective in plan.collectives
        ],
        "input_gradients": plan.input_gradients,
        "notes": list(plan.notes),
    }


def _decode_rule(data: Mapping[str, Any]) -> RuleReport:
    axes = tuple(tuple(axis) if isinstance(axis, list) else axis for axis in data["axes"])
    return RuleReport(LayoutRule(data["pattern"], axes), tuple(data["variables"]), tuple(data["outputs"]))


def _decode_plan(data: Mapping[str, Any]) -> Plan:
    mesh = Mesh(tuple((name, size) for name, size in data["mesh"]))
    parts = mesh.axis_size(data["axis"])
    return Plan(
        model=data["model"],
        fingerprint=data["fingerprint"],
        mesh=mesh,
        axis=data["axis"],
        inputs=tuple((tuple(shape), dtype) for shape, dtype in data["inputs"]),
        rules=tuple(_decode_rule(rule) for rule in data["rules"]),
        variables=tuple(_decode_variable(variable, parts) for variable in data["variables"]),
        layers=tuple(_decode_layer(layer) for layer in data["layers"]),
        collectives=tuple(
            Collective(**{name: collective[name] for name in _COLLECTIVE_FIELDS}) for collective in data["collectives"]
        ),
        input_gradients=data["input_gradients"],
        notes=tuple(data["notes"]),
    )
