"""Ways: how the planner's own walk can take a step, for everything that its inputs and variables can be.

Each question is put to the code that plans: the walk's steps, its boundaries, and DTensor's rules behind it, which
remember their answers. So the search knows of no layer and no op; what it sees is what planning will do.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tp_planner.dryrun.op_work import NO_WORK, OpMeter, OpWork, is_copy_in_order, is_in_place, is_view
from tp_planner.dryrun.sharding_rules import DTensorRules
from tp_planner.ir.graph import REPEAT, FunctionCall, ModelGraph, Op, TensorInfo
from tp_planner.ir.placement import WHOLE, Partial, Placement, Shard, in_parts, local_shape, without_parts
from tp_planner.ir.plan import Boundary, Transition
from tp_planner.passes.choose_styles import StyleChoice, choose_styles, input_placement, output_dim, weight_uses
from tp_planner.passes.follow_ops import Followed
from tp_planner.passes.walk.code import follow_op, follow_torch_function
from tp_planner.passes.walk.entering import Sources, enter_tensors_read_with_shards
from tp_planner.passes.walk.facts import Closings, LayerMode, Origins, VariableRead, changes_of
from tp_planner.passes.walk.known import Known
from tp_planner.passes.walk.layers import follow_contraction, follow_dropout
from tp_planner.passes.walk.notes import Notes
from tp_planner.passes.walk.packing import stored_in_parts, weights_in_parts
from tp_planner.search.gradients import Gradients
from tp_planner.search.steps import Step, Times, contraction_of

MOST_COMBINATIONS = 20_000  # of what one step takes; beyond, what it takes is sharded alike or whole
_COPY = "aten.clone.default"
_RESHAPED = "aten._unsafe_view.default"  # what reshapes are of a copy, where they are no views
_SOMEWHERE: Origins = frozenset({("layer", ("", ""))})


@dataclass(frozen=True, slots=True)
class Slot:
    """What has one placement in a layout: a ``tensor``, a variable as ``stored``, or as a layer's code uses it."""

    kind: str  # "tensor", "stored" or "used"
    name: int | str | VariableRead


@dataclass(frozen=True, slots=True)
class Crossing:
    """A boundary that is crossed; equal ones are crossed once. ``variable`` is the one that is read there, if any."""

    where: Any
    boundary: Boundary
    times: int
    variable: str | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """One way to take a step.

    ``given`` and ``made`` say how it has its slots, ``crossings`` which boundaries it needs, ``work`` what a rank
    computes. ``plan`` is what the plan says of the step's layer: it is one for all calls of the layer. ``is_plain``
    says that this is nothing, ``writes_sizes`` that it would be but for sizes that the layer's code writes.
    """

    given: tuple[tuple[Slot, Placement], ...]
    made: tuple[tuple[Slot, Placement], ...]
    crossings: tuple[Crossing, ...]
    work: OpWork
    plan: Any
    is_plain: bool
    writes_sizes: bool

    @property
    def gathers_output(self) -> bool:
        """Whether shards that the step makes are gathered at once."""
        gathered = (each for each in self.crossings if each.boundary.forward.collective == "all_gather")
        return any(each.variable is None for each in gathered)


class Walker:
    """Asks the walk about one step at a time.

    Args:
        graph: a trace of a training call, with its functions.
        rules: DTensor's.
        meter: measures ops.
        parts: size of the model axis.
        options: how each variable can be stored.
        packed: the parts in which a variable that is stored so is stored, too, for what comes after.
    """

    def __init__(
        self,
        graph: ModelGraph,
        rules: DTensorRules,
        meter: OpMeter,
        parts: int,
        options: Mapping[str, Sequence[Placement]],
        packed: Mapping[tuple[str, Placement], tuple[int, ...]],
    ) -> None:
        self.graph, self.rules, self.meter, self.parts, self.options = graph, rules, meter, parts, options
        self.packed = packed
        self._times, self._sources, self._gradients = Times(graph), Sources(graph), Gradients(graph, parts)
        # What is asked about; the walk is given these same objects each time.
        self._stored: dict[str, Placement] = dict.fromkeys(graph.variables, WHOLE)
        self._styles: dict[LayerMode, StyleChoice] = {}
        self._closed: dict[LayerMode, str] = {}
        self._gathered: dict[VariableRead, str] = {}
        closings = Closings(layers=self._closed, reads=self._gathered)
        self._known = Known(graph, self._stored, self._styles, closings, rules, parts)
        self._views = {tensor for op in graph.ops if op.name != REPEAT and is_view(op.name) for tensor in op.outputs}
        self._read_by_ops = {tensor for op in graph.ops for tensor in op.inputs}
        self._calls = Counter(call.layer for call in graph.calls.values() if call.id not in graph.repeats)
        self._functions = {function.ops[0]: function for function in graph.functions or ()}

    def ways(self, step: Step, tensors: Mapping[int, Sequence[Placement]]) -> Iterator[Way]:
        """Yield the ways to take a step whose inputs can be placed as ``tensors`` says, the wholly replicated first."""
        domains = [tensors.get(tensor, (WHOLE,)) for tensor in step.takes]
        stored_domains = [self.options[key] for key in step.variables]
        for taken in _combinations(domains):
            for stored in _combinations(stored_domains):
                yield from self._ways(step, dict(zip(step.takes, taken, strict=True)), stored)

    def _ways(self, step: Step, taken: Mapping[int, Placement], stored: Sequence[Placement]) -> Iterator[Way]:
        self._stored.update(zip(step.variables, stored, strict=True))
        try:
            choice = self._choice(step)
            yield from self._ways_as_stored(step, taken, choice)
            if packed := self._in_parts(step, choice):
                self._stored.update(packed)
                yield from self._ways_as_stored(step, taken, choice)
        finally:
            self._stored.update(dict.fromkeys(step.variables, WHOLE))

    def _ways_as_stored(self, step: Step, taken: Mapping[int, Placement], choice: StyleChoice | None) -> Iterator[Way]:
        if choice is None:
            yield from self._ways_by_op(step, taken)
            return
        for closed in (False, True) if self._leaves_shards(step, choice) else (False,):
            way = self._way(step, taken, closed, frozenset())
            if isinstance(way, Way):
                yield way

    def _in_parts(self, step: Step, choice: StyleChoice | None) -> dict[str, Placement]:
        """Return what a step can have stored in parts, for what comes after it."""
        if choice is not None:
            assert choice.contraction is not None
            main = choice.contraction.main_weight
            parts = self.packed.get((main, self._stored[main]), ())
            return weights_in_parts(choice, self._stored, parts) if parts else {}
        stored = ((key, self._stored[key]) for key in step.variables)
        return {key: in_parts(shard, self.packed[key, shard]) for key, shard in stored if (key, shard) in self.packed}

    def _choice(self, step: Step) -> StyleChoice | None:
        """Return the style of a step that is one contraction of shards."""
        self._styles.clear()
        if step.layer_call is None:
            return None
        layer = step.layer_call.layer
        info = {layer: self.graph.layers[layer]}
        self._styles.update(choose_styles(info, self.graph.variables, self._stored, self.parts))
        return self._known.contraction(step.layer_call)

    def _leaves_shards(self, step: Step, choice: StyleChoice) -> bool:
        """Whether a contraction makes shards, which can be gathered at once."""
        assert step.layer_call is not None
        core = step.layer_call.core_output
        tensor = step.layer_call.outputs[0] if core is None else core
        return output_dim(choice, len(self.graph.tensors[tensor].shape)) is not None

    def _ways_by_op(self, step: Step, taken: Mapping[int, Placement]) -> Iterator[Way]:
        """Yield the ways of a step that is followed op by op: variables are used as stored, or gathered.

        Where only this step uses them, those are gathered that a conflict is about, as planning does.
        """
        reads = [self._known.read_of(step.call, key) for key in step.variables if self._stored[key] != WHOLE]
        if self._uses_alone(step):
            gathered: frozenset[VariableRead] = frozenset()
            while not isinstance(way := self._way(step, taken, False, gathered), Way):
                refused = frozenset(read for read in reads if ("read", read) in way)
                if refused <= gathered:
                    return
                gathered |= refused
            yield way
            return
        for count in range(len(reads) + 1):
            for keys in itertools.combinations(reads, count):
                way = self._way(step, taken, False, frozenset(keys))
                if isinstance(way, Way):
                    yield way

    def _uses_alone(self, step: Step) -> bool:
        """Whether no other step reads variables in calls of the step's layer."""
        return step.layer_call is not None and self._calls[step.layer_call.layer] == 1

    def _way(
        self, step: Step, taken: Mapping[int, Placement], closed: bool, gathered: frozenset[VariableRead]
    ) -> Way | Origins:
        """Return the way that the walk takes, weights in the parts that it asks for; if it meets conflicts, these."""
        plain = {key: self._stored[key] for key in step.variables}
        try:
            while not isinstance(way := self._way_as_stored(step, taken, closed, gathered), Way):
                if not self._store_in_parts(step, way):
                    break
            return way
        finally:
            self._stored.update(plain)

    def _store_in_parts(self, step: Step, conflicts: Origins) -> bool:
        """Store weights of a step in the parts that conflicts are about, as planning does; False if none can be."""
        closings = self._known.closings
        for origin in sorted(each for each in conflicts if each[0] == "packed"):
            closings = closings.closing(origin, "")
        found = stored_in_parts(self._stored, self._styles, closings, self.graph)
        new = {key: found[key] for key in step.variables if found[key] != self._stored[key]}
        self._stored.update(new)
        return bool(new)

    def _way_as_stored(
        self, step: Step, taken: Mapping[int, Placement], closed: bool, gathered: frozenset[VariableRead]
    ) -> Way | Origins:
        """Return the way that the walk takes; if it meets conflicts, where their shards come from."""
        known, call = self._known, self.graph.calls[step.call]
        known.placements.clear()
        known.origins.clear()
        self._closed.clear()
        self._gathered.clear()
        for tensor, placement in taken.items():
            if placement != WHOLE:
                known.place(tensor, placement, _SOMEWHERE)
        if closed:
            self._closed[call.layer, call.mode] = "a whole tensor is read"
        self._gathered.update(dict.fromkeys(sorted(gathered), "whole tensors are read"))
        notes = Notes(known)
        self._follow(step, notes)
        if not notes.conflicts:
            enter_tensors_read_with_shards(known, notes, self._sources)
        if notes.conflicts:
            return Origins().union(*(conflict.origins for conflict in notes.conflicts))
        made = tuple((Slot("tensor", tensor), known.placements.get(tensor, WHOLE)) for tensor in step.makes)
        return Way(
            given=self._given(step, taken, gathered),
            made=made,
            crossings=tuple(self._crossings(step, notes)),
            work=self._work(step, taken, notes),
            plan=self._plan(step, notes),
            is_plain=not (notes.boundaries or notes.functions),
            writes_sizes=bool(notes.writes_sizes),
        )

    def _follow(self, step: Step, notes: Notes) -> None:
        call = step.layer_call
        if call is not None and (choice := self._known.contraction(call)) is not None:
            follow_contraction(call, choice, self._known, notes)
        elif call is not None and self.graph.layers[call.layer].is_dropout:
            follow_dropout(call, self._known, notes)
        else:
            for piece in step.pieces:
                if isinstance(piece, FunctionCall):
                    follow_torch_function(piece, self._known, notes)
                else:
                    follow_op(piece, self._known, notes)
                if notes.conflicts:
                    return

    def _given(
        self, step: Step, taken: Mapping[int, Placement], gathered: frozenset[VariableRead]
    ) -> tuple[tuple[Slot, Placement], ...]:
        whole = {key for _, key in gathered}
        tensors = [(Slot("tensor", tensor), placement) for tensor, placement in taken.items()]
        stored = [(Slot("stored", key), without_parts(self._stored[key])) for key in step.variables]
        used = [
            (Slot("used", self._known.read_of(step.call, key)), WHOLE if key in whole else self._stored[key])
            for key in step.variables
            if len(self.options[key]) > 1
        ]
        return (*tensors, *stored, *used)

    # --- what it costs ---------------------------------------------------------------------------------

    def _crossings(self, step: Step, notes: Notes) -> Iterator[Crossing]:
        for placed in notes.boundaries:
            where: Any = placed.call, placed.place, placed.variable
            times = self._times.of(placed.call)
            if placed.place == "input":
                tensor = dict(self.graph.calls[placed.call].inputs)[placed.position]
                where, times = tensor, self._times.of_crossing(placed.call, tensor)
            yield from self._crossing(where, placed.boundary, times, placed.variable)
        for call, plans in notes._functions.items():
            for first, plan in plans.items():
                arguments = dict(self._functions[first].inputs)
                for position, boundary in plan.inputs:
                    tensor = arguments[position]
                    yield from self._crossing(tensor, boundary, self._times.of_crossing(call, tensor))
                if plan.output is not None:
                    yield from self._crossing((call, first), plan.output, self._times.of(call))

    def _crossing(self, where: Any, boundary: Boundary, times: int, variable: str | None = None) -> Iterator[Crossing]:
        if not boundary.is_identity:
            yield Crossing((where, boundary.forward, boundary.backward), boundary, times, variable)

    def _plan(self, step: Step, notes: Notes) -> Any:
        """Return what has to be the same for all calls of a layer, or of a function in its code."""
        crossed = [(p.place, p.position, p.variable, p.boundary.forward, p.boundary.backward) for p in notes.boundaries]
        records = [
            (record.sharded_inputs, record.output_placement, record.epilogue) for record in notes.records.values()
        ]
        functions = [changes_of(plans) for plans in notes.functions.values()]
        return repr((sorted(map(repr, crossed)), records, functions))

    # --- what it computes ------------------------------------------------------------------------------

    def _work(self, step: Step, taken: Mapping[int, Placement], notes: Notes) -> OpWork:
        choice = None if step.layer_call is None else self._known.contraction(step.layer_call)
        if choice is not None or self._is_whole_contraction(step, taken):
            return self._work_of_contraction(step, choice)
        dropout = self.graph.layers[self.graph.calls[step.call].layer].is_dropout and step.layer_call is not None
        if dropout:
            placement = next(iter(taken.values()), WHOLE)
            return sum((self._work_of(op, [placement] * len(op.inputs), None) for op in self._ops(step)), NO_WORK)
        gradients = self._work_of_gradients(step, self._known.placements)
        if self._trains_matrices(step):
            return self._work_followed_together(step, notes) + gradients
        placed = self._read(step)
        needed = [op for op in self._ops(step) if not self._is_left_out(op, placed, self.graph.tensors)]
        reshaped = (
            self._gradients.reshaped(op, placed[op.inputs[0]], placed[op.outputs[0]])
            for op in needed
            if op.inputs and op.outputs
        )
        work = sum((self._work_followed(op, notes) for op in needed), self._work_of_sums(notes))
        return work + sum(reshaped, gradients)

    def _trains_matrices(self, step: Step) -> bool:
        """Whether a step is a layer whose code leaves gradients in matrices, which are laid out as these."""
        read = (self.graph.variables[key] for key in step.variables)
        return step.layer_call is not None and any(each.trainable and len(each.shape) > 1 for each in read)

    def _work_followed_together(self, step: Step, notes: Notes) -> OpWork:
        """Return the work of a layer's ops one after the other; what is cut for them is a tensor of its own."""
        ops, cut = _name_what_is_cut(self._ops(step), notes)
        placed = self._read(step) | {own: shard for (_, shard), own in cut.items()}
        tensors = {tensor: self.graph.tensors[tensor] for op in self._ops(step) for tensor in (*op.inputs, *op.outputs)}
        tensors |= {own: _as_copied(tensors[tensor], own) for (tensor, _), own in cut.items()}
        arguments = {op.id: notes.followed[op.id].arguments for op in ops if op.id in notes.followed}
        needed = self._without_copies(ops, placed, tensors)
        made = {tensor for op in ops for tensor in op.outputs}
        ends = dict.fromkeys((*step.makes, *(tensor for tensor, _ in cut if tensor in made)))
        sent = {*self._summed(notes), *(cut.get(each, each[0]) for each in self._sent_on_the_way_back(notes))}
        return self.meter.work_together(needed, tensors, placed, tuple(ends), arguments, sent)

    def _summed(self, notes: Notes) -> Iterator[int]:
        """Yield what functions make that is summed over the ranks."""
        for plans in notes._functions.values():
            for first, plan in plans.items():
                if plan.output is not None and _is_summed(plan.output.forward):
                    yield from self._functions[first].outputs

    def _sent_on_the_way_back(self, notes: Notes) -> Iterator[tuple[int, Placement]]:
        """Yield what is taken, and as what, of which the gradient is sent to the ranks, and is of one op alone."""
        taken = [
            (dict(self.graph.calls[placed.call].inputs)[placed.position], placed.boundary)
            for placed in notes.boundaries
            if placed.place == "input"
        ]
        for plans in notes._functions.values():
            for first, plan in plans.items():
                arguments = dict(self._functions[first].inputs)
                taken += [(arguments[position], boundary) for position, boundary in plan.inputs]
        for tensor, boundary in taken:
            if boundary.has_gradient and boundary.backward.collective and self._gradients.is_of_one_op(tensor):
                yield tensor, boundary.forward.target

    def _work_of_sums(self, notes: Notes) -> OpWork:
        """Return the work of copying what functions make to be summed, where it is not in the order of its dims."""
        made = (self.graph.tensors[tensor] for tensor in self._summed(notes))
        copied = (each for each in made if not self.meter.is_contiguous(each, WHOLE))
        return sum((OpWork((), 2 * math.prod(each.shape) * each.itemsize, 1) for each in copied), NO_WORK)

    def _without_copies(
        self, ops: Sequence[Op], placed: Mapping[int, Placement], tensors: Mapping[int, TensorInfo]
    ) -> list[Op]:
        """Return the ops but for copies that shards do not need; what reads these reads what they were made of."""
        made_of: dict[int, int] = {}
        needed = []
        for op in ops:
            inputs = tuple(made_of.get(each, each) for each in op.inputs)
            if self._is_left_out(op, placed, tensors):
                made_of[op.outputs[0]] = inputs[0]
            else:
                needed.append(op if inputs == op.inputs else replace(op, inputs=inputs))
        return needed

    def _read(self, step: Step) -> dict[int, Placement]:
        """Return how ops have what they take and make: a sum over the ranks is of the size of the whole."""
        called = {tensor: op.call for op in self._ops(step) for tensor in (*op.inputs, *op.outputs)}
        placed = ((tensor, self._known.placement(tensor, call)) for tensor, call in called.items())
        return {tensor: WHOLE if isinstance(placement, Partial) else placement for tensor, placement in placed}

    def _work_of_gradients(self, step: Step, placed: Mapping[int, Placement]) -> OpWork:
        """Return the work of adding up the gradients of what the step makes."""
        made = (tensor for op in self._ops(step) for tensor in op.outputs)
        added = (self._gradients.added(self.graph.tensors[tensor], placed.get(tensor, WHOLE)) for tensor in made)
        return sum(added, NO_WORK)

    def _ops(self, step: Step) -> Sequence[Op]:
        return self.graph.ops[slice(*step.ops)]

    def _is_left_out(self, op: Op, placed: Mapping[int, Placement], tensors: Mapping[int, TensorInfo]) -> bool:
        """Whether an op is a copy for an order in memory that shards have: with one head left, say.

        Or one that autograd makes of what the next op writes into: it is made, and measured, with that op.
        """
        following = self.graph.ops[op.id + 1 : op.id + 2]
        if op.name == _COPY and op.outputs[0] not in self._read_by_ops:
            written = self.graph.ops[op.id].inputs
            return any(is_in_place(each.name) and each.inputs[:1] == written for each in following)
        if not is_copy_in_order(op):
            return False
        taken = op.inputs[0]
        if (placement := placed.get(taken, WHOLE)) == WHOLE:
            return False
        reshaped = [each.outputs[0] for each in following if each.name == _RESHAPED and each.inputs == op.outputs]
        if not reshaped:
            return self.meter.is_contiguous(tensors[taken], placement)
        local = local_shape(self.graph.tensors[reshaped[0]].shape, placed.get(reshaped[0], WHOLE), self.parts)
        return self.meter.is_view(tensors[taken], placement, local)

    def _work_followed(self, op: Op, notes: Notes) -> OpWork:
        placed = [notes.cut_for.get((op.id, tensor), self._known.placement(tensor, op.call)) for tensor in op.inputs]
        followed = notes.followed.get(op.id)
        return self._work_of(op, placed, followed)

    def _work_of(self, op: Op, placed: Sequence[Placement], followed: Followed | None) -> OpWork:
        whole = [WHOLE if isinstance(placement, Partial) else placement for placement in placed]
        arguments = None if followed is None else followed.arguments
        return self.meter.work(op, self.graph.tensors, whole, arguments, self._writes_into_view(op))

    def _writes_into_view(self, op: Op) -> bool:
        return is_in_place(op.name) and op.inputs[0] in self._views

    def _is_whole_contraction(self, step: Step, taken: Mapping[int, Placement]) -> bool:
        """Whether a step is a contraction that takes nothing but whole tensors."""
        if step.layer_call is None or contraction_of(step.layer_call, self.graph) is None:
            return False
        read = (self._known.placement(tensor, op.call) for op in self._ops(step) for tensor in op.inputs)
        return all(placement == WHOLE for placement in (*taken.values(), *read))

    def _work_of_contraction(self, step: Step, choice: StyleChoice | None) -> OpWork:
        """Return the work of a contraction's ops, its input and weights placed as the style takes them.

        A sum over the ranks is of the size of the whole, and whole for the ops that follow.
        """
        placed: dict[int, Placement] = {}
        uses: dict[str, Placement] = {}
        if choice is not None:
            assert step.layer_call is not None
            uses = {key: use.placement for key, use in weight_uses(choice).items()}
            tensor = step.layer_call.inputs[0][1]
            placed[tensor] = input_placement(choice, len(self.graph.tensors[tensor].shape))
        arguments: dict[int, Sequence[Any]] = {}
        for op in self._ops(step):
            for each in op.inputs:
                if (key := self.graph.tensors[each].variable) is not None:
                    placed[each] = uses.get(key, WHOLE)
            inputs = {each: placed.setdefault(each, WHOLE) for each in op.inputs}
            if any(placement != WHOLE for placement in inputs.values()):
                answer = self.rules.follow(op, self.graph.tensors, inputs)
                followed = answer if isinstance(answer, Followed) else None
                outputs = followed.outputs if followed else (WHOLE,) * len(op.outputs)
                if followed is not None:
                    arguments[op.id] = followed.arguments
                for each, made in zip(op.outputs, outputs, strict=True):
                    placed[each] = WHOLE if isinstance(made, Partial) else made
        needed = self._without_copies(self._ops(step), placed, self.graph.tensors)
        work = self.meter.work_together(needed, self.graph.tensors, placed, step.makes, arguments)
        if choice is not None and choice.style == "vocabulary":
            work += self._work_of_own_rows(step, choice)
        return work + self._work_of_gradients(step, {each: placed.get(each, WHOLE) for each in step.makes})

    def _work_of_own_rows(self, step: Step, choice: StyleChoice) -> OpWork:
        """Return the work of finding the ids of a rank's own rows, and of zeros for those of others."""
        call = step.layer_call
        assert call is not None and choice.contraction is not None
        made = call.outputs[0] if call.core_output is None else call.core_output
        rows = self.graph.variables[choice.contraction.main_weight].shape[0]
        return self.meter.of_own_rows(self.graph.tensors[call.inputs[0][1]], self.graph.tensors[made], rows)


def _name_what_is_cut(ops: Sequence[Op], notes: Notes) -> tuple[list[Op], dict[tuple[int, Placement], int]]:
    """Return ops that read what is cut for them under a number of its own, and that by tensor and shard."""
    reading: list[Op] = []
    cut: dict[tuple[int, Placement], int] = {}
    for op in ops:
        read = ((tensor, notes.cut_for.get((op.id, tensor))) for tensor in op.inputs)
        inputs = (
            cut.setdefault((tensor, shard), -len(cut) - 1) if isinstance(shard, Shard) else tensor
            for tensor, shard in read
        )
        reading.append(replace(op, inputs=tuple(inputs)))
    return reading, cut


def _as_copied(info: TensorInfo, number: int) -> TensorInfo:
    """Return a tensor that is copied in the order of its dims, as shards are that are cut."""
    strides = tuple(math.prod(info.shape[dim + 1 :]) for dim in range(len(info.shape)))
    return replace(info, id=number, stride=strides)


def _is_summed(change: Transition) -> bool:
    return change.collective == "all_reduce"


def _combinations(domains: Sequence[Sequence[Placement]]) -> Iterator[tuple[Placement, ...]]:
    """Yield what a step can be given: the first of each domain first."""
    count = 1
    for domain in domains:
        count *= len(domain)
    if count <= MOST_COMBINATIONS:
        yield from itertools.product(*domains)
        return
    every = dict.fromkeys(placement for domain in domains for placement in domain)
    for each in every:
        yield tuple(each if each in domain else domain[0] for domain in domains)


def transitions(crossing: Crossing) -> Iterator[tuple[Transition, bool]]:
    """Yield the changes of placement at a boundary, and whether each is on the way back."""
    yield crossing.boundary.forward, False
    if crossing.boundary.has_gradient:
        yield crossing.boundary.backward, True
