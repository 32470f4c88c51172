"""Follow placements: from the sharded weights through the ops of the model, as far as tensors stay sharded.

One walk over the traced ops in order of execution. A contraction layer turns a whole tensor into a sharded one
(column-parallel) or a sharded one back into a whole one (row-parallel); every op between is asked for its
sharding rule. Where torch functions were recorded, tensors can change at their ends too. Where a tensor cannot stay
sharded the walk reports a conflict, with the layers and variable uses the sharding came from. Every tensor is whole
or sharded; sums over ranks exist only inside a boundary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tp_planner.ir.graph import REPEAT, Call, FunctionCall, ModelGraph, Op, TensorInfo
from tp_planner.ir.placement import Partial, Placement, Shard, divides
from tp_planner.ir.plan import Boundary, FunctionPlan, Transition
from tp_planner.passes.choose_styles import StyleChoice, input_placement, output_dim, weight_uses
from tp_planner.passes.follow_ops import (
    WHOLE,
    Followed,
    FunctionFollowed,
    Refused,
    ShardingRules,
    follow_function,
    sizes_in_arguments,
)

LayerMode = tuple[str, str]  # layer name, mode
VariableRead = tuple[str, str]  # name of the layer in whose call it is read, variable key
# What a conflict can change: sharding ends where it comes from, at a layer's output or a variable's use, or in all of
# a layer ("whole"); or a layer whose code writes sizes of whole tensors is given those of shards ("sizes").
Origin = tuple[Literal["layer", "whole", "sizes"], LayerMode] | tuple[Literal["read"], VariableRead]
STAYS_WHOLE = Transition(WHOLE, WHOLE)
SUMMED = Transition(Partial(), WHOLE)
# Ops that make of a variable the same in another dtype or layout.
SAME_VALUES = {
    f"aten.{name}"
    for name in ("_to_copy.default", "_unsafe_view.default", "alias.default", "clone.default", "detach.default")
} | {f"aten.{name}" for name in ("permute.default", "t.default", "transpose.int", "unsqueeze.default", "view.default")}
LEAVES_SUM = "leaves a sum over the shards"
OWN_GRADIENT = "runs in a function that says what its gradient is, which may mix the shards"


@dataclass(frozen=True, slots=True)
class Closings:
    """Where sharding has to end at its origin: layers whose output is gathered, variables gathered for use.

    ``whole`` are layers that compute on whole tensors only, ``sizes`` those that are given the sizes of shards where
    their code writes sizes of whole tensors. All with the reason.
    """

    layers: Mapping[LayerMode, str] = field(default_factory=dict)
    reads: Mapping[VariableRead, str] = field(default_factory=dict)
    whole: Mapping[LayerMode, str] = field(default_factory=dict)
    sizes: Mapping[LayerMode, str] = field(default_factory=dict)

    def closing(self, origin: Origin, reason: str) -> Closings:
        match origin:
            case "layer", key:
                return replace(self, layers={key: reason, **self.layers})
            case "whole", key:
                return replace(self, whole={key: reason, **self.whole})
            case "sizes", key:
                return replace(self, sizes={key: reason, **self.sizes})
            case _, key:
                return replace(self, reads={key: reason, **self.reads})


@dataclass(frozen=True, slots=True)
class Conflict:
    """A place where tensors from ``origins`` cannot stay sharded.

    ``in_code``: it is in the code of a layer, where a boundary at a torch function may help.
    """

    origins: frozenset[Origin]
    reason: str
    in_code: bool = False


@dataclass(frozen=True, slots=True)
class Placed:
    """One boundary of one call: where it stands and the tensor it changes."""

    call: int
    place: Literal["input", "variable", "output"]
    position: int
    variable: str | None
    tensor: int
    boundary: Boundary


@dataclass(frozen=True, slots=True)
class CallRecord:
    """How one call of one layer is computed."""

    call: int
    sharded_inputs: tuple[tuple[int, Placement], ...] = ()
    output_placement: Placement | None = None
    epilogue: Literal["", "activation", "bias+activation"] = ""
    reason: str = ""
    dropout_order: tuple[int, ...] = ()  # dims of a dropout's whole input, outermost in memory first


@dataclass
class Walk:
    """What one walk over the graph found."""

    placements: dict[int, Placement] = field(default_factory=dict)
    origins: dict[int, frozenset[Origin]] = field(default_factory=dict)
    conflicts: list[Conflict] = field(default_factory=list)
    boundaries: list[Placed] = field(default_factory=list)
    records: dict[int, CallRecord] = field(default_factory=dict)
    followed: dict[int, Followed] = field(default_factory=dict)
    cut_for: dict[tuple[int, int], Placement] = field(default_factory=dict)  # (op, whole tensor): read as this
    functions: dict[int, tuple[FunctionPlan, ...]] = field(default_factory=dict)  # by call, in order
    function_origins: dict[int, frozenset[Origin]] = field(default_factory=dict)  # of the shards they meet, by call
    writes_sizes: set[LayerMode] = field(default_factory=set)  # layers that could be given the sizes of shards
    reads: dict[VariableRead, Placement] = field(default_factory=dict)  # of variables that ops read sharded
    skipped_ops: set[int] = field(default_factory=set)
    regions_leave_blocks: bool = False  # a region reaches out of a block that others repeat
    input_gradients: bool = True  # whether gradients with respect to the model's inputs are right


def follow_placements(
    graph: ModelGraph,
    stored: Mapping[str, Placement],
    styles: Mapping[LayerMode, StyleChoice],
    closings: Closings,
    rules: ShardingRules,
    parts: int,
) -> Walk:
    """Return the placement of every tensor of ``graph`` and the boundaries between them.

    Args:
        graph: the traced model.
        stored: placement of each variable by key.
        styles: style of each (layer, mode) that has a sharded variable.
        closings: where sharding must end at once, from earlier walks.
        rules: answers how an op acts on shards.
        parts: size of the model axis.
    """
    return _Walker(graph, stored, styles, closings, rules, parts).walk()


class _Walker:
    def __init__(
        self,
        graph: ModelGraph,
        stored: Mapping[str, Placement],
        styles: Mapping[LayerMode, StyleChoice],
        closings: Closings,
        rules: ShardingRules,
        parts: int,
    ) -> None:
        self.graph, self.stored, self.styles, self.parts = graph, stored, styles, parts
        self.closings, self.rules = closings, rules
        self.found = Walk()
        self.from_inputs = _float_tensors_from_inputs(graph)
        # Variables that a call takes or returns: they are read in another call than the one that uses them.
        self.passed_on = {
            graph.tensors[tensor].variable
            for call in graph.calls.values()
            for tensor in (*(given for _, given in call.inputs), *call.outputs)
        } - {None}
        self.parents = {call.parent for call in graph.calls.values()}
        # (call, tensor) -> origins of the sharded ops that read it; and the (call, tensor) read by other ops
        self.read_sharded: dict[tuple[int, int], frozenset[Origin]] = {}
        self.read_whole: dict[tuple[int, int], None] = {}  # in order of the reads
        self.used: set[tuple[int, str]] = set()  # (call, variable) whose boundary is placed
        self.by_first_op = {function.ops[0]: function for function in graph.functions or ()}
        self.weights = _weights(graph)
        self.makers = {tensor: op for op in graph.ops for tensor in op.outputs}
        self.readers = Counter((op.call, tensor) for op in graph.ops for tensor in op.inputs)
        self.changed: dict[int, dict[int, FunctionPlan]] = {}  # by call, then by the function's first op
        # (call, tensor) -> the functions that read it with shards; None among them stands for an op outside of any
        self.entered_at: dict[tuple[int, int], dict[FunctionCall | None, None]] = {}

    def walk(self) -> Walk:
        with_ops = [call for call in self.graph.calls.values() if call.ops[0] < call.ops[1]]
        starts = {call.ops[0]: call for call in with_ops if self._is_atomic(call)}
        skip_to = followed_to = 0
        for op in self.graph.ops:
            if op.id < skip_to:
                self.found.skipped_ops.add(op.id)
                continue
            if op.id in starts:
                call = starts[op.id]
                skip_to = call.ops[1]
                self.found.skipped_ops.add(op.id)
                self._call(call)
            elif op.id in self.by_first_op:
                followed_to = self.by_first_op[op.id].ops[1]
                self._function(self.by_first_op[op.id])
            elif op.id >= followed_to:
                self._op(op, op.call)
        self._record_sharded_arguments()
        self._enter_tensors_read_by_sharded_ops()
        self.found.functions = {
            call: tuple(changed[first] for first in sorted(changed)) for call, changed in self.changed.items()
        }
        self._outputs_are_whole()
        self._calls_of_a_layer_agree()
        self._regions_stay_in_blocks()
        return self.found

    # --- placements ------------------------------------------------------------------------------------

    def placement(self, tensor: int, call: int) -> Placement:
        """Return how a tensor is placed when an op of ``call`` reads it."""
        variable = self.graph.tensors[tensor].variable
        if variable is None:
            return self.found.placements.get(tensor, WHOLE)
        layer = self.graph.calls[call]
        if self._read_of(call, variable) in self.closings.reads or (layer.layer, layer.mode) in self.closings.whole:
            return WHOLE
        if variable in self.passed_on:
            return WHOLE
        placement = self.stored[variable]
        return placement if divides(self.graph.variables[variable].shape, placement, self.parts) else WHOLE

    def _read_of(self, call: int, variable: str) -> VariableRead:
        return self.graph.calls[call].layer, variable

    def _origins(self, tensor: int, call: int) -> frozenset[Origin]:
        variable = self.graph.tensors[tensor].variable
        if variable is None:
            return self.found.origins.get(tensor, frozenset())
        if self.placement(tensor, call) == WHOLE:
            return frozenset()
        return frozenset({("read", self._read_of(call, variable))})

    def _conflict(self, origins: frozenset[Origin], reason: str, in_code: bool = False) -> None:
        self.found.conflicts.append(Conflict(origins, reason, in_code))

    # --- layers that are one contraction, and dropout --------------------------------------------------

    def _is_atomic(self, call: Call) -> bool:
        choice = self.styles.get((call.layer, call.mode))
        if choice is not None and choice.is_contraction:
            return (call.layer, call.mode) not in self.closings.whole
        return self.graph.layers[call.layer].is_dropout

    def _call(self, call: Call) -> None:
        choice = self.styles.get((call.layer, call.mode))
        if choice is not None and choice.is_contraction:
            self._contraction(call, choice)
        else:
            self._dropout(call)

    def _dropout(self, call: Call) -> None:
        (position, tensor), output = call.inputs[0], call.outputs[0]
        placement = self.placement(tensor, call.id)
        if placement == WHOLE:
            return
        if not isinstance(placement, Shard):
            self._conflict(self._origins(tensor, call.id), f"dropout {call.layer!r} cannot cut its mask as {placement}")
            return
        self.found.placements[output] = placement
        self.found.origins[output] = self._origins(tensor, call.id)
        self.found.records[call.id] = CallRecord(
            call.id,
            ((position, placement),),
            placement,
            reason="the mask is drawn whole on every rank and cut",
            dropout_order=_memory_order(self.graph.tensors[tensor]),
        )

    def _contraction(self, call: Call, choice: StyleChoice) -> None:
        (position, tensor), output = call.inputs[0], call.outputs[0]
        arrives = self._contraction_input(call, choice, position, tensor)
        for key, use in weight_uses(choice).items():
            gradient: Placement = Partial() if use.gradient_is_partial else use.placement
            self._use(call.id, key, use.placement, gradient)
        core = output if call.core_output is None else call.core_output
        dim = output_dim(choice, len(self.graph.tensors[core].shape))
        sharded_inputs = () if arrives == WHOLE else ((position, arrives),)
        if dim is None:
            self._summed_output(call, choice, core, sharded_inputs)
        else:
            self._sharded_output(call, choice, core, Shard(dim), sharded_inputs)

    def _contraction_input(self, call: Call, choice: StyleChoice, position: int, tensor: int) -> Placement:
        info = self.graph.tensors[tensor]
        arrives, wanted = self.placement(tensor, call.id), input_placement(choice, len(info.shape))
        if arrives == wanted and arrives != WHOLE:
            return arrives
        if arrives != WHOLE:
            reason = f"layer {call.layer!r} takes it as {wanted}, it arrives as {arrives}"
            self._conflict(self._origins(tensor, call.id), reason)
        elif wanted == WHOLE:
            self._enter(call.id, position, tensor)
        elif divides(info.shape, wanted, self.parts):
            self._boundary(call.id, "input", position, tensor, Transition(WHOLE, wanted), Transition(wanted, WHOLE))
        return WHOLE

    def _summed_output(
        self, call: Call, choice: StyleChoice, core: int, sharded_inputs: tuple[tuple[int, Placement], ...]
    ) -> None:
        self._boundary(call.id, "output", 0, core, SUMMED, STAYS_WHOLE)
        assert choice.contraction is not None
        after = choice.contraction.bias is not None or choice.contraction.has_activation
        self.found.records[call.id] = CallRecord(
            call.id, sharded_inputs, WHOLE, "bias+activation" if after else "", choice.reason
        )

    def _sharded_output(
        self,
        call: Call,
        choice: StyleChoice,
        core: int,
        placement: Shard,
        sharded_inputs: tuple[tuple[int, Placement], ...],
    ) -> None:
        output = call.outputs[0]
        origin: Origin = ("layer", (call.layer, call.mode))
        whole = Transition(placement, WHOLE), Transition(WHOLE, placement)
        closing = self.closings.layers.get((call.layer, call.mode))
        final, refusal = self._activation(call, core, placement)
        if refusal is not None:
            self._boundary(call.id, "output", 0, core, *whole)
            reason = f"{choice.reason}; gathered before its activation: {refusal}"
            record = CallRecord(call.id, sharded_inputs, WHOLE, "activation", reason)
        elif closing is not None or not isinstance(final, Shard):
            self._boundary(call.id, "output", 0, output, *whole)
            record = CallRecord(call.id, sharded_inputs, WHOLE, "", f"{choice.reason}; gathered: {closing}")
        else:
            self.found.placements[output] = final
            self.found.origins[output] = frozenset({origin})
            record = CallRecord(call.id, sharded_inputs, final, "", choice.reason)
        self.found.records[call.id] = record

    def _activation(self, call: Call, core: int, placement: Shard) -> tuple[Placement, str | None]:
        """Return the placement after the layer's own activation, and why it cannot run on shards if so."""
        if call.core_output is None:
            return placement, None
        states: dict[int, Placement] = {core: placement}
        for op in self.graph.ops[call.ops[0] : call.ops[1]]:
            if not any(tensor in states for tensor in op.inputs):
                continue
            if op.id in self.graph.own_gradients:
                return placement, f"{op.name} {OWN_GRADIENT}"
            inputs = {tensor: states.get(tensor, WHOLE) for tensor in op.inputs}
            followed = self.rules.follow(op, self.graph.tensors, inputs)
            if isinstance(followed, Refused):
                return placement, f"{op.name} {followed.reason}"
            if Partial() in followed.outputs:
                return placement, f"{op.name} {LEAVES_SUM}"
            states.update(zip(op.outputs, followed.outputs, strict=True))
        return states[call.outputs[0]], None

    # --- ops between -----------------------------------------------------------------------------------

    def _op(self, op: Op, call: int) -> None:
        inputs = {tensor: self.placement(tensor, call) for tensor in op.inputs}
        origins = frozenset().union(*(self._origins(tensor, call) for tensor in op.inputs))
        if all(placement == WHOLE for placement in inputs.values()):
            self.read_whole.update(((call, tensor), None) for tensor in op.inputs)
            return
        if op.name == REPEAT:
            self.found.regions_leave_blocks = True
            return
        if op.id in self.graph.own_gradients:
            self._conflict(origins, f"{op.name} in {self.graph.calls[call].layer!r} {OWN_GRADIENT}")
            return
        followed = self.rules.follow(op, self.graph.tensors, inputs)
        if isinstance(followed, Followed) and Partial() in followed.outputs:
            followed = Refused(LEAVES_SUM)
        if isinstance(followed, Refused):
            self._conflict(origins, f"{op.name} in {self.graph.calls[call].layer!r} {followed.reason}", in_code=True)
            return
        self.found.followed[op.id] = followed
        for tensor, placement in zip(op.outputs, followed.outputs, strict=True):
            self.found.placements[tensor] = placement
            self.found.origins[tensor] = origins
        for tensor, placement in inputs.items():
            reader = self.read_sharded.get((call, tensor), frozenset())
            if placement == WHOLE:
                self.read_sharded[call, tensor] = reader | origins
                self.entered_at.setdefault((call, tensor), {})[None] = None

    def _function(self, function: FunctionCall) -> None:
        """Follow the ops of a torch function together: tensors can change before it and after it."""
        ops, call = self.graph.ops[slice(*function.ops)], function.call
        made = {tensor for op in ops for tensor in op.outputs}
        taken = {tensor: self.placement(tensor, call) for op in ops for tensor in op.inputs if tensor not in made}
        if all(placement == WHOLE for placement in taken.values()):
            for op in ops:
                self._op(op, call)
            return
        origins = frozenset[Origin]().union(*(self._origins(tensor, call) for tensor in taken))
        if not self.graph.own_gradients.isdisjoint(range(*function.ops)):
            self._conflict(origins, f"{function.name} in {self.graph.calls[call].layer!r} {OWN_GRADIENT}")
            return
        found = follow_function(function, self.graph, taken, self.weights, self.rules, self.parts)
        if isinstance(found, Refused):
            self._conflict(origins, found.reason, in_code=True)
            return
        self.found.followed.update(found.followed)
        for tensor, placement in found.placements.items():
            if tensor not in found.summed:
                self.found.placements[tensor] = placement
                self.found.origins[tensor] = origins
        known = self.found.function_origins.get(call, frozenset())
        self.found.function_origins[call] = known | origins
        self._change_at(function, found)
        for tensor, placement in taken.items():
            if tensor in found.entering:
                self.read_sharded[call, tensor] = self.read_sharded.get((call, tensor), frozenset()) | origins
                is_argument = any(given == tensor for _, given in function.inputs)
                self.entered_at.setdefault((call, tensor), {})[function if is_argument else None] = None
            elif placement == WHOLE:
                self.read_whole[call, tensor] = None

    def _change_at(self, function: FunctionCall, found: FunctionFollowed) -> None:
        """Write down what changes at a function: inputs that are cut, outputs that are summed, sizes of shards."""
        for position, tensor in function.inputs:
            if tensor in found.cuts:
                cut = found.cuts[tensor]
                # The gradient of what one rank adds to a sum is that of the sum, which is whole on all of them.
                backward = STAYS_WHOLE if isinstance(cut, Partial) else Transition(cut, WHOLE)
                self._change_input(function, position, tensor, Transition(WHOLE, cut), backward)
        for op in range(*function.ops):
            self.found.cut_for.update({(op, tensor): cut for tensor, cut in found.cuts.items()})
        for tensor in found.summed:
            boundary = self._boundary_of(tensor, SUMMED, STAYS_WHOLE)
            self._change(function, output=boundary)
        sizes = sizes_in_arguments(function, self.graph, found, self.parts)
        layer = self.graph.calls[function.call]
        if sizes and (layer.layer, layer.mode) in self.closings.sizes:
            self._change(function, sizes=sizes)
        elif sizes:
            self.found.writes_sizes.add((layer.layer, layer.mode))

    def _change_input(
        self, function: FunctionCall, position: int, tensor: int, forward: Transition, backward: Transition
    ) -> None:
        before = self.changed.get(function.call, {}).get(function.ops[0])
        others = () if before is None else before.inputs
        entry = (position, self._boundary_of(tensor, forward, backward))
        self._change(function, inputs=tuple(sorted((*others, entry), key=lambda each: each[0])))

    def _change(self, function: FunctionCall, **changes: Any) -> None:
        changed = self.changed.setdefault(function.call, {})
        before = changed.get(function.ops[0], FunctionPlan(function.name, function.number))
        changed[function.ops[0]] = replace(before, **changes)

    def _enter_tensors_read_by_sharded_ops(self) -> None:
        """Give whole tensors that sharded ops read the boundary that sums their gradients."""
        for (call, tensor), origins in self.read_sharded.items():
            info = self.graph.tensors[tensor]
            if info.variable is not None:
                self._read_by_sharded_op(call, info.variable, (call, tensor) in self.read_whole, origins)
            elif "float" in info.dtype:
                self._read_inside(call, tensor, info, origins)
        for call, tensor in self.read_whole:
            variable = self.graph.tensors[tensor].variable
            if variable is not None and (call, tensor) not in self.read_sharded:
                self._use(call, variable, WHOLE, WHOLE)
        self._record_sharded_reads()

    def _read_inside(self, call: int, tensor: int, info: TensorInfo, origins: frozenset[Origin]) -> None:
        """Let a whole tensor enter at the arguments of the call that reads it with shards, if it can."""
        behind = self._made_from(call, tensor)
        positions = self._argument_positions(call, behind)
        read_whole = (call, tensor) in self.read_whole
        if positions and not read_whole and not {tensor, behind} & set(self.graph.calls[call].outputs):
            for position in positions:
                self._enter(call, position, behind)
        elif not info.requires_grad and tensor not in self.from_inputs:
            return
        elif None not in self.entered_at[call, tensor]:
            self._enter_at_functions(call, tensor)
        elif info.requires_grad:
            layer = self.graph.calls[call].layer
            reason = f"a whole tensor meets a sharded one inside {layer!r}, where no boundary can stand"
            self._conflict(origins, reason, in_code=True)
        else:
            self.found.input_gradients = False

    def _made_from(self, call: int, tensor: int) -> int:
        """Return the tensor of which ``tensor`` is but another layout, made for it alone in the call's own code."""
        while (op := self.makers.get(tensor)) is not None and op.call == call and op.name in SAME_VALUES:
            if len(op.inputs) != 1 or self.readers[call, op.inputs[0]] != 1:
                break
            tensor = op.inputs[0]
        return tensor

    def _enter_at_functions(self, call: int, tensor: int) -> None:
        for function in self.entered_at[call, tensor]:
            assert function is not None
            for position, given in function.inputs:
                if given == tensor:
                    self._change_input(function, position, tensor, STAYS_WHOLE, SUMMED)

    def _record_sharded_reads(self) -> None:
        for op in self.graph.ops:
            if op.id in self.found.followed:
                for tensor in op.inputs:
                    variable = self.graph.tensors[tensor].variable
                    if variable is not None and (placement := self.placement(tensor, op.call)) != WHOLE:
                        self.found.reads[self._read_of(op.call, variable)] = placement
                        self._use(op.call, variable, placement, placement)

    def _read_by_sharded_op(self, call: int, variable: str, also_whole: bool, origins: frozenset[Origin]) -> None:
        if also_whole or variable in self.passed_on:
            layer = self.graph.calls[call].layer
            reason = f"{layer!r} reads {variable!r} both with sharded and with whole tensors"
            self._conflict(origins, reason, in_code=True)
        else:
            self._use(call, variable, WHOLE, Partial())

    def _record_sharded_arguments(self) -> None:
        """Note which layers with variables, planned from their ops, take sharded tensors."""
        for call in self.graph.calls.values():
            if call.id in self.found.records or call.id in self.parents or not self.graph.layers[call.layer].variables:
                continue
            placed = [(position, self.placement(tensor, call.id)) for position, tensor in call.inputs]
            sharded = tuple((position, placement) for position, placement in placed if placement != WHOLE)
            self.found.records[call.id] = CallRecord(call.id, sharded)

    def _argument_positions(self, call: int, tensor: int) -> list[int]:
        """Return where a call without inner calls takes ``tensor`` as an argument."""
        if call in self.parents:
            return []
        return [position for position, given in self.graph.calls[call].inputs if given == tensor]

    def _outputs_are_whole(self) -> None:
        for tensor in self.graph.outputs:
            if self.found.placements.get(tensor, WHOLE) != WHOLE:
                self._conflict(self.found.origins[tensor], "it is an output of the model, which every rank holds whole")

    def _calls_of_a_layer_agree(self) -> None:
        """A layer has one plan; where its calls would need different ones, it computes on whole tensors."""
        boundaries: dict[int, list[Any]] = {}
        for p in self.found.boundaries:
            boundaries.setdefault(p.call, []).append(
                (p.place, p.position, p.variable, p.boundary.forward, p.boundary.backward)
            )
        first: dict[LayerMode, tuple[Call, Any]] = {}
        for call in self.graph.calls.values():
            record = self.found.records.get(call.id)
            done = (
                record and (record.sharded_inputs, record.output_placement, record.epilogue),
                boundaries.get(call.id, []),
                functions_done(self.found, call.id),
            )
            other, known = first.setdefault((call.layer, call.mode), (call, done))
            if known != done:
                self._disagree(other, call)

    def _regions_stay_in_blocks(self) -> None:
        """A block can stand for others only where whole tensors go in and come out."""
        for twin in {repeat.twin for repeat in self.graph.repeats.values()}:
            call = self.graph.calls[twin]
            ends = (*(tensor for _, tensor in call.inputs), *call.outputs)
            if any(self.placement(tensor, twin) != WHOLE for tensor in ends):
                self.found.regions_leave_blocks = True

    def _disagree(self, *calls: Call) -> None:
        layer, mode = calls[0].layer, calls[0].mode
        reason = f"layer {layer!r} is called in ways that need different boundaries"
        given = [(tensor, call.id) for call in calls for _, tensor in call.inputs]
        origins = frozenset().union(*(self._origins(tensor, call) for tensor, call in given))
        ids = {call.id for call in calls}
        read = [origins_ for (call, _), origins_ in self.read_sharded.items() if call in ids]
        read += [origins_ for call, origins_ in self.found.function_origins.items() if call in ids]
        choice = self.styles.get((layer, mode))
        whole: frozenset[Origin] = frozenset()
        if choice is not None and (layer, mode) not in self.closings.whole:
            whole = frozenset({("whole", (layer, mode))})
        self._conflict(origins.union(*read) | whole, reason)

    # --- boundaries ------------------------------------------------------------------------------------

    def _enter(self, call: int, position: int, tensor: int) -> None:
        """A whole tensor enters a region: nothing forward, its gradient is summed backward."""
        if "float" in self.graph.tensors[tensor].dtype:
            self._boundary(call, "input", position, tensor, STAYS_WHOLE, SUMMED)

    def _use(self, call: int, variable: str, used: Placement, gradient: Placement) -> None:
        """A layer reads a variable: from its stored placement to ``used``, its gradient back."""
        stored, info = self.stored[variable], self.graph.variables[variable]
        if stored == used == WHOLE and not isinstance(gradient, Partial):
            return
        if (call, variable) not in self.used:
            self.used.add((call, variable))
            boundary = Boundary(
                tensor=variable,
                shape=info.shape,
                dtype=info.dtype,
                itemsize=info.itemsize,
                forward=Transition(stored, used),
                backward=Transition(gradient, stored),
                has_gradient=info.trainable,
            )
            self.found.boundaries.append(Placed(call, "variable", 0, variable, -1, boundary))

    def _boundary(
        self,
        call: int,
        place: Literal["input", "output"],
        position: int,
        tensor: int,
        forward: Transition,
        backward: Transition,
    ) -> None:
        boundary = self._boundary_of(tensor, forward, backward)
        self.found.boundaries.append(Placed(call, place, position, None, tensor, boundary))

    def _boundary_of(self, tensor: int, forward: Transition, backward: Transition) -> Boundary:
        info = self.graph.tensors[tensor]
        return Boundary(
            tensor=self.graph.tensor_name(tensor),
            shape=info.shape,
            dtype=info.dtype,
            itemsize=info.itemsize,
            forward=forward,
            backward=backward,
            has_gradient=info.has_gradient,
        )


def _weights(graph: ModelGraph) -> set[int]:
    """Return the tensors that are variables, in any dtype and layout."""
    found = {number for number, info in graph.tensors.items() if info.variable is not None}
    for op in graph.ops:
        if op.name in SAME_VALUES and op.inputs[0] in found:
            found.update(op.outputs)
    return found


def functions_done(walk: Walk, call: int) -> list[Any]:
    """Return what changes at the functions of a call, without names and shapes of tensors."""
    return [
        (
            function.name,
            function.number,
            [(position, boundary.forward, boundary.backward) for position, boundary in function.inputs],
            function.output and (function.output.forward, function.output.backward),
            function.sizes,
        )
        for function in walk.functions.get(call, ())
    ]


def _memory_order(info: TensorInfo) -> tuple[int, ...]:
    """Return the dims of a tensor from the outermost in memory to the innermost."""
    return tuple(sorted(range(len(info.shape)), key=lambda dim: (-info.stride[dim], dim)))


def _float_tensors_from_inputs(graph: ModelGraph) -> set[int]:
    """Return the floating-point tensors that depend on the model's inputs through such tensors."""
    found = {tensor for tensor in graph.inputs if "float" in graph.tensors[tensor].dtype}
    for op in graph.ops:
        if any(tensor in found for tensor in op.inputs):
            found.update(tensor for tensor in op.outputs if "float" in graph.tensors[tensor].dtype)
    return found
