"""Formulate: the search for a layout as an integer program.

A column of 0 or 1 for each placement of each slot and for each way of each step. Ways agree on the slots between them;
boundaries that several steps need are paid once. Every plan of a layout in the search space is a solution, so what the
solver proves of the program's cost holds for all of them, as far as the program's prices are those of the plans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from tp_planner.dryrun.op_work import OpWork
from tp_planner.ir.graph import FunctionCall, ModelGraph, VariableInfo
from tp_planner.ir.placement import WHOLE, Placement
from tp_planner.ir.plan import Boundary
from tp_planner.passes.shard_into_loss import gathers_last_dim, only_output
from tp_planner.search.computing import Computed
from tp_planner.search.gradients import Gradients
from tp_planner.search.prices import Prices
from tp_planner.search.program import IntegerProgram, Solution
from tp_planner.search.steps import Again, Step, steps_of
from tp_planner.search.ways import Crossing, Slot, Walker, Way
from tp_planner.search.works import works_of

Stored = Mapping[str, Placement]  # by variable key


@dataclass(frozen=True, slots=True)
class Group:
    """Variables that are stored alike: those of equal blocks, and those of one path. The first stands for all."""

    variables: tuple[VariableInfo, ...]
    options: tuple[Placement, ...]

    @property
    def key(self) -> str:
        return self.variables[0].key


@dataclass
class Formulation:
    """The program of one graph, and which columns stand for what."""

    graph: ModelGraph
    groups: Sequence[Group]
    prices: Prices
    loss_in_shards: Callable[[Boundary], float] | None = None  # what it costs more than of whole logits, if it can be
    program: IntegerProgram = field(default_factory=IntegerProgram)
    states: dict[Slot, dict[Placement, int]] = field(default_factory=dict)
    constant: float = 0.0  # what a step costs whatever the layout
    ways: list[tuple[Step, dict[int, Way]]] = field(default_factory=list)  # by column

    def __post_init__(self) -> None:
        self._standing = {each.key: group.key for group in self.groups for each in group.variables}
        self._tensors = {each.variable: each for each in self.graph.tensors.values() if each.variable is not None}
        options = {each.key: len(group.options) for group in self.groups for each in group.variables}
        self._steps = steps_of(self.graph, {key: options[key] for key in self.graph.variables})
        self.gradients = Gradients(self.graph, self.prices.base.axis_size, self._steps)
        self._head = only_output(self.graph) if self.loss_in_shards else ""
        for group in self.groups:
            columns = {}
            for option in group.options:
                cost = sum(self.prices.of_storing(each, option) for each in group.variables)
                cost += len(group.variables) * self._of_gradients(group.key, option)
                columns[option] = self.program.column(cost, integral=True)
            self.states[Slot("stored", group.key)] = columns
            self.program.equal(dict.fromkeys(columns.values(), 1.0), 1.0)

    def _of_gradients(self, key: str, option: Placement) -> float:
        """Return the time of adding up a variable's gradients, where several ops read it."""
        tensor = self._tensors.get(key)
        return 0.0 if tensor is None else self.prices.of_work(self.gradients.added(tensor, option))

    # --- building --------------------------------------------------------------------------------------

    def add_steps(self, walker: Walker) -> None:
        """Ask for the ways of each step, in order, and add them to the program."""
        tensors: dict[int, tuple[Placement, ...]] = {}
        found: list[tuple[Step, list[Way]]] = []
        for step in self._steps:
            if isinstance(step, Again):
                self._tie_block(step, tensors)
                continue
            ways = list(walker.ways(step, tensors))
            found.append((step, ways))
            for number, tensor in enumerate(step.makes):
                states = tuple(dict.fromkeys(way.made[number][1] for way in ways))
                if states != (WHOLE,):
                    tensors[tensor] = states
                    self._add_slot(Slot("tensor", tensor), states)
        self._add_used_slots(found)
        works = works_of(found, self.graph, walker.meter)
        copying = [(step, _with_copies(ways, each)) for (step, ways), each in zip(found, works, strict=True)]
        self._add_ways(copying, works)
        for tensor in self.graph.outputs:
            if (columns := self.states.get(Slot("tensor", tensor))) is not None:
                self._whole(columns)

    def _whole(self, columns: Mapping[Placement, int]) -> None:
        self.program.equal({column: 1.0 for state, column in columns.items() if state != WHOLE}, 0.0)

    def _add_slot(self, slot: Slot, states: Iterable[Placement]) -> None:
        self.states[slot] = {state: self.program.column() for state in states}
        self.program.equal(dict.fromkeys(self.states[slot].values(), 1.0), 1.0)

    def _add_used_slots(self, found: Sequence[tuple[Step, Sequence[Way]]]) -> None:
        """Add slots for variables that several steps use in one layer's code: they use them alike."""
        uses: dict[Slot, list[Placement]] = {}
        steps: dict[Slot, int] = {}
        for _, ways in found:
            for slot in {slot for way in ways for slot, _ in way.given if slot.kind == "used"}:
                steps[slot] = steps.get(slot, 0) + 1
                uses.setdefault(slot, [])
                uses[slot] += [state for way in ways for each, state in way.given if each == slot]
        for slot, states in sorted(uses.items(), key=lambda each: str(each[0])):
            if steps[slot] > 1:
                self._add_slot(slot, dict.fromkeys(states))

    def _add_ways(self, found: Sequence[tuple[Step, Sequence[Way]]], works: Sequence[Sequence[Computed]]) -> None:
        shared = self._shared_crossings(found)
        plans: dict[object, list[dict[str, list[int]]]] = {}
        for (step, ways), computed in zip(found, works, strict=True):
            columns = [self._add_way(step, way, each.work, shared) for way, each in zip(ways, computed, strict=True)]
            self.ways.append((step, dict(zip(columns, ways, strict=True))))
            self.constant -= self.program.costs[columns[0]]  # the first is the way of whole tensors
            self.program.equal(dict.fromkeys(columns, 1.0), 1.0)
            self._bind_slots(ways, columns)
            self._need_shared(ways, columns, shared)
            by_plan: dict[str, list[int]] = {}
            for way, column in zip(ways, columns, strict=True):
                by_plan.setdefault(way.plan, []).append(column)
            plans.setdefault(self._planned_as(step), []).append(by_plan)
        self._tie_calls(plans.values())
        self._leave_plain_what_not_all_calls_run()
        for group in self.groups:
            self.constant -= self.program.costs[self.states[Slot("stored", group.key)][WHOLE]]

    def _shared_crossings(self, found: Sequence[tuple[Step, Sequence[Way]]]) -> dict[object, int]:
        """Return a column for each boundary that several steps can need: it is paid once."""
        needed: dict[object, tuple[Crossing, set[int]]] = {}
        for number, (_, ways) in enumerate(found):
            for crossing in (each for way in ways for each in (*way.crossings, *way.copies)):
                needed.setdefault(crossing.where, (crossing, set()))[1].add(number)
        return {
            where: self.program.column(self.prices.of_crossing(crossing))
            for where, (crossing, steps) in needed.items()
            if len(steps) > 1
        }

    def _add_way(self, step: Step, way: Way, work: OpWork, shared: Mapping[object, int]) -> int:
        own = {each.where: each for each in (*way.crossings, *way.copies) if each.where not in shared}
        cost = step.times * self.prices.of_work(work) + sum(self._of_crossing(step, each) for each in own.values())
        return self.program.column(cost, integral=True)

    def _of_crossing(self, step: Step, crossing: Crossing) -> float:
        """Return the time of a boundary; where a head would gather logits, that of a loss which reads shards."""
        call, boundary = step.layer_call, crossing.boundary
        if (
            crossing.is_copy
            or call is None
            or self.loss_in_shards is None
            or not self._head
            or boundary.tensor != self._head
        ):
            return self.prices.of_crossing(crossing)
        calls = sum((each.layer, each.mode) == (call.layer, call.mode) for each in self.graph.calls.values())
        if calls > 1 or not set(call.outputs) & set(self.graph.outputs) or not gathers_last_dim(boundary):
            return self.prices.of_crossing(crossing)
        return self.loss_in_shards(boundary)

    def _need_shared(self, ways: Sequence[Way], columns: Sequence[int], shared: Mapping[object, int]) -> None:
        needing: dict[int, dict[int, float]] = {}
        for way, column in zip(ways, columns, strict=True):
            for crossing in (*way.crossings, *way.copies):
                if crossing.where in shared:
                    needing.setdefault(shared[crossing.where], {})[column] = 1.0
        for crossed, entries in needing.items():
            self.program.row({**entries, crossed: -1.0}, -1.0, 0.0)

    def _bind_slots(self, ways: Sequence[Way], columns: Sequence[int]) -> None:
        bound: dict[tuple[Slot, Placement], dict[int, float]] = {}
        slots: dict[Slot, None] = {}
        for way, column in zip(ways, columns, strict=True):
            for slot, state in (*way.given, *way.made):
                key = Slot("stored", self._standing[str(slot.name)]) if slot.kind == "stored" else slot
                if key in self.states:
                    slots[key] = None
                    bound.setdefault((key, state), {})[column] = 1.0
        for slot in slots:
            for state, column in self.states[slot].items():
                self.program.equal({**bound.get((slot, state), {}), column: -1.0}, 0.0)

    def _planned_as(self, step: Step) -> object:
        call = self.graph.calls[step.call]
        if step.layer_call is not None:
            return call.layer, call.mode
        piece = step.pieces[0]
        return call.layer, call.mode, piece.name, piece.number if isinstance(piece, FunctionCall) else piece.id

    def _tie_calls(self, plans: Iterable[Sequence[Mapping[str, Sequence[int]]]]) -> None:
        """Let a layer that is called several times have one plan."""
        for calls in plans:
            first = calls[0]
            for other in calls[1:]:
                for plan in sorted(first.keys() | other.keys()):
                    here = dict.fromkeys(first.get(plan, ()), 1.0)
                    there = dict.fromkeys(other.get(plan, ()), -1.0)
                    self.program.equal({**here, **there}, 0.0)

    def _leave_plain_what_not_all_calls_run(self) -> None:
        """Let nothing change at functions that some calls of a layer run, and others do not: they have one plan."""
        for _, ways in self._run_by_some_calls():
            self.program.equal({column: 1.0 for column, way in ways.items() if not way.is_plain}, 0.0)

    def leave_sizes(self, layers: Set[str]) -> None:
        """Let these layers take no shards where code writes sizes that not all their calls run."""
        for layer, ways in self._run_by_some_calls():
            if layer in layers:
                self.program.equal({column: 1.0 for column, way in ways.items() if way.writes_sizes}, 0.0)

    def _run_by_some_calls(self) -> Iterator[tuple[str, Mapping[int, Way]]]:
        """Yield the layers and ways, by column, of functions that not all calls of the layer run."""
        every = (call for call in self.graph.calls.values() if call.id not in self.graph.repeats)
        calls = Counter((call.layer, call.mode) for call in every)
        in_code = [each for each in self.ways if isinstance(each[0].pieces[0], FunctionCall) and not each[0].layer_call]
        running: dict[object, set[int]] = {}
        for step, _ in in_code:
            running.setdefault(self._planned_as(step), set()).add(step.call)
        for step, ways in in_code:
            call = self.graph.calls[step.call]
            if len(running[self._planned_as(step)]) < calls[call.layer, call.mode]:
                yield call.layer, ways

    def _tie_block(self, step: Again, tensors: dict[int, tuple[Placement, ...]]) -> None:
        """Let a block take what the one that it is like takes, and make what that makes."""
        for twin, own in step.repeat.inputs:
            if self.graph.tensors[own].variable is None and twin != own:
                here = self.states.get(Slot("tensor", twin), {})
                there = self.states.get(Slot("tensor", own), {})
                for state in dict.fromkeys((*here, *there)):
                    if state != WHOLE:
                        entries = {here[state]: 1.0} if state in here else {}
                        entries |= {there[state]: -1.0} if state in there else {}
                        self.program.equal(entries, 0.0)
        for twin, own in step.repeat.outputs:
            if (columns := self.states.get(Slot("tensor", twin))) is not None:
                tensors[own] = tensors[twin]
                self.states[Slot("tensor", own)] = columns

    # --- asking ----------------------------------------------------------------------------------------

    def limit_memory(self, most: float) -> None:
        """Let the variables, their gradients and the optimizer's slots take no more than ``most`` bytes."""
        self.program.row({column: bytes / 1e6 for column, bytes in self._memory().items()}, 0.0, most / 1e6)

    def of_least_memory(self) -> Stored | None:
        """Return how variables are stored where they, their gradients and slots take the least; None if forbidden."""
        solution = self.program.solve(self._memory())
        return None if solution is None else self.stored(solution)

    def _memory(self) -> dict[int, float]:
        """Return the bytes that are held for good, by the columns of what is stored."""
        return {
            column: sum(self.prices.memory_of_storing(each, option) for each in group.variables)
            for group in self.groups
            for option, column in self.states[Slot("stored", group.key)].items()
        }

    def forbid(self, stored: Stored) -> None:
        """Let the solution not store all matrices so; with other vectors it would be much the same."""
        matrices = [group for group in self.groups if len(group.variables[0].shape) > 1] or self.groups
        self.forbid_together(self.states[Slot("stored", group.key)][stored[group.key]] for group in matrices)

    def forbid_where_stored_so(self, stored: Stored, column: int) -> None:
        """Let the solution not end a region at the layer of this way, if it stores all variables so."""
        columns = {self.states[Slot("stored", group.key)][stored[group.key]] for group in self.groups}
        ways = next(ways for _, ways in self.ways if column in ways)
        ending = (each for each, way in ways.items() if way.gathers_output)
        self.program.row(dict.fromkeys((*columns, *ending), 1.0), 0.0, len(columns))

    def forbid_region(self, columns: Set[int], however_stored: bool = False) -> None:
        """Let the solution not take all of these ways, nor such as differ by vectors alone.

        How vectors are stored ends no region: they are gathered where they are in its way. That of matrices which are
        gathered may; if ``however_stored`` ways that differ by it alone are forbidden, too.
        """
        kinds = ("tensor", "used") if however_stored else ("tensor", "used", "stored")
        entries: dict[int, float] = {}
        for _, ways in self.ways:
            for taken in columns & ways.keys():
                same = self._shards_of(ways[taken], kinds)
                entries |= {column: 1.0 for column, way in ways.items() if self._shards_of(way, kinds) == same}
        self.program.row(entries, 0.0, len(columns) - 1.0)

    def _shards_of(self, way: Way, kinds: Sequence[str]) -> frozenset[tuple[Slot, Placement]]:
        """Return how a way has tensors and matrices."""
        slots = (each for each in (*way.given, *way.made) if each[0].kind in kinds)
        return frozenset(each for each in slots if not self._is_vector(each[0]))

    def _is_vector(self, slot: Slot) -> bool:
        if isinstance(slot.name, int):
            return False
        key = slot.name if isinstance(slot.name, str) else slot.name[1]
        return len(self.graph.variables[key].shape) < 2

    def chosen(self, solution: Solution) -> dict[int, tuple[Step, Way]]:
        """Return the ways that a solution takes, by column."""
        return {column: (step, way) for step, ways in self.ways for column, way in ways.items() if solution.has(column)}

    def forbid_together(self, columns: Iterable[int]) -> None:
        """Let the solution not take all of these ways."""
        entries = dict.fromkeys(columns, 1.0)
        self.program.row(entries, 0.0, len(entries) - 1.0)

    def stored(self, solution: Solution) -> dict[str, Placement]:
        """Return how a solution stores each variable."""
        stored: dict[str, Placement] = dict.fromkeys(self.graph.variables, WHOLE)
        for group in self.groups:
            columns = self.states[Slot("stored", group.key)]
            chosen = next(option for option, column in columns.items() if solution.has(column))
            stored.update((each.key, chosen) for each in group.variables)
        return stored


def _with_copies(ways: Sequence[Way], computed: Sequence[Computed]) -> list[Way]:
    return [way.copying(each.copied) for way, each in zip(ways, computed, strict=True)]
