"""Notes: what the walk writes down on its way, in the order in which it meets it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tp_planner.ir.graph import FunctionCall, Op
from tp_planner.ir.placement import WHOLE, Partial, Placement, SequenceShard
from tp_planner.ir.plan import FunctionPlan
from tp_planner.passes.follow_ops import Followed
from tp_planner.passes.walk.crossings import Crossing, boundary_of_tensor, boundary_of_variable, used, used_on_stream
from tp_planner.passes.walk.facts import (
    CallRecord,
    Conflict,
    LayerMode,
    NumberedFunction,
    Origins,
    Placed,
    VariableRead,
    Walk,
)
from tp_planner.passes.walk.known import Known

Read = tuple[int, int]  # call, tensor


@dataclass
class Meeting:
    """A whole tensor that ops of one call read together with shards.

    ``at`` are the functions that take it as an argument, in order; None among them stands for any other op.
    """

    origins: Origins = frozenset()
    at: dict[FunctionCall | None, None] = field(default_factory=dict)


@dataclass
class Notes:
    """The boundaries, records, reads and conflicts found so far; ``known`` is what they are about."""

    known: Known
    conflicts: list[Conflict] = field(default_factory=list)
    boundaries: list[Placed] = field(default_factory=list)
    records: dict[int, CallRecord] = field(default_factory=dict)
    followed: dict[int, Followed] = field(default_factory=dict)
    cut_for: dict[tuple[int, int], Placement] = field(default_factory=dict)
    taken: dict[tuple[int, int], Placement] = field(default_factory=dict)
    function_origins: dict[int, Origins] = field(default_factory=dict)
    writes_sizes: dict[LayerMode, set[NumberedFunction]] = field(default_factory=dict)
    reads: dict[VariableRead, Placement] = field(default_factory=dict)
    skipped_ops: set[int] = field(default_factory=set)
    blocks_differ: bool = False
    regions_cross_blocks: bool = False
    input_gradients: bool = True
    meetings: dict[Read, Meeting] = field(default_factory=dict)
    read_whole: dict[Read, None] = field(default_factory=dict)  # by ops that read no shards
    _used: set[tuple[int, str]] = field(default_factory=set)  # (call, variable) whose boundary stands
    _functions: dict[int, dict[int, FunctionPlan]] = field(default_factory=dict)  # by call, then by first op

    def conflict(self, call: int, origins: Origins, reason: str, in_code: bool = False) -> None:
        self.conflicts.append(Conflict(self.known.graph.calls[call].layer, origins, reason, in_code))

    def record(self, record: CallRecord) -> None:
        self.records[record.call] = record

    # --- reads -----------------------------------------------------------------------------------------

    def reads_whole(self, call: int, tensors: Iterable[int]) -> None:
        """An op reads these, and no shards."""
        self.read_whole.update(((call, tensor), None) for tensor in tensors)

    def meets_shards(self, call: int, tensor: int, origins: Origins, function: FunctionCall | None) -> None:
        """A whole tensor is read together with shards: in the arguments of ``function``, or by another op."""
        meeting = self.meetings.setdefault((call, tensor), Meeting())
        meeting.origins |= origins
        meeting.at[function] = None

    def reads_as(self, op: Op, tensor: int, placement: Placement) -> None:
        """An op reads a tensor, or makes it, as something else than it is placed as."""
        self.cut_for[op.id, tensor] = placement

    # --- boundaries ------------------------------------------------------------------------------------

    def cross(
        self, call: int, place: Literal["input", "output"], position: int, tensor: int, crossing: Crossing
    ) -> None:
        """A tensor changes at an end of a layer's call."""
        boundary = boundary_of_tensor(self.known.graph, tensor, crossing)
        self.boundaries.append(Placed(call, place, position, None, boundary))

    def use(self, call: int, variable: str, use: Placement, gradient: Placement) -> None:
        """A layer reads a variable: from its stored placement to ``use``, its gradient back."""
        stored = self.known.stored[variable]
        if stored == use == WHOLE and not isinstance(gradient, Partial):
            return
        self._use(call, variable, used(stored, use, gradient))

    def use_shard_of_stream(self, call: int, variable: str, use: SequenceShard) -> None:
        """A layer reads a whole variable as a shard of the residual stream."""
        self._use(call, variable, used_on_stream(use))

    def _use(self, call: int, variable: str, crossing: Crossing) -> None:
        if (call, variable) not in self._used:
            self._used.add((call, variable))
            boundary = boundary_of_variable(self.known.graph.variables[variable], crossing)
            self.boundaries.append(Placed(call, "variable", 0, variable, boundary))

    # --- functions -------------------------------------------------------------------------------------

    def cross_into(self, function: FunctionCall, position: int, tensor: int, crossing: Crossing) -> None:
        """A tensor changes before a torch function takes it."""
        entry = (position, boundary_of_tensor(self.known.graph, tensor, crossing))
        inputs = sorted((*self._plan_of(function).inputs, entry), key=lambda each: each[0])
        self._change(function, inputs=tuple(inputs))

    def cross_out_of(self, function: FunctionCall, tensor: int, crossing: Crossing) -> None:
        """What a torch function returns changes."""
        self._change(function, output=boundary_of_tensor(self.known.graph, tensor, crossing))

    def resize(self, function: FunctionCall, sizes: tuple[tuple[int, int, int], ...]) -> None:
        """A torch function is given sizes of shards."""
        self._change(function, sizes=sizes)

    def scale(self, function: FunctionCall, positions: tuple[int, ...]) -> None:
        """A torch function is given sizes of the whole stream where its caller has read those of shards."""
        self._change(function, scales=positions)

    @property
    def functions(self) -> dict[int, tuple[FunctionPlan, ...]]:
        """The functions at which something changes, in order, by call."""
        return {call: tuple(plans[first] for first in sorted(plans)) for call, plans in self._functions.items()}

    def changed_functions(self) -> Iterator[tuple[int, int, FunctionPlan]]:
        """Yield each function at which something changes: its call, its first op, and its plan."""
        for call, plans in self._functions.items():
            yield from ((call, first, plan) for first, plan in plans.items())

    def _plan_of(self, function: FunctionCall) -> FunctionPlan:
        plans = self._functions.get(function.call, {})
        return plans.get(function.ops[0], FunctionPlan(function.name, function.number))

    def _change(self, function: FunctionCall, **changes: Any) -> None:
        plan = replace(self._plan_of(function), **changes)
        self._functions.setdefault(function.call, {})[function.ops[0]] = plan

    # --- the end ---------------------------------------------------------------------------------------

    def walk(self) -> Walk:
        """Return what is written down."""
        return Walk(
            placements=self.known.placements,
            origins=self.known.origins,
            conflicts=tuple(self.conflicts),
            boundaries=tuple(self.boundaries),
            records=self.records,
            functions=self.functions,
            function_origins=self.function_origins,
            followed=self.followed,
            cut_for=self.cut_for,
            taken=self.taken,
            reads=self.reads,
            writes_sizes={key: frozenset(functions) for key, functions in self.writes_sizes.items()},
            skipped_ops=frozenset(self.skipped_ops),
            blocks_differ=self.blocks_differ,
            regions_cross_blocks=self.regions_cross_blocks,
            input_gradients=self.input_gradients,
        )
