"""Known: what the walk is given, and how the tensors are placed that it has come by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from tp_planner.ir.graph import Call, ModelGraph, Op
from tp_planner.ir.placement import WHOLE, Partial, Placement, divides
from tp_planner.passes.choose_styles import StyleChoice
from tp_planner.passes.follow_ops import Followed, Refused, ShardingRules
from tp_planner.passes.walk.facts import Closings, LayerMode, Origins, VariableRead

# Ops that make of a variable the same in another dtype or layout.
SAME_VALUES = {
    f"aten.{name}"
    for name in ("_to_copy.default", "_unsafe_view.default", "alias.default", "clone.default", "detach.default")
} | {f"aten.{name}" for name in ("permute.default", "t.default", "transpose.int", "unsqueeze.default", "view.default")}
OWN_GRADIENT = "runs in a function that says what its gradient is, which may mix the shards"


@dataclass(frozen=True)
class Known:
    """The model and what was decided before the walk; ``placements`` and ``origins`` grow with every step."""

    graph: ModelGraph
    stored: Mapping[str, Placement]
    styles: Mapping[LayerMode, StyleChoice]
    closings: Closings
    rules: ShardingRules
    parts: int
    placements: dict[int, Placement] = field(default_factory=dict)
    origins: dict[int, Origins] = field(default_factory=dict)

    def place(self, tensor: int, placement: Placement, origins: Origins) -> None:
        """Learn how a tensor is placed that was made of shards."""
        self.placements[tensor] = placement
        self.origins[tensor] = origins

    def outside(self, tensor: int) -> Placement:
        """Return the placement of a tensor between regions, from which it enters one and to which it leaves one."""
        return WHOLE

    def placement(self, tensor: int, call: int) -> Placement:
        """Return how a tensor is placed when an op of ``call`` reads it."""
        variable = self.graph.tensors[tensor].variable
        if variable is None:
            return self.placements.get(tensor, WHOLE)
        layer = self.graph.calls[call]
        if self.read_of(call, variable) in self.closings.reads or (layer.layer, layer.mode) in self.closings.whole:
            return WHOLE
        if variable in self.passed_on:
            return WHOLE
        placement = self.stored[variable]
        return placement if divides(self.graph.variables[variable].shape, placement, self.parts) else WHOLE

    def origins_of(self, tensors: Iterable[int], call: int) -> Origins:
        """Return where the shards come from that an op of ``call`` reads in ``tensors``."""
        return Origins().union(*(self._origins(tensor, call) for tensor in tensors))

    def _origins(self, tensor: int, call: int) -> Origins:
        variable = self.graph.tensors[tensor].variable
        if variable is None:
            return self.origins.get(tensor, frozenset())
        if self.placement(tensor, call) == WHOLE:
            return frozenset()
        return frozenset({("read", self.read_of(call, variable))})

    def read_of(self, call: int, variable: str) -> VariableRead:
        """Return what names the read of a variable in a call."""
        return self.graph.calls[call].layer, variable

    def follow(self, op: Op, inputs: Mapping[int, Placement]) -> Followed | Refused:
        """Return what an op makes of inputs placed so: shards and whole tensors, or nothing."""
        if op.id in self.graph.own_gradients:
            return Refused(OWN_GRADIENT)
        followed = self.rules.follow(op, self.graph.tensors, inputs)
        if isinstance(followed, Followed) and Partial() in followed.outputs:
            return Refused("leaves a sum over the shards")
        return followed

    def contraction(self, call: Call) -> StyleChoice | None:
        """Return the style of a call that is one contraction of shards."""
        choice = self.styles.get((call.layer, call.mode))
        return choice if choice is not None and choice.is_contraction else None

    def is_one_step(self, call: Call) -> bool:
        """Whether the call of a layer is followed as one, not op by op: a contraction, or dropout."""
        if self.contraction(call) is not None:
            return (call.layer, call.mode) not in self.closings.whole
        return self.graph.layers[call.layer].is_dropout

    @cached_property
    def passed_on(self) -> frozenset[str | None]:
        """The variables that a call takes or returns: they are read in another call than the one that uses them."""
        calls = self.graph.calls.values()
        passed = (tensor for call in calls for tensor in (*(given for _, given in call.inputs), *call.outputs))
        return frozenset(self.graph.tensors[tensor].variable for tensor in passed) - {None}

    @cached_property
    def weights(self) -> frozenset[int]:
        """The tensors that are variables, in any dtype and layout."""
        found = {number for number, info in self.graph.tensors.items() if info.variable is not None}
        for op in self.graph.ops:
            if op.name in SAME_VALUES and op.inputs[0] in found:
                found.update(op.outputs)
        return frozenset(found)

    @cached_property
    def parents(self) -> frozenset[int | None]:
        """The calls that have calls inside."""
        return frozenset(call.parent for call in self.graph.calls.values())
