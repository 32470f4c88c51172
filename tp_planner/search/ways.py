"""Ways: how the planner's own walk can take a step, for everything that its inputs and variables can be.

Each question is put to the code that plans: the walk's steps, its boundaries, and DTensor's rules behind it, which
remember their answers. So the search knows of no layer and no op; what it sees is what planning will do.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from tp_planner.dryrun.op_work import OpMeter
from tp_planner.dryrun.sharding_rules import DTensorRules
from tp_planner.ir.graph import FunctionCall, ModelGraph
from tp_planner.ir.placement import WHOLE, Placement, in_parts, without_parts
from tp_planner.ir.plan import Boundary, Transition
from tp_planner.passes.choose_styles import StyleChoice, choose_styles, output_dim
from tp_planner.passes.walk.code import follow_op, follow_torch_function
from tp_planner.passes.walk.entering import Sources, enter_tensors_read_with_shards
from tp_planner.passes.walk.facts import Closings, LayerMode, Origins, VariableRead, changes_of
from tp_planner.passes.walk.known import Known
from tp_planner.passes.walk.layers import follow_contraction, follow_dropout
from tp_planner.passes.walk.notes import Notes
from tp_planner.passes.walk.packing import stored_in_parts, weights_in_parts
from tp_planner.search.computing import Computation, Computing, Crossed
from tp_planner.search.gradients import Gradients
from tp_planner.search.steps import Step, Times

MOST_COMBINATIONS = 20_000  # of what one step takes; beyond, what it takes is sharded alike or whole
_SOMEWHERE: Origins = frozenset({("layer", ("", ""))})


@dataclass(frozen=True, slots=True)
class Slot:
    """What has one placement in a layout: a ``tensor``, a variable as ``stored``, or as a layer's code uses it."""

    kind: str  # "tensor", "stored" or "used"
    name: int | str | VariableRead


@dataclass(frozen=True, slots=True)
class Crossing:
    """A boundary that is crossed; equal ones are crossed once. ``variable`` is the one that is read there, if any.

    It may stand for the copy of a gradient alone that is sent there, and is in another order than that of its dims.
    """

    where: Any
    boundary: Boundary
    times: int
    variable: str | None = None
    is_copy: bool = False

    @property
    def copying(self) -> Crossing:
        """The copy that is made there."""
        return replace(self, where=("copied", self.where), is_copy=True)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to take a step.

    ``given`` and ``made`` say how it has its slots, ``crossings`` which boundaries it needs, ``computed`` what a rank
    computes. ``plan`` is what the plan says of the step's layer: it is one for all calls of the layer. ``is_plain``
    says that this is nothing, ``writes_sizes`` that it would be but for sizes that the layer's code writes. ``copies``
    are those of gradients that are sent, once it is known how these come.
    """

    given: tuple[tuple[Slot, Placement], ...]
    made: tuple[tuple[Slot, Placement], ...]
    crossings: tuple[Crossing, ...]
    computed: Computation
    plan: Any
    is_plain: bool
    writes_sizes: bool
    copies: tuple[Crossing, ...] = ()

    def copying(self, copied: Set[Crossed]) -> Way:
        """Return the way with copies of the gradients that are sent at these boundaries."""
        return replace(self, copies=tuple(each.copying for each in self.crossings if each.where in copied))

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
        gradients: those of the graph.
    """

    def __init__(
        self,
        graph: ModelGraph,
        rules: DTensorRules,
        meter: OpMeter,
        parts: int,
        options: Mapping[str, Sequence[Placement]],
        packed: Mapping[tuple[str, Placement], tuple[int, ...]],
        gradients: Gradients,
    ) -> None:
        self.graph, self.rules, self.meter, self.parts, self.options = graph, rules, meter, parts, options
        self.packed = packed
        self._times, self._sources = Times(graph), Sources(graph)
        # What is asked about; the walk is given these same objects each time.
        self._stored: dict[str, Placement] = dict.fromkeys(graph.variables, WHOLE)
        self._styles: dict[LayerMode, StyleChoice] = {}
        self._closed: dict[LayerMode, str] = {}
        self._gathered: dict[VariableRead, str] = {}
        closings = Closings(layers=self._closed, reads=self._gathered)
        self._known = Known(graph, self._stored, self._styles, closings, rules, parts)
        self._calls = Counter(call.layer for call in graph.calls.values() if call.id not in graph.repeats)
        self._functions = {function.ops[0]: function for function in graph.functions or ()}
        self._computing = Computing(self._known, meter, rules, gradients)

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
            computed=self._computing.of(step, taken, notes),
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
        trains = any(self.graph.tensors[tensor].has_gradient for tensor in step.makes)
        for placed in notes.boundaries:
            where: Any = placed.call, placed.place, placed.variable
            times = self._times.of(placed.call)
            if placed.place == "input":
                tensor = dict(self.graph.calls[placed.call].inputs)[placed.position]
                where, times = tensor, self._times.of_crossing(placed.call, tensor)
            boundary = placed.boundary if trains else replace(placed.boundary, has_gradient=False)
            yield from self._crossing(where, boundary, times, placed.variable)
        for call, first, plan in notes.changed_functions():
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
