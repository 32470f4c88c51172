"""Known: what the walk is given, and how the tensors are placed that it has come by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from tp_planner.ir.graph import Call, FunctionCall, ModelGraph, Op
from tp_planner.ir.placement import WHOLE, PackedShard, Partial, Placement, SequenceShard, Shard, divides
from tp_planner.passes.choose_styles import StyleChoice
from tp_planner.passes.follow_ops import Followed, Refused, ShardingRules
from tp_planner.passes.walk.facts import Closings, LayerMode, Origins, VariableRead

# Ops that make of a variable the same in another dtype or layout.
SAME_VALUES = {
    f"aten.{name}"
    for name in ("_to_copy.default", "_unsafe_view.default", "alias.default", "clone.default", "detach.default")
} | {f"aten.{name}" for name in ("permute.default", "t.default", "transpose.int", "unsqueeze.default", "view.default")}
CONVOLUTION = "aten.convolution.default"
OWN_GRADIENT = "runs in a function that says what its gradient is, which may mix the shards"


SEQUENCE = 1  # the dim of the residual stream, (batch, sequence, width), that is sharded


def as_stream(placement: Placement) -> Placement:
    """Return the placement of what an op makes of shards of the stream."""
    assert not isinstance(placement, PackedShard), "asked of in_other_order first"
    return SequenceShard(placement.dim) if isinstance(placement, Shard) else placement


JOINED = "joins shards of sequences, whose order would be another"


def in_other_order(placements: Iterable[Placement]) -> bool:
    """Whether shards of the stream would be of several sequences side by side, which no shard of the whole is."""
    return any(isinstance(placement, PackedShard) for placement in placements)


def as_shards(inputs: Mapping[int, Placement]) -> dict[int, Placement]:
    """Return the placements as sharding rules know them, to which a shard is a shard."""
    return {
        tensor: Shard(placement.dim) if isinstance(placement, SequenceShard) else placement
        for tensor, placement in inputs.items()
    }


@dataclass(frozen=True)
class Known:
    """The model and what was decided before the walk; ``placements`` and ``origins`` grow with every step."""

    graph: ModelGraph
    stored: Mapping[str, Placement]
    styles: Mapping[LayerMode, StyleChoice]
    closings: Closings
    rules: ShardingRules
    parts: int
    sequence_parallel: bool = False
    on_sequence: frozenset[str] = frozenset()  # layers that return shards of the stream, if not all do
    placements: dict[int, Placement] = field(default_factory=dict)
    origins: dict[int, Origins] = field(default_factory=dict)

    def place(self, tensor: int, placement: Placement, origins: Origins) -> None:
        """Learn how a tensor is placed that was made of shards."""
        self.placements[tensor] = placement
        self.origins[tensor] = origins

    def scales_of(self, function: FunctionCall) -> tuple[int, ...]:
        """Return the positions of the function's arguments that are given sizes of the whole stream."""
        if not self.closings.scales:
            return ()
        layer = self.graph.calls[function.call]
        if not any(isinstance(self.placement(tensor, layer.id), SequenceShard) for tensor in self._seen_by(layer)):
            return ()  # its code reads sizes of the whole
        key = (layer.layer, layer.mode, function.name, function.number)
        return tuple(sorted(argument[4] for argument in self.closings.scales if argument[:4] == key))

    def _seen_by(self, call: Call) -> Iterator[int]:
        """Yield the tensors that a call's own code sees: what it takes, what calls and ops in it return."""
        yield from (tensor for _, tensor in call.inputs)
        for inner in self.graph.calls.values():
            if inner.parent == call.id:
                yield from inner.outputs
        yield from (tensor for op in self.graph.ops[slice(*call.ops)] if op.call == call.id for tensor in op.outputs)

    def forget(self, tensor: int) -> None:
        """Learn that a tensor is whole from now on."""
        del self.placements[tensor], self.origins[tensor]

    def outside(self, tensor: int, call: int) -> Placement:
        """Return the placement between regions of a tensor that ``call`` takes: whole, or a shard of the stream."""
        placement = self.placement(tensor, call)
        return placement if isinstance(placement, SequenceShard) else WHOLE

    def outside_of_sum(self, tensor: int, call: Call) -> Placement:
        """Return the placement in which a sum over the ranks leaves its region, that of the stream where it can.

        What a convolution makes has its channels where the stream has its sequence.
        """
        if tensor in self.makers and self.makers[tensor].name == CONVOLUTION:
            return WHOLE
        wanted = self.sequence_parallel or call.layer in self.on_sequence
        closed = (call.layer, call.mode) in self.closings.streams
        return SequenceShard(SEQUENCE) if wanted and not closed and self.can_be_on_stream(tensor) else WHOLE

    def can_be_on_stream(self, tensor: int) -> bool:
        """Whether a tensor has a sequence that divides."""
        info = self.graph.tensors[tensor]
        return (
            len(info.shape) > SEQUENCE + 1
            and "float" in info.dtype
            and divides(info.shape, SequenceShard(SEQUENCE), self.parts)
        )

    def changes_stream(self, call: Call) -> bool:
        """Whether the stream begins or ends at what a call returns."""
        key = (call.layer, call.mode)
        return key in self.closings.begins or key in self.closings.ends

    def entered_as(self, call: Call, outside: Placement) -> Placement:
        """Return how a call's own code has an input that arrives as ``outside``."""
        gathers = isinstance(outside, SequenceShard) and (call.layer, call.mode) in self.closings.gathers
        return WHOLE if gathers else outside

    def _as_entered(self, tensor: int, call: int) -> Placement:
        """Return how ``call`` has a tensor, after what the calls around it make of it where they take it."""
        placement = self.placements.get(tensor, WHOLE)
        if self.closings.gathers and isinstance(placement, SequenceShard):
            for outer in self.graph.enclosing(call):
                if any(given == tensor for _, given in outer.inputs):
                    placement = self.entered_as(outer, placement)
        return placement

    def placement(self, tensor: int, call: int) -> Placement:
        """Return how a tensor is placed when an op of ``call`` reads it."""
        variable = self.graph.tensors[tensor].variable
        if variable is None:
            return self._as_entered(tensor, call)
        layer = self.graph.calls[call]
        if self.read_of(call, variable) in self.closings.reads or (layer.layer, layer.mode) in self.closings.whole:
            return WHOLE
        if variable in self.passed_on and (self.reader(call, variable), variable) in self.handed_on:
            return WHOLE
        placement = self.stored[variable]
        return placement if divides(self.graph.variables[variable].shape, placement, self.parts) else WHOLE

    def origins_of(self, tensors: Iterable[int], call: int) -> Origins:
        """Return where the shards come from that an op of ``call`` reads in ``tensors``."""
        return Origins().union(*(self._origins(tensor, call) for tensor in tensors))

    def _origins(self, tensor: int, call: int) -> Origins:
        variable = self.graph.tensors[tensor].variable
        if variable is None and tensor in self.origins:
            return self.origins[tensor] if self.placement(tensor, call) != WHOLE else frozenset()
        if variable is None:
            return frozenset()
        if self.placement(tensor, call) == WHOLE:
            return frozenset()
        return frozenset({("read", self.read_of(call, variable))})

    def read_of(self, call: int, variable: str) -> VariableRead:
        """Return what names the read of a variable that a call uses."""
        return self.graph.calls[self.reader(call, variable)].layer, variable

    def reader(self, call: int, variable: str) -> int:
        """Return the call whose own code reads a variable that ``call`` uses: another one, if it is handed the tensor.

        That is one around it, of which it takes the variable, or one inside, which returns it.
        """
        if variable not in self.passed_on:
            return call
        while True:
            outer = self.graph.calls[call].parent
            if (call, variable) in self._taken and outer is not None:
                call = outer
            elif (call, variable) in self._givers:
                call = self._givers[call, variable]
            else:
                return call

    def follow(self, op: Op, inputs: Mapping[int, Placement]) -> Followed | Refused:
        """Return what an op makes of inputs placed so: shards and whole tensors, or nothing."""
        if op.id in self.graph.own_gradients:
            return Refused(OWN_GRADIENT)
        followed = self.rules.follow(op, self.graph.tensors, as_shards(inputs))
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
    def passed_on(self) -> frozenset[str]:
        """The variables that a call takes or returns: other calls may use them than the one that reads them."""
        return frozenset(variable for _, variable in (*self._taken, *self._returned))

    @cached_property
    def handed_on(self) -> dict[tuple[int, str], int]:
        """The tensor of each variable that is handed to or from a call, by the call that reads it, and its key."""
        ends = {**self._taken, **self._returned}
        return {(self.reader(call, variable), variable): tensor for (call, variable), tensor in ends.items()}

    @cached_property
    def _taken(self) -> dict[tuple[int, str], int]:
        """The variables that are arguments, by call and key: their tensors."""
        ends = ((call.id, tensor) for call in self.graph.calls.values() for _, tensor in call.inputs)
        return self._variables_among(ends)

    @cached_property
    def _returned(self) -> dict[tuple[int, str], int]:
        """The variables that calls return, by call and key: their tensors."""
        return self._variables_among((call.id, each) for call in self.graph.calls.values() for each in call.outputs)

    def _variables_among(self, ends: Iterable[tuple[int, int]]) -> dict[tuple[int, str], int]:
        named = ((call, self.graph.tensors[tensor].variable, tensor) for call, tensor in ends)
        return {(call, variable): tensor for call, variable, tensor in named if variable is not None}

    @cached_property
    def _givers(self) -> dict[tuple[int | None, str], int]:
        """By call and variable: a call inside that returns the variable, and has not taken it."""
        given = ((call, variable) for call, variable in self._returned if (call, variable) not in self._taken)
        return {(self.graph.calls[call].parent, variable): call for call, variable in given}

    @cached_property
    def weights(self) -> frozenset[int]:
        """The tensors that are variables, in any dtype and layout."""
        found = {number for number, info in self.graph.tensors.items() if info.variable is not None}
        for op in self.graph.ops:
            if op.name in SAME_VALUES and op.inputs[0] in found:
                found.update(op.outputs)
        return frozenset(found)

    @cached_property
    def makers(self) -> Mapping[int, Op]:
        """The op that made each tensor."""
        return {tensor: op for op in self.graph.ops for tensor in op.outputs}

    def readers_of(self, variable: str) -> set[str]:
        """Return the layers in whose calls ops read a variable."""
        calls, tensors = self.graph.calls, self.graph.tensors
        reads = (op for op in self.graph.ops if any(tensors[tensor].variable == variable for tensor in op.inputs))
        return {calls[op.call].layer for op in reads}

    @cached_property
    def parents(self) -> frozenset[int | None]:
        """The calls that have calls inside."""
        return frozenset(call.parent for call in self.graph.calls.values())
