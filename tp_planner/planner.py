"""The planner: the compiler's passes in order, from a built Keras model and a layout to a plan."""

from __future__ import annotations

from typing import Any

import keras

from tp_planner.frontend.fingerprint import fingerprint
from tp_planner.frontend.trace import require_built, trace
from tp_planner.ir.graph import ModelGraph
from tp_planner.ir.layout import Layout
from tp_planner.ir.placement import local_shape
from tp_planner.ir.plan import LayerPlan, Plan, VariablePlan
from tp_planner.ir.step import Collective, Memory, MemoryUse, Step
from tp_planner.passes.choose_styles import choose_styles
from tp_planner.passes.honor_output_rules import honor_output_rules
from tp_planner.passes.place_boundaries import close, list_collectives, place_boundaries, write_layer_plans
from tp_planner.passes.resolve_rules import Resolution, resolve_rules
from tp_planner.runtime.boundaries import Axis
from tp_planner.runtime.process_group import planning_mesh
from tp_planner.runtime.prove import prove
from tp_planner.runtime.sharding_rules import DTensorRules


def make_plan(model: keras.Model, layout: Layout, inputs: Any = None) -> Plan:
    """Return the plan for ``model`` under ``layout``; the model is as before.

    Raises:
        PlanError: with everything that is wrong with the model, the mesh or the rules.
    """
    require_built(model)
    axis = layout.mesh.model_axis
    parts = layout.mesh.axis_size(axis)
    graphs = [trace(model, inputs, training=training) for training in (True, False)]
    graph = graphs[0]
    resolution = resolve_rules(layout, graph.variables, {name: layer.path for name, layer in graph.layers.items()})
    stored = {key: resolved.placement for key, resolved in resolution.variables.items()}
    styles = choose_styles(graph.layers, graph.variables, stored, parts)
    closings, output_notes = honor_output_rules(resolution.outputs, styles, axis)
    with planning_mesh(parts, axis) as mesh:
        rules, model_axis = DTensorRules(mesh), Axis.of(mesh)
        while True:
            walks, closings = place_boundaries(graphs, stored, styles, closings, rules, parts)
            layers = write_layer_plans(graphs, walks, styles, closings)
            collectives = list_collectives(graph, walks[0], stored, axis, parts)
            input_gradients = all(walk.input_gradients for walk in walks)
            plan = _write_plan(model, layout, graph, resolution, layers, collectives, input_gradients, output_notes)
            conflicts = prove(model, inputs, plan, graphs, walks, model_axis)
            if not conflicts:
                return plan
            closings = close(closings, conflicts)


def _write_plan(
    model: keras.Model,
    layout: Layout,
    graph: ModelGraph,
    resolution: Resolution,
    layers: tuple[LayerPlan, ...],
    collectives: tuple[Collective, ...],
    input_gradients: bool,
    output_notes: tuple[str, ...],
) -> Plan:
    axis = layout.mesh.model_axis
    return Plan(
        model=model.name,
        fingerprint=fingerprint(model),
        mesh=layout.mesh,
        axis=axis,
        inputs=tuple((graph.tensors[tensor].shape, graph.tensors[tensor].dtype) for tensor in graph.inputs),
        rules=resolution.rules,
        variables=_variable_plans(graph, resolution, layout.mesh.axis_size(axis)),
        layers=layers,
        collectives=collectives,
        step=Step("", Memory(MemoryUse(0, 0, 0, 0, 0), MemoryUse(0, 0, 0, 0, 0), "forward"), ()),
        input_gradients=input_gradients,
        notes=resolution.notes + output_notes,
    )


def _variable_plans(graph: ModelGraph, resolution: Resolution, parts: int) -> tuple[VariablePlan, ...]:
    return tuple(
        VariablePlan(
            key=key,
            path=variable.path,
            shape=variable.shape,
            local_shape=local_shape(variable.shape, resolution.variables[key].placement, parts),
            dtype=variable.dtype,
            itemsize=variable.itemsize,
            trainable=variable.trainable,
            placement=resolution.variables[key].placement,
            rule=resolution.variables[key].rule,
            reason=resolution.variables[key].reason,
        )
        for key, variable in graph.variables.items()
    )
