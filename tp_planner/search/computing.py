"""Computing: what a rank computes in one way of a step, as ops that can be measured on its shards.

What its gradients are like in memory, the steps after it say, of which the ways are not known yet.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tp_planner.dryrun.op_work import (
    NO_WORK,
    Ends,
    Measured,
    OpMeter,
    OpWork,
    Strides,
    is_copy_in_order,
    is_in_place,
    is_view,
)
from tp_planner.dryrun.sharding_rules import DTensorRules
from tp_planner.ir.graph import REPEAT, Op, TensorInfo
from tp_planner.ir.placement import WHOLE, Partial, Placement, Shape, Shard, local_shape
from tp_planner.ir.plan import Boundary, Transition
from tp_planner.passes.choose_styles import StyleChoice, input_placement, weight_uses
from tp_planner.passes.follow_ops import Followed
from tp_planner.passes.walk.known import Known
from tp_planner.passes.walk.notes import Notes
from tp_planner.search.gradients import Gradients
from tp_planner.search.steps import Step, contraction_of

_COPY = "aten.clone.default"
_RESHAPED = "aten._unsafe_view.default"  # what reshapes are of a copy, where they are no views

Tensors = Mapping[int, TensorInfo]
Crossed = tuple[int, Transition, Transition]  # a tensor, and how it crosses a boundary forward and back
_Cut = tuple[int, Placement]  # a tensor, and the shard of it that is cut
_NOTHING_CUT: Tensors = {}


@dataclass(frozen=True, slots=True)
class _Alone:
    """One op; see ``OpMeter.work``. ``cut`` are tensors that are only its."""

    op: Op
    cut: Tensors
    placed: tuple[Placement, ...]
    arguments: Sequence[Any] | None
    into_view: bool
    kept: frozenset[int]

    def measured(self, meter: OpMeter, tensors: Tensors, gradients: Strides) -> Measured:
        known = _with_cut(tensors, self.cut, (self.op,))
        return meter.work(self.op, known, self.placed, self.arguments, self.into_view, gradients, self.kept)


@dataclass(frozen=True, slots=True)
class _Together:
    """Ops that run one after the other; see ``OpMeter.work_together``. ``cut`` are tensors that are only theirs."""

    ops: tuple[Op, ...]
    cut: Tensors
    placed: Mapping[int, Placement]
    made: tuple[int, ...]
    arguments: Mapping[int, Sequence[Any]]
    sent: frozenset[int] = frozenset()
    returned: Mapping[int, Crossed] = field(default_factory=dict)
    gathered: frozenset[int] = frozenset()

    def measured(self, meter: OpMeter, tensors: Tensors, gradients: Strides) -> Measured:
        known = _with_cut(tensors, self.cut, self.ops)
        ends = Ends(self.made, self.sent, self.returned.keys(), self.gathered)
        return meter.work_together(self.ops, known, self.placed, self.arguments, ends, gradients)


def _with_cut(tensors: Tensors, cut: Tensors, ops: Sequence[Op]) -> Tensors:
    if not cut:
        return tensors
    return {each: tensors[each] for op in ops for each in (*op.inputs, *op.outputs) if each not in cut} | dict(cut)


@dataclass(frozen=True, slots=True)
class Computed:
    """What ops compute, how they leave the gradients of what they take, and where these are copied to be sent."""

    work: OpWork
    strides: Strides
    copied: frozenset[Crossed]


@dataclass(frozen=True, slots=True)
class Computation:
    """The ops of one way of a step, in order, and work ``besides``.

    ``copied`` are the strides of gradients that boundaries make anew.
    """

    parts: tuple[_Alone | _Together, ...]
    besides: OpWork
    copied: Strides

    def measured(self, meter: OpMeter, tensors: Tensors, gradients: Strides) -> Computed:
        """Return what it computes if gradients of what it makes come so, and how it leaves those of what it takes."""
        work, strides, copied = self.besides, {**gradients, **self.copied}, frozenset[Crossed]()
        for part in reversed(self.parts):
            found = part.measured(meter, tensors, strides)
            work += found.work
            if isinstance(part, _Together):
                copied |= {part.returned[tensor] for tensor in found.disordered}
            for tensor, each in found.strides.items():
                # Of several, the first says it, if it is not expanded; what is cut is of the ops alone.
                if tensor >= 0 and 0 in strides.setdefault(tensor, each):
                    strides[tensor] = each
        return Computed(work, strides, copied)


class Computing:
    """Says what ways compute, from what the walk ``known`` has found for them.

    Args:
        known: the walk's.
        meter: measures ops.
        gradients: those of the graph.
    """

    def __init__(self, known: Known, meter: OpMeter, rules: DTensorRules, gradients: Gradients) -> None:
        self._known, self._meter, self._rules, self._gradients = known, meter, rules, gradients
        self._graph = graph = known.graph
        self._views = {tensor for op in graph.ops if op.name != REPEAT and is_view(op.name) for tensor in op.outputs}
        self._read_by_ops = {tensor for op in graph.ops for tensor in op.inputs}
        self._functions = {function.ops[0]: function for function in graph.functions or ()}

    def of(self, step: Step, taken: Mapping[int, Placement], notes: Notes) -> Computation:
        """Return what is computed in the way that the walk has just taken."""
        choice = None if step.layer_call is None else self._known.contraction(step.layer_call)
        copied = dict(self._copied_on_the_way_back(notes))
        if choice is not None or self._is_whole_contraction(step, taken):
            return self._of_contraction(step, choice, copied)
        if step.layer_call is not None and self._graph.layers[step.layer_call.layer].is_dropout:
            placement = next(iter(taken.values()), WHOLE)
            parts = (self._alone(op, [placement] * len(op.inputs), None) for op in self._ops(step))
            return Computation(tuple(parts), NO_WORK, copied)
        if step.together:
            return self._of_layer(step, notes, copied)
        added = self._added(tensor for op in self._ops(step) for tensor in op.outputs)
        needed = self._without_copies(self._ops(step), self._read(step), self._graph.tensors)
        followed = tuple(self._followed(op, notes) for op in needed)
        return Computation(followed, self._of_sums(notes) + added, copied)

    def _ops(self, step: Step) -> Sequence[Op]:
        return self._graph.ops[slice(*step.ops)]

    # --- what crosses boundaries -----------------------------------------------------------------------

    def _taken(self, notes: Notes) -> Iterator[tuple[int, Boundary]]:
        """Yield the tensors that change where they are taken."""
        for placed in notes.boundaries:
            if placed.place == "input":
                yield dict(self._graph.calls[placed.call].inputs)[placed.position], placed.boundary
        for _, first, plan in notes.changed_functions():
            arguments = dict(self._functions[first].inputs)
            yield from ((arguments[position], boundary) for position, boundary in plan.inputs)

    def _returned(self, notes: Notes) -> Iterator[tuple[int, Boundary]]:
        """Yield the tensors that change where they are returned."""
        for placed in notes.boundaries:
            if placed.place == "output":
                call = self._graph.calls[placed.call]
                yield call.outputs[0] if call.core_output is None else call.core_output, placed.boundary
        for _, first, plan in notes.changed_functions():
            if plan.output is not None:
                yield from ((tensor, plan.output) for tensor in self._functions[first].outputs)

    def _copied_on_the_way_back(self, notes: Notes) -> Iterator[tuple[int, Shape]]:
        """Yield the tensors of which the gradient is made anew at a boundary, and its strides from there on."""
        for tensor, boundary in (*self._taken(notes), *self._returned(notes)):
            if boundary.has_gradient and boundary.backward.source != boundary.backward.target:
                inside = boundary.forward.source
                outside = WHOLE if isinstance(inside, Partial) else inside
                yield tensor, _in_order(local_shape(boundary.shape, outside, self._known.parts))

    def _summed(self, notes: Notes) -> Iterator[int]:
        """Yield what functions make that is summed over the ranks."""
        for _, first, plan in notes.changed_functions():
            if plan.output is not None and _is_summed(plan.output.forward):
                yield from self._functions[first].outputs

    def _returned_at(self, notes: Notes) -> Iterator[tuple[_Cut, Crossed]]:
        """Yield what is taken, and as what, of which the gradient is sent to the ranks, and where it crosses."""
        for tensor, boundary in self._taken(notes):
            if boundary.has_gradient and boundary.backward.collective:
                yield (tensor, boundary.forward.target), (tensor, boundary.forward, boundary.backward)

    def _of_sums(self, notes: Notes) -> OpWork:
        """Return the work of copying what functions make to be summed, where it is not in the order of its dims."""
        made = (self._graph.tensors[tensor] for tensor in self._summed(notes))
        copied = (each for each in made if not self._meter.is_contiguous(each, WHOLE))
        return sum((OpWork((), 2 * math.prod(each.shape) * each.itemsize, 1) for each in copied), NO_WORK)

    # --- ops together ----------------------------------------------------------------------------------

    def _of_layer(self, step: Step, notes: Notes, copied: Strides) -> Computation:
        """Return a layer's ops one after the other; what is cut for them is a tensor of its own."""
        ops, names = _name_what_is_cut(self._ops(step), notes)
        besides = self._added(step.makes) + self._added_of_cut(step, ops, names)
        return Computation((self._together(step, notes, ops, names),), besides, copied)

    def _added_of_cut(self, step: Step, ops: Sequence[Op], names: Mapping[_Cut, int]) -> OpWork:
        """Return the work of adding up the gradients of tensors that are cut, where they are read in other ways, too.

        Of what the ops make, the gradient of one shard is measured, as one that comes from elsewhere.
        """
        read = {tensor for op in ops if self._gradients.returns_gradients(op) for tensor in op.inputs}
        made = {tensor for op in ops for tensor in op.outputs}
        reads = Counter(tensor for (tensor, _), own in names.items() if own in read)
        reads += Counter(tensor for tensor in reads if tensor in (step.makes if tensor in made else read))
        found = (self._gradients.added_of_cut(self._graph.tensors[each], times) for each, times in reads.items())
        return sum(found, NO_WORK)

    def _together(self, step: Step, notes: Notes, ops: Sequence[Op], names: Mapping[_Cut, int]) -> _Together:
        tensors = self._graph.tensors
        cut = self._infos_of_cut(names)
        placed = self._read(step) | {own: shard for (_, shard), own in names.items()}
        made = {tensor for op in ops for tensor in op.outputs}
        return _Together(
            ops=tuple(self._without_copies(ops, placed, {**tensors, **cut} if cut else tensors)),
            cut=cut,
            placed=placed,
            made=tuple(dict.fromkeys((*step.makes, *(tensor for tensor, _ in names if tensor in made)))),
            arguments={op.id: notes.followed[op.id].arguments for op in ops if op.id in notes.followed},
            sent=frozenset(self._summed(notes)),
            returned={names.get(cut, cut[0]): crossed for cut, crossed in self._returned_at(notes)},
            gathered=frozenset(self._gathered(placed)),
        )

    def _gathered(self, placed: Mapping[int, Placement]) -> Iterator[int]:
        """Yield the variables that are read in another way than they are stored."""
        for tensor, placement in placed.items():
            key = self._graph.tensors[tensor].variable if tensor >= 0 else None
            if key is not None and self._known.stored[key] != placement:
                yield tensor

    def _infos_of_cut(self, names: Mapping[_Cut, int]) -> Tensors:
        """Return what is known of tensors that are cut: as shards they are copied in the order of their dims."""
        infos = {own: self._graph.tensors[tensor] for (tensor, _), own in names.items()}
        return {own: replace(info, id=own, stride=_in_order(info.shape)) for own, info in infos.items()}

    def _without_copies(self, ops: Sequence[Op], placed: Mapping[int, Placement], tensors: Tensors) -> Iterator[Op]:
        """Yield the ops but for copies that shards do not need; what reads these reads what they were made of."""
        made_of: dict[int, int] = {}
        for op in ops:
            inputs = tuple(made_of.get(each, each) for each in op.inputs)
            if self._is_left_out(op, placed, tensors):
                made_of[op.outputs[0]] = inputs[0]
            else:
                yield op if inputs == op.inputs else replace(op, inputs=inputs)

    def _read(self, step: Step) -> dict[int, Placement]:
        """Return how ops have what they take and make: a sum over the ranks is of the size of the whole."""
        called = {tensor: op.call for op in self._ops(step) for tensor in (*op.inputs, *op.outputs)}
        placed = ((tensor, self._known.placement(tensor, call)) for tensor, call in called.items())
        return {tensor: WHOLE if isinstance(placement, Partial) else placement for tensor, placement in placed}

    def _added(self, made: Iterable[int]) -> OpWork:
        """Return the work of adding up the gradients of tensors that are made."""
        placed = ((self._graph.tensors[tensor], self._known.placements.get(tensor, WHOLE)) for tensor in made)
        return sum((self._gradients.added(each, placement) for each, placement in placed), NO_WORK)

    def _is_left_out(self, op: Op, placed: Mapping[int, Placement], tensors: Tensors) -> bool:
        """Whether an op is a copy for an order in memory that shards have: with one head left, say.

        Or one that autograd makes of what the next op writes into: it is made, and measured, with that op.
        """
        following = self._graph.ops[op.id + 1 : op.id + 2]
        if op.name == _COPY and op.outputs[0] not in self._read_by_ops:
            written = self._graph.ops[op.id].inputs
            return any(is_in_place(each.name) and each.inputs[:1] == written for each in following)
        if not is_copy_in_order(op):
            return False
        taken = op.inputs[0]
        if (placement := placed.get(taken, WHOLE)) == WHOLE:
            return False
        reshaped = [each.outputs[0] for each in following if each.name == _RESHAPED and each.inputs == op.outputs]
        if not reshaped:
            return self._meter.is_contiguous(tensors[taken], placement)
        whole = self._graph.tensors[reshaped[0]].shape
        local = local_shape(whole, placed.get(reshaped[0], WHOLE), self._known.parts)
        return self._meter.is_view(tensors[taken], placement, local)

    # --- ops alone -------------------------------------------------------------------------------------

    def _followed(self, op: Op, notes: Notes) -> _Alone:
        placed = [notes.cut_for.get((op.id, tensor), self._known.placement(tensor, op.call)) for tensor in op.inputs]
        (reading,), names = _name_what_is_cut((op,), notes)
        return self._alone(reading, placed, notes.followed.get(op.id), self._infos_of_cut(names))

    def _alone(
        self, op: Op, placed: Sequence[Placement], followed: Followed | None, cut: Tensors = _NOTHING_CUT
    ) -> _Alone:
        whole = tuple(WHOLE if isinstance(placement, Partial) else placement for placement in placed)
        arguments = None if followed is None else followed.arguments
        return _Alone(op, cut, whole, arguments, self._writes_into_view(op), self._kept(op, whole))

    def _writes_into_view(self, op: Op) -> bool:
        return is_in_place(op.name) and op.inputs[0] in self._views

    def _kept(self, op: Op, placed: Sequence[Placement]) -> frozenset[int]:
        """Return the variables of which an op alone leaves the gradient, and reads as they are stored."""
        read = (
            (self._graph.tensors[tensor], placement)
            for tensor, placement in zip(op.inputs, placed, strict=True)
            if tensor >= 0
        )
        stored = (each.id for each, used in read if each.variable and self._known.stored[each.variable] == used)
        return frozenset(tensor for tensor in stored if self._gradients.is_of_one(tensor))

    # --- contractions ----------------------------------------------------------------------------------

    def _is_whole_contraction(self, step: Step, taken: Mapping[int, Placement]) -> bool:
        """Whether a step is a contraction that takes nothing but whole tensors."""
        if step.layer_call is None or contraction_of(step.layer_call, self._graph) is None:
            return False
        read = (self._known.placement(tensor, op.call) for op in self._ops(step) for tensor in op.inputs)
        return all(placement == WHOLE for placement in (*taken.values(), *read))

    def _of_contraction(self, step: Step, choice: StyleChoice | None, copied: Strides) -> Computation:
        """Return a contraction's ops, its input and weights placed as the style takes them.

        A sum over the ranks is of the size of the whole, and whole for the ops that follow.
        """
        tensors = self._graph.tensors
        placed: dict[int, Placement] = {}
        uses: dict[str, Placement] = {}
        if choice is not None:
            assert step.layer_call is not None
            uses = {key: use.placement for key, use in weight_uses(choice).items()}
            tensor = step.layer_call.inputs[0][1]
            placed[tensor] = input_placement(choice, len(tensors[tensor].shape))
        arguments: dict[int, Sequence[Any]] = {}
        for op in self._ops(step):
            for each in op.inputs:
                if (key := tensors[each].variable) is not None:
                    placed[each] = uses.get(key, WHOLE)
            inputs = {each: placed.setdefault(each, WHOLE) for each in op.inputs}
            if any(placement != WHOLE for placement in inputs.values()):
                answer = self._rules.follow(op, tensors, inputs)
                followed = answer if isinstance(answer, Followed) else None
                outputs = followed.outputs if followed else (WHOLE,) * len(op.outputs)
                if followed is not None:
                    arguments[op.id] = followed.arguments
                for each, made in zip(op.outputs, outputs, strict=True):
                    placed[each] = WHOLE if isinstance(made, Partial) else made
        needed = tuple(self._without_copies(self._ops(step), placed, tensors))
        besides = self._added(step.makes)
        if choice is not None and choice.style == "vocabulary":
            besides += self._of_own_rows(step, choice)
        return Computation((_Together(needed, {}, placed, step.makes, arguments),), besides, copied)

    def _of_own_rows(self, step: Step, choice: StyleChoice) -> OpWork:
        """Return the work of finding the ids of a rank's own rows, and of zeros for those of others."""
        call = step.layer_call
        assert call is not None and choice.contraction is not None
        made = call.outputs[0] if call.core_output is None else call.core_output
        rows = self._graph.variables[choice.contraction.main_weight].shape[0]
        return self._meter.of_own_rows(self._graph.tensors[call.inputs[0][1]], self._graph.tensors[made], rows)


def _name_what_is_cut(ops: Sequence[Op], notes: Notes) -> tuple[list[Op], dict[_Cut, int]]:
    """Return ops that read what is cut for them under a number of its own, and that by tensor and shard."""
    if not notes.cut_for:
        return list(ops), {}
    reading: list[Op] = []
    cut: dict[_Cut, int] = {}
    for op in ops:
        read = ((tensor, notes.cut_for.get((op.id, tensor))) for tensor in op.inputs)
        inputs = (
            cut.setdefault((tensor, shard), -len(cut) - 1) if isinstance(shard, Shard) else tensor
            for tensor, shard in read
        )
        reading.append(replace(op, inputs=tuple(inputs)))
    return reading, cut


def _in_order(shape: Shape) -> Shape:
    """Return the strides of a tensor that is in the order of its dims."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _is_summed(change: Transition) -> bool:
    return change.collective == "all_reduce"
