"""The planner: the compiler's passes in order, from a built Keras model and a layout to a plan."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras

from tp_planner.dryrun.collector import without_collector
from tp_planner.dryrun.prove import prove
from tp_planner.dryrun.sharding_rules import DTensorRules
from tp_planner.dryrun.simulate import simulate
from tp_planner.frontend.blocks import Blocks, Signatures, find_alike, find_blocks, find_of_one_class
from tp_planner.frontend.cuda_kernels import kernels_of
from tp_planner.frontend.fingerprint import fingerprint
from tp_planner.frontend.inputs import CallArguments, known_inputs
from tp_planner.frontend.kept_tensors import no_fakes_left
from tp_planner.frontend.layer_tree import named_layers, named_variables, naming_once
from tp_planner.frontend.quick_rules import require_quick_rules
from tp_planner.frontend.quiet import quiet_torch
from tp_planner.frontend.stretches import stretches_as_layers
from tp_planner.frontend.survey import survey
from tp_planner.frontend.trace import require_built
from tp_planner.frontend.traces import Traces
from tp_planner.frontend.training_loss import TrainingLoss
from tp_planner.ir.graph import LayerInfo, ModelGraph, VariableInfo
from tp_planner.ir.layout import Layout
from tp_planner.ir.placement import Placement, local_shape, parts_of
from tp_planner.ir.plan import GuessedDim, LayerPlan, VariablePlan
from tp_planner.ir.step import NO_STEP
from tp_planner.job.axes import Axes
from tp_planner.job.process_group import planning_axes
from tp_planner.layers.statistics import OF_THE_BATCH
from tp_planner.passes.bucket_gradients import bucket_gradients, bucket_summands, sum_where_used
from tp_planner.passes.choose_styles import choose_styles
from tp_planner.passes.gather_together import crossed_blocks, gather_together
from tp_planner.passes.honor_output_rules import honor_output_rules
from tp_planner.passes.make_again import make_again
from tp_planner.passes.note_own_state import note_own_state
from tp_planner.passes.place_boundaries import close, must_walk_all_blocks, place_boundaries, write_layer_plans
from tp_planner.passes.reduce_behind import reduce_behind
from tp_planner.passes.resolve_rules import Resolution, resolve_rules
from tp_planner.passes.shard_into_loss import note_whole_logits, shard_into_loss
from tp_planner.passes.share_updates import share_updates
from tp_planner.passes.split_unevenly import split_unevenly
from tp_planner.passes.spread_conflicts import spread_conflicts
from tp_planner.passes.store_in_parts import store_in_parts
from tp_planner.passes.walk.packing import stored_in_parts
from tp_planner.passes.walk.stream import Stream
from tp_planner.progress import stage
from tp_planner.readable_plan import Plan


def make_plan(
    model: keras.Model,
    layout: Layout,
    inputs: Any = None,
    optimizer: keras.optimizers.Optimizer | None = None,
    loss: TrainingLoss | None = None,
    traces: Traces | None = None,
) -> Plan:
    """Return the plan for ``model`` under ``layout``; the model is as before.

    Args:
        model: a built, plain model.
        layout: the rules and the mesh, and the devices whose kernels count; by default CPUs.
        inputs: as for ``trace``.
        optimizer: makes the update of the simulated training step; by default there is none.
        loss: the loss of that step; by default the sum of the outputs stands for it.
        traces: those of the model with these inputs that other plans have left; new ones are added.

    Raises:
        PlanError: with everything that is wrong with the model, the mesh or the rules.
    """
    require_built(model)
    layout = layout.across(layout.mesh.batch_axis)
    with naming_once(model), without_collector(), no_fakes_left(model), kernels_of(layout.devices or "cpu"):
        layers, variables = surveyed = survey(model) if traces is None else traces.surveyed
        require_quick_rules(layout.rules, layers, variables)
        resolution = resolve_rules(layout, variables, {name: layer.path for name, layer in layers.items()})
        if layout.zero == 3:
            resolution = store_in_parts(resolution, variables, layout.mesh, _state_of_layers(model))
        arguments, guessed = known_inputs(model, inputs)
        traces = traces or Traces(model, arguments, surveyed)
        job = _Job(model, layout, arguments, guessed, optimizer, loss, layers, variables, resolution, traces)
        found = job.shortest_plan()
        if not layout.sequence_parallel or found.shards_stream:
            return found
        # Where no layer shards the stream, what was tried for it should leave no trace.
        plain = replace(job, layout=replace(layout, sequence_parallel=False))
        found = plain.shortest_plan()
        return replace(found, sequence_parallel=True, notes=(*found.notes, _NO_STREAM))


OVERWRITTEN = "its gradient is its next value"
_NO_STREAM = (
    "sequence parallelism changes nothing: no layer leaves a sum over the ranks whose sequence, dim 1 of three or "
    "more, divides by them and can stay sharded in what follows"
)


@dataclass(frozen=True)
class _Job:
    """One planning job: what is given, and what is known of it before the model is traced."""

    model: keras.Model
    layout: Layout
    inputs: CallArguments
    guessed: tuple[GuessedDim, ...]
    optimizer: keras.optimizers.Optimizer | None
    loss: TrainingLoss | None
    layers: Mapping[str, LayerInfo]
    variables: Mapping[str, VariableInfo]
    resolution: Resolution
    traces: Traces

    def planned_alike(self, layer: str) -> Hashable:
        """Return what the rules say of a layer, for layers are planned alike only if that is equal."""
        resolved = (self.resolution.variables[key] for key in self.layers[layer].variables)
        own = tuple((each.placement, each.batch_placement) for each in resolved)
        return own, layer in self.resolution.outputs

    @functools.cached_property
    def _signatures(self) -> Signatures:
        return Signatures(self.model, self.planned_alike, self.traces.signature)

    @functools.cached_property
    def _alike(self) -> Mapping[str, Sequence[Sequence[str]]]:
        """For each layer those that the rules shard alike and whose code is the same, with all layers below each."""
        return find_alike(self.model, self.planned_alike)

    @functools.cached_property
    def _of_one_class(self) -> Mapping[str, Sequence[Sequence[str]]]:
        """For each layer those of the same classes, with all layers below each."""
        return find_of_one_class(self.model)

    @property
    def _trained(self) -> set[str]:
        return {key for key, variable in self.variables.items() if variable.trainable}

    def shortest_plan(self) -> Plan:
        """Return the plan, made from as few layers as will do."""
        return self._plan_of_stretches() or self._plan_of_blocks() or self._unrolled_plan()

    def _plan_of_stretches(self) -> Plan | None:
        """Return the plan, made from one of equal blocks and stretches; None if there are none, or this cannot be.

        Where the residual stream begins to be sharded depends on what is a layer.
        """
        if self.layout.sequence_parallel or self.resolution.outputs:
            return None
        with stretches_as_layers(self.model, named_layers(self.model), self._signatures.of) as layers:
            if not layers:
                return None
            with naming_once(self.model, layers):
                traces = self.traces.within(tuple(layers))
                job = replace(self, layers=traces.surveyed[0], traces=traces)
                found = job._plan_of_blocks()
        names_stretch = found is not None and any(job.layers[each.layer].is_stretch for each in found.layers)
        return None if names_stretch else found

    def _plan_of_blocks(self) -> Plan | None:
        return self.plan(find_blocks(self.model, self._signatures))

    def plan(self, blocks: Blocks) -> Plan | None:
        """Return the plan, made from one of each of the ``blocks``; None if they cannot be planned one by one."""
        axis = self.layout.mesh.model_axis
        parts = self.layout.mesh.axis_size(axis)
        stored = {key: resolved.placement for key, resolved in self.resolution.variables.items()}
        styles = choose_styles(self.layers, self.variables, stored, parts)
        closings, on_sequence, notes = honor_output_rules(self.resolution.outputs, styles, axis)
        stream = Stream(self.layout.sequence_parallel, self.layout.gather_again, on_sequence)
        stage(f"tracing {self.model.name}")
        with_functions = [self.traces.of(blocks, training) for training in (True, False)]
        graphs = _distinct([replace(graph, functions=None) for graph in with_functions])
        styles, start = split_unevenly(styles, closings, self.layers, self.variables, stored, graphs, parts)
        closings = start
        if (
            stream.is_anywhere
        ):  # code between the layers often reads sizes of it, so that its functions have to be known
            graphs = _distinct(with_functions)
        with planning_axes(self.layout.mesh) as axes, quiet_torch():
            rules, one_replica = DTensorRules(axes.model.mesh), Axes(axes.mesh, axes.model)
            while True:
                stage(f"placing boundaries of {self.model.name}")
                placing = place_boundaries(graphs, stored, styles, closings, rules, parts, stream)
                walks, closings = placing.walks, placing.closings
                conflicts = [conflict for conflict in placing.conflicts if conflict.in_code]
                if not conflicts or graphs[0].functions is not None:
                    if placing.blocks_differ:
                        return None
                    written = write_layer_plans(graphs, walks, styles, closings, make_again(with_functions[0]))
                    layers = reduce_behind(written, self._trained)
                    plan = self._write(graphs[0], layers, all(walk.input_gradients for walk in walks), notes)
                    plan = replace(
                        plan, variables=_as_stored(plan.variables, stored_in_parts(stored, styles, closings, graphs[0]))
                    )
                    stage(f"proving the plan of {self.model.name}")
                    conflicts = prove(self.model, self.inputs, plan, graphs, walks, one_replica)
                    if not conflicts:
                        plan = self._across_replicas(self._into_loss(plan, graphs), graphs[0])
                        crossed = crossed_blocks(graphs[0], plan.gatherings)
                        if crossed:  # one of them alone would not gather what all of them do
                            kinds = {blocks.signatures[block]: block for block in sorted(crossed)}
                            return self.plan(functools.reduce(Blocks.without, kinds.values(), blocks))
                        return self._simulated(plan, graphs[0], axes)
                    conflicts = spread_conflicts(conflicts, self._alike, self._of_one_class, graphs, walks)
                if graphs[0].functions is not None:
                    if must_walk_all_blocks(conflicts, graphs, walks):
                        return None
                    closings = close(closings, conflicts)
                else:  # boundaries at the functions inside layers may do
                    graphs, closings = _distinct(with_functions), start

    def _into_loss(self, plan: Plan, graphs: Sequence[ModelGraph]) -> Plan:
        """Return the plan with logits in shards up to the loss, or a note of what it takes that the loss cannot."""
        layers = shard_into_loss(plan.layers, graphs, plan.axis_size)
        if self.loss is None or layers == plan.layers:
            return plan
        if self.loss.reads_shards:
            return replace(plan, layers=layers)
        return replace(plan, notes=plan.notes + note_whole_logits(layers, self.loss.name))

    def _simulated(self, plan: Plan, graph: ModelGraph, axes: Axes) -> Plan:
        """Return the plan with what its training step takes."""
        stage(f"simulating a training step of {self.model.name}")
        found = simulate(self.model, self.inputs, plan, graph, axes, self.optimizer, self.loss)
        return replace(plan, collectives=found.collectives, step=found.step, notes=plan.notes + found.notes)

    def _unrolled_plan(self) -> Plan:
        """Return the plan, made from all layers one by one."""
        plan = self.plan(Blocks.none())
        assert plan is not None
        return plan

    def _across_replicas(self, plan: Plan, graph: ModelGraph) -> Plan:
        """Return the plan with what replicas store and communicate among themselves."""
        if plan.replicas == 1:
            plan = replace(plan, sums=bucket_summands(plan.variables, plan.layers))
            return replace(plan, notes=plan.notes + ((_one_replica(plan),) if plan.zero else ()))
        across = {key: resolved.batch_placement for key, resolved in self.resolution.variables.items()}
        variables = tuple(
            replace(
                each,
                batch_placement=across[each.key],
                local_shape=local_shape(each.local_shape, across[each.key], plan.replicas),
            )
            for each in plan.variables
        )
        if self.layout.zero == 1:
            variables = share_updates(variables, plan.axis_size, plan.replicas, self._updated_whole())
        shared = {name for name, layer in named_layers(self.model).items() if isinstance(layer, OF_THE_BATCH)}
        notes = plan.notes + tuple(note_own_state(graph, shared))
        sums = bucket_summands(variables, plan.layers)
        late = {key for keys in sums for key in keys}
        layers = sum_where_used(plan.layers, variables)
        gatherings = gather_together(graph, variables, plan.axis_size)
        buckets = bucket_gradients(variables, late)
        return replace(
            plan, variables=variables, layers=layers, sums=sums, buckets=buckets, gatherings=gatherings, notes=notes
        )

    def _updated_whole(self) -> dict[str, str]:
        """Return the variables that are updated in no way that works on a part, and why."""
        variables = named_variables(self.model).items()
        return {key: OVERWRITTEN for key, each in variables if getattr(each, "overwrite_with_gradient", False)}

    def _write(
        self, graph: ModelGraph, layers: tuple[LayerPlan, ...], input_gradients: bool, notes: tuple[str, ...]
    ) -> Plan:
        axis = self.layout.mesh.model_axis
        return Plan(
            model=self.model.name,
            fingerprint=fingerprint(self.model),
            mesh=self.layout.mesh,
            axis=axis,
            inputs=tuple((graph.tensors[tensor].shape, graph.tensors[tensor].dtype) for tensor in graph.inputs),
            rules=self.resolution.rules,
            variables=_variable_plans(self.variables, self.resolution, self.layout.mesh.axis_size(axis)),
            layers=layers,
            collectives=(),
            step=NO_STEP,
            input_gradients=input_gradients,
            notes=self.resolution.notes + notes,
            sequence_parallel=self.layout.sequence_parallel,
            device=self.layout.devices or "cpu",
            guessed=self.guessed,
            gathers_ahead=self.layout.gathers_ahead,
            zero=self.layout.zero,
        )


def _state_of_layers(model: keras.Model) -> set[str]:
    """Return the variables that layers were never to train."""
    state = {id(each) for layer in named_layers(model).values() for each in layer._non_trainable_variables}
    return {key for key, variable in named_variables(model).items() if id(variable) in state}


def _one_replica(plan: Plan) -> str:
    why = f"the batch is split over no axis of mesh ({plan.mesh}), so there is one replica"
    return f"zero={plan.zero} changes nothing: {why}"


def _as_stored(variables: tuple[VariablePlan, ...], stored: Mapping[str, Placement]) -> tuple[VariablePlan, ...]:
    """Return the decisions about variables with what is stored in parts."""
    packed = {key: parts for key, placement in stored.items() if (parts := parts_of(placement))}
    return tuple(
        replace(each, placement=stored[each.key], reason=f"{each.reason}; {_IN_PARTS}") if each.key in packed else each
        for each in variables
    )


_IN_PARTS = "its dim is parts side by side, each of which is sharded, because the code takes it apart so"


def _distinct(graphs: Sequence[ModelGraph]) -> list[ModelGraph]:
    """Return the trace of a training call, and that of an inference call if it does anything else."""
    training, inference = graphs
    return [training] if replace(inference, training=True) == training else [training, inference]


def _variable_plans(
    variables: Mapping[str, VariableInfo], resolution: Resolution, parts: int
) -> tuple[VariablePlan, ...]:
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
        for key, variable in variables.items()
    )
