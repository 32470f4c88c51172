"""Find a layout: an integer program over all layouts of a space, and a plan of what it chooses.

The space: each variable is replicated, or sharded on a dim that divides by the size of the model axis; variables of
equal blocks alike, and vectors of one layer. How layers are computed follows, as in every plan. On top of what is
found, vocabularies are tried in unequal parts, the residual stream in shards of the sequence, and where nothing fits
the memory what replicas store in parts.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras

from tp_planner.dryrun.collector import without_collector
from tp_planner.dryrun.loss_work import measure_loss
from tp_planner.dryrun.op_work import OpMeter
from tp_planner.dryrun.sharding_rules import DTensorRules
from tp_planner.frontend.blocks import Signatures, find_blocks
from tp_planner.frontend.inputs import known_inputs
from tp_planner.frontend.kept_tensors import no_fakes_left
from tp_planner.frontend.layer_tree import naming_once
from tp_planner.frontend.quiet import quiet_torch
from tp_planner.frontend.trace import require_built
from tp_planner.frontend.traces import Traces
from tp_planner.frontend.training_loss import TrainingLoss
from tp_planner.ir.errors import PlanError
from tp_planner.ir.graph import ModelGraph, VariableInfo
from tp_planner.ir.hardware import Hardware
from tp_planner.ir.layout import Layout, LayoutRule, Zero
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.placement import WHOLE, Placement, Shape, Shard, divides
from tp_planner.ir.plan import Boundary
from tp_planner.job.process_group import planning_axes
from tp_planner.planner import make_plan
from tp_planner.progress import stage
from tp_planner.readable_plan import Plan
from tp_planner.search.formulate import Formulation, Group, Stored
from tp_planner.search.found import Candidate, Found, known_bound
from tp_planner.search.gradients import only_towards_losses
from tp_planner.search.packing import parts_of_matrices
from tp_planner.search.prices import Prices, seconds_of
from tp_planner.search.program import Solution
from tp_planner.search.refusals import is_called_in_ways_that_differ, needless_ends, refused_regions
from tp_planner.search.rules import axes_of, escaped, write_rules
from tp_planner.search.stream import as_sums
from tp_planner.search.unequal import unequal_parts
from tp_planner.search.ways import Walker

MOST_PLANS = 8  # layouts that are planned, at most
CLOSE = 0.01  # by how much more a plan may cost than the program says without others being tried
MOST_REFUSALS = 2  # of one region, before it is refused however variables are stored
MOST_ROUNDS = 24  # times that the program is solved, at most


def search(
    model: keras.Model,
    mesh: Mesh,
    hardware: Hardware,
    inputs: Any = None,
    optimizer: keras.optimizers.Optimizer | None = None,
    loss: TrainingLoss | None = None,
    memory: float | None = None,
) -> Found:
    """Return the cheapest layout of ``model`` on ``mesh``; the model is as before.

    Args:
        model: a built, plain model.
        mesh: the device mesh; variables are sharded over its model axis.
        hardware: what a step is estimated on.
        inputs: as for ``make_plan``.
        optimizer: as for ``make_plan``.
        loss: as for ``make_plan``.
        memory: bytes that a rank may hold at its peak.

    Raises:
        PlanError: if the model cannot be planned, or no layout that was planned fits the memory.
    """
    require_built(model)
    with naming_once(model), without_collector():
        traces = Traces(model, known_inputs(model, inputs)[0])
        make = _Planner(model, inputs, optimizer, loss, hardware, traces)
        base = make.whole(mesh)
        if base.plan.axis_size > 1:
            formulation = _formulate(model, traces, loss, Prices(base.plan, hardware))
            return _Search(make, base, formulation, memory).run()
    if memory is not None and base.plan.step.memory.peak.total > memory:
        raise PlanError(_too_large(base, (), memory))
    return Found(model.name, hardware.name, base, base.cost, base, ())


@dataclass(frozen=True)
class _Planner:
    model: keras.Model
    inputs: Any
    optimizer: keras.optimizers.Optimizer | None
    loss: TrainingLoss | None
    hardware: Hardware
    traces: Traces

    def candidate(self, layout: Layout, program_cost: float | None = None) -> Candidate:
        """Return a layout with its plan."""
        plan = make_plan(self.model, layout, self.inputs, self.optimizer, self.loss, self.traces)
        cost = seconds_of(plan, self.hardware)
        return Candidate(layout, plan, cost, cost if program_cost is None else program_cost)

    def whole(self, mesh: Mesh) -> Candidate:
        """Return the layout in which nothing is sharded: a rule says so of one variable, for files have rules."""
        variables = self.traces.surveyed[1].values()
        paths = Counter(each.path for each in variables)
        named = [each for each in variables if paths[each.path] == 1]
        rules = [LayoutRule(escaped(each.path), (None,) * len(each.shape)) for each in named]
        return self.candidate(Layout(mesh, tuple(sorted(rules, key=lambda rule: -len(rule.axes))[:1])))


def _formulate(model: keras.Model, traces: Traces, loss: TrainingLoss | None, prices: Prices) -> Formulation:
    with no_fakes_left(model):
        stage(f"tracing {model.name}")
        blocks = find_blocks(model, Signatures(model, signature=traces.signature))
        graph = only_towards_losses(traces.of(blocks, training=True))
        stage(f"asking how {model.name} can be computed")
        parts = prices.base.axis_size
        read = _read_by_ops(graph)
        groups = _groups(graph, parts, read)
        prices = replace(prices, unread=frozenset(graph.variables.keys() - read))
        options = {each.key: group.options for group in groups for each in group.variables}
        with planning_axes(prices.base.mesh) as axes, quiet_torch():

            def loss_in_shards(head: Boundary) -> float:
                assert loss is not None
                whole, shard = (prices.of_loss(measure_loss(loss, head, axes, each)) for each in (False, True))
                return shard - whole

            reads_shards = loss is not None and loss.reads_shards
            formulation = Formulation(graph, groups, prices, loss_in_shards if reads_shards else None)
            rules = DTensorRules(axes.model.mesh)
            packed = parts_of_matrices(graph, options, rules, parts)
            meter = OpMeter(rules, parts)
            formulation.add_steps(Walker(graph, rules, meter, parts, options, packed, formulation.gradients))
    formulation.constant += seconds_of(prices.base, prices.hardware)
    return formulation


def _read_by_ops(graph: ModelGraph) -> set[str]:
    """Return the variables that ops read, those of blocks that repeat others included."""
    again = {key for repeat in graph.repeats.values() for pair in repeat.variables for key in pair}
    return again | {tensor.variable for tensor in graph.tensors.values() if tensor.variable is not None}


def _groups(graph: ModelGraph, parts: int, read: set[str]) -> list[Group]:
    """Return the variables by what has to be stored alike, in order."""
    standing = {key: key for key in graph.variables}

    def root(key: str) -> str:
        while standing[key] != key:
            key = standing[key]
        return key

    pairs = [pair for repeat in graph.repeats.values() for pair in repeat.variables]
    pairs += _vectors_of_layers(graph)
    first: dict[str, str] = {}
    pairs += [(first.setdefault(each.path, key), key) for key, each in graph.variables.items()]
    order = {key: number for number, key in enumerate(graph.variables)}
    for one, other in pairs:
        ends = sorted((root(one), root(other)), key=order.__getitem__)
        standing[ends[1]] = ends[0]
    groups: dict[str, list[VariableInfo]] = {}
    for key, variable in graph.variables.items():
        groups.setdefault(root(key), []).append(variable)
    return [Group(tuple(members), _options(members, parts, read)) for members in groups.values()]


def _vectors_of_layers(graph: ModelGraph) -> list[tuple[str, str]]:
    """Return the pairs of equally long vectors of one layer, such as the scale and offset of a norm."""
    first: dict[tuple[str, Shape], str] = {}
    vectors = [(name, key) for name, layer in graph.layers.items() for key in layer.variables]
    shapes = {key: graph.variables[key].shape for _, key in vectors}
    return [(first.setdefault((name, shapes[key]), key), key) for name, key in vectors if len(shapes[key]) == 1]


def _options(members: Sequence[VariableInfo], parts: int, read: set[str]) -> tuple[Placement, ...]:
    ranks = {len(each.shape) for each in members}
    if len(ranks) > 1 or any(each.kept_whole or each.key not in read for each in members):
        return (WHOLE,)  # a rule is for variables of one rank
    shards = map(Shard, range(ranks.pop()))
    return (WHOLE, *(shard for shard in shards if all(divides(each.shape, shard, parts) for each in members)))


@dataclass
class _Search:
    """Solves, plans what it found, and goes on until nothing cheaper can be left."""

    planner: _Planner
    base: Candidate
    formulation: Formulation
    memory: float | None
    covers_all: bool = True  # whether nothing is forbidden that could be planned
    is_limited: bool = False  # whether the program knows of the memory
    refused: Counter[frozenset[int]] = field(default_factory=Counter)  # regions that plans ended, by steps' ops

    def run(self) -> Found:
        planned: dict[Layout, Candidate] = {}
        bound, lowest = 0.0, 0.0  # of all layouts, and of those that are not forbidden yet
        for _ in range(MOST_ROUNDS):
            stage(f"solving for a layout of {self.base.plan.model}")
            solution = self.formulation.program.solve()
            lowest = math.inf if solution is None else solution.bound + self.formulation.constant
            bound = lowest if self.covers_all else bound
            best = self._cheapest(planned.values())
            if solution is None or (best is not None and lowest >= best.cost):
                break
            stored = self.formulation.stored(solution)
            layout, program_cost = self._layout(stored), solution.cost + self.formulation.constant
            if layout not in planned and len(planned) == MOST_PLANS:
                break
            known = planned.get(layout)
            candidate = replace(known, program_cost=program_cost) if known else self._planned(layout, program_cost)
            planned[layout] = candidate
            if self._fits(candidate.plan) and candidate.cost <= program_cost * (1 + CLOSE):
                break
            if not self._fits(candidate.plan):
                self._limit(planned)
                self.formulation.forbid(stored)
            else:
                self._refuse(solution, stored, candidate.plan)
        self._try_unequal_parts(planned)
        self._try_shards_of_the_stream(planned)
        self._try_parts_of_replicas(planned)
        return self._found(tuple(planned.values()), bound)

    # What the program does not know of

    def _try_unequal_parts(self, planned: dict[Layout, Candidate]) -> None:
        """Plan the cheapest layout with vocabularies in unequal parts, too."""
        best = self._cheapest(planned.values())
        unequal = unequal_parts(self.formulation.graph, self.base.plan.axis_size)
        if best is None or not unequal:
            return
        stored = {each.key: each.placement for each in best.plan.variables} | unequal
        self._try(self._layout(stored), best, planned)

    def _try_shards_of_the_stream(self, planned: dict[Layout, Candidate]) -> None:
        """Plan the cheapest layout with the residual stream in shards of the sequence, too.

        Where nothing fits the memory it is the one that takes the least.
        """
        best = self._cheapest(planned.values()) or min(planned.values(), key=_peak)
        options = {each.key: group.options for group in self.formulation.groups for each in group.variables}
        sums = as_sums(best.plan, self.formulation.graph, options)
        if sums is None or not any(each.is_sharded for each in best.plan.variables):
            return
        stored = {each.key: each.placement for each in best.plan.variables} | sums
        self._try(replace(self._layout(stored), sequence_parallel=True), best, planned)

    def _try_parts_of_replicas(self, planned: dict[Layout, Candidate]) -> None:
        """Where nothing fits the memory, plan what takes the least with slots, then with weights, in parts, too."""
        smallest = min(planned.values(), key=_peak, default=None)
        if smallest is None or self.base.plan.replicas == 1:
            return
        stages: tuple[Zero, ...] = (1, 3)
        for zero in stages:
            if self._cheapest(planned.values()) is None:
                self._try(replace(smallest.layout, zero=zero), smallest, planned)

    def _try(self, layout: Layout, below: Candidate | None, planned: dict[Layout, Candidate]) -> None:
        """Plan a layout, if it can be, and the stream can be in shards where it asks for that."""
        with contextlib.suppress(PlanError):
            candidate = replace(self.planner.candidate(layout), on_top_of=below)
            if candidate.plan.shards_stream == layout.sequence_parallel:
                planned[layout] = candidate

    def _refuse(self, solution: Solution, stored: Stored, plan: Plan) -> None:
        """Forbid what has been planned, and was not what the program said."""
        graph, chosen = self.formulation.graph, self.formulation.chosen(solution)
        refused = list(refused_regions(graph, chosen, plan))
        for columns in refused:
            steps = frozenset(chosen[column][0].ops[0] for column in columns)
            # Other ways to store what is gathered there may come for long, and there is no proof left that they end.
            however_stored = self.refused[steps] >= MOST_REFUSALS or not self.covers_all
            self.formulation.forbid_region(columns, however_stored)
            self.covers_all &= not however_stored
            self.refused[steps] += 1
        if refused and is_called_in_ways_that_differ(graph, plan):
            met = (column for region in refused for column in region)
            self.formulation.leave_sizes({graph.calls[chosen[each][0].call].layer for each in met})
        needless = [] if refused else list(needless_ends(graph, chosen, plan))
        for column in needless:
            self.formulation.forbid_where_stored_so(stored, column)
        if not refused and not needless:
            self.formulation.forbid(stored)
            self.covers_all = False

    def _found(self, candidates: Sequence[Candidate], bound: float) -> Found:
        every = (*candidates, self.base)  # which is cheapest where all that was planned is not what the program said
        best = self._cheapest(every)
        if best is None:
            assert self.memory is not None
            raise PlanError(_too_large(self.base, candidates, self.memory))
        others = sorted((each for each in candidates if each is not best), key=lambda each: each.cost)
        name, hardware = self.base.plan.model, self.planner.hardware.name
        known = known_bound(bound, [each for each in every if self._fits(each.plan)])
        return Found(name, hardware, best, known, self.base, tuple(others))

    def _planned(self, layout: Layout, program_cost: float) -> Candidate:
        if layout == self.base.layout:
            return replace(self.base, program_cost=program_cost)
        return self.planner.candidate(layout, program_cost)

    def _layout(self, stored: Stored) -> Layout:
        variables, mesh, axis = self.formulation.graph.variables, self.base.layout.mesh, self.base.plan.axis
        placed = {
            variables[key].path: axes_of(placement, len(variables[key].shape), axis)
            for key, placement in stored.items()
            if isinstance(placement, Shard)
        }
        if not placed:
            return self.base.layout
        return Layout(mesh, write_rules(placed, [each.path for each in variables.values()]))

    def _cheapest(self, candidates: Iterable[Candidate]) -> Candidate | None:
        return min((each for each in candidates if self._fits(each.plan)), key=lambda each: each.cost, default=None)

    def _fits(self, plan: Plan) -> bool:
        return self.memory is None or plan.step.memory.peak.total <= self.memory

    def _limit(self, planned: dict[Layout, Candidate]) -> None:
        """Leave room for the least that a plan holds besides variables, their gradients and slots.

        The layout of which a rank stores the least is planned for that: much of the rest becomes less with it.
        """
        assert self.memory is not None
        if self.is_limited:
            return
        stored = self.formulation.of_least_memory()
        if stored is not None and (layout := self._layout(stored)) not in planned:
            self._try(layout, None, planned)
        uses = [candidate.plan.step.memory.peak for candidate in planned.values()]
        self.formulation.limit_memory(self.memory - min(use.activations + use.temporaries for use in uses))
        self.is_limited = True


def _peak(candidate: Candidate) -> int:
    return candidate.plan.step.memory.peak.total


def _too_large(base: Candidate, candidates: Sequence[Candidate], memory: float) -> str:
    smallest = min(map(_peak, (base, *candidates)))
    return (
        f"no layout of {base.plan.model!r} on a mesh of {base.layout.mesh} that was planned fits {memory:.4g} bytes; "
        f"the smallest peak is {smallest:.4g} bytes: give more ranks, more memory or a smaller batch"
    )
