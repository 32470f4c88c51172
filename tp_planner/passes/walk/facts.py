"""Facts of a walk: what it is given to close, and what it hands on when it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

from tp_planner.ir.placement import Placement
from tp_planner.ir.plan import Boundary, FunctionPlan
from tp_planner.passes.follow_ops import Followed

LayerMode = tuple[str, str]  # layer name, mode
VariableRead = tuple[str, str]  # name of the layer in whose call it is read, variable key
NumberedFunction = tuple[str, int]  # name of a torch function, and which of the calls of it in a layer's code
Argument = tuple[str, str, str, int, int]  # layer, mode, name of a torch function, which of its calls, position
Packed = tuple[str, str, tuple[int, ...]]  # layer, key of its weight, parts
# What a conflict can change: sharding ends where it comes from, at a layer's output or a variable's use, or in all of
# a layer ("whole"); or a layer whose code writes sizes of whole tensors is given those of shards ("sizes"); or one
# whose code reads sizes of shards sees those of whole tensors ("sees"). The residual stream comes from a layer that
# leaves it sharded ("stream"), is gathered where a layer takes it ("gather") or its output ends the model ("end"), and
# begins at a layer whose whole output is cut to shards of it ("begin").
# A weight whose sharded dim the code takes apart is stored in parts ("packed").
# Code that reads sizes of its shards has them made sizes of the whole where it makes whole tensors of them ("scale").
Origin = (
    tuple[Literal["layer", "whole", "sizes", "sees", "stream", "gather", "begin", "end"], LayerMode]
    | tuple[Literal["read"], VariableRead]
    | tuple[Literal["scale"], Argument]
    | tuple[Literal["packed"], Packed]
)
Origins = frozenset[Origin]


def on_stream(origins: Origins) -> bool:
    """Whether shards are of the residual stream, and of no region."""
    return bool(origins) and all(kind == "stream" for kind, _ in origins)


def is_mixed(origins: Origins) -> bool:
    """Whether shards of the residual stream meet those of a region."""
    return len({on_stream(frozenset({origin})) for origin in origins}) > 1


@dataclass(frozen=True, slots=True)
class Closings:
    """Where sharding has to end at its origin: layers whose output is gathered, variables gathered for use.

    ``whole`` are layers that compute on whole tensors only, ``sizes`` those that are given the sizes of shards where
    their code writes sizes of whole tensors, ``sees`` those whose code sees the sizes of whole tensors where it reads
    them of shards that the layer takes. ``streams`` are layers whose output is no shard of the
    residual stream, ``gathers`` those that take the stream gathered, ``ends`` those whose output is, and
    ``begins`` those whose whole output is cut to shards of it. ``scales`` are arguments of functions that are given
    sizes of the whole stream, where code has read those of shards. All with the reason. ``packed`` are weights that are
    stored in parts, with the parts.
    """

    layers: Mapping[LayerMode, str] = field(default_factory=dict)
    reads: Mapping[VariableRead, str] = field(default_factory=dict)
    whole: Mapping[LayerMode, str] = field(default_factory=dict)
    sizes: Mapping[LayerMode, str] = field(default_factory=dict)
    sees: Mapping[LayerMode, str] = field(default_factory=dict)
    streams: Mapping[LayerMode, str] = field(default_factory=dict)
    gathers: Mapping[LayerMode, str] = field(default_factory=dict)
    ends: Mapping[LayerMode, str] = field(default_factory=dict)
    begins: Mapping[LayerMode, str] = field(default_factory=dict)
    scales: Mapping[Argument, str] = field(default_factory=dict)
    packed: Mapping[VariableRead, tuple[int, ...]] = field(default_factory=dict)

    def closing(self, origin: Origin, reason: str) -> Closings:
        match origin:
            case "layer", key:
                return replace(self, layers={key: reason, **self.layers})
            case "whole", key:
                return replace(self, whole={key: reason, **self.whole})
            case "sizes", key:
                return replace(self, sizes={key: reason, **self.sizes})
            case "sees", key:
                return replace(self, sees={key: reason, **self.sees})
            case "stream", key:
                return replace(self, streams={key: reason, **self.streams})
            case "gather", key:
                return replace(self, gathers={key: reason, **self.gathers})
            case "end", key:
                return replace(self, ends={key: reason, **self.ends})
            case "scale", argument:
                return replace(self, scales={argument: reason, **self.scales})
            case "packed", (layer, variable, parts):
                ends = sorted({*accumulate(parts), *accumulate(self.packed.get((layer, variable), ()))})
                fine = tuple(after - before for before, after in zip([0, *ends], ends, strict=False))
                return replace(self, packed={**self.packed, (layer, variable): fine})
            case "begin", key:
                return replace(self, begins={key: reason, **self.begins})
            case _, key:
                return replace(self, reads={key: reason, **self.reads})


@dataclass(frozen=True, slots=True)
class Conflict:
    """A place where tensors from ``origins`` cannot stay sharded.

    ``layer`` is in whose call that is; "" where it is in that of none. ``in_code``: it is in the code of a layer, where
    a boundary at a torch function may help.
    """

    layer: str
    origins: Origins
    reason: str
    in_code: bool = False


@dataclass(frozen=True, slots=True)
class Placed:
    """One boundary of one call: where it stands, and the variable whose use it is, if it is one's."""

    call: int
    place: Literal["input", "variable", "output"]
    position: int
    variable: str | None
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
    sees_whole: bool = False  # whether sizes that its code reads of sharded inputs are those of the whole


@dataclass(frozen=True, slots=True)
class Walk:
    """What one walk over the graph found.

    ``placements`` has the tensors that were made of shards, and ``origins`` where those shards come from. All others
    are whole, but for variables (``reads``).
    """

    placements: Mapping[int, Placement]
    origins: Mapping[int, Origins]
    conflicts: tuple[Conflict, ...]
    boundaries: tuple[Placed, ...]
    records: Mapping[int, CallRecord]  # by call
    functions: Mapping[int, tuple[FunctionPlan, ...]]  # by call, in order
    function_origins: Mapping[int, Origins]  # of the shards they meet, by call
    followed: Mapping[int, Followed]  # by op
    cut_for: Mapping[tuple[int, int], Placement]  # (op, tensor): read or made as this, and not as it is placed
    taken: Mapping[tuple[int, int], Placement]  # (call, tensor): arrives as this, and not as it is placed
    reads: Mapping[VariableRead, Placement]  # of variables that ops read sharded
    writes_sizes: Mapping[LayerMode, frozenset[NumberedFunction]]  # where layers could be given the sizes of shards
    skipped_ops: frozenset[int]  # of calls that are one step
    blocks_differ: bool  # a block is given other shards than the one that it repeats
    regions_cross_blocks: bool  # a region reaches into a block that others repeat, or out of it
    input_gradients: bool  # whether gradients with respect to the model's inputs are right


def changes_of(functions: Sequence[FunctionPlan]) -> list[Any]:
    """Return what changes at functions, without names and shapes of tensors."""
    return [
        (
            function.name,
            function.number,
            [(position, boundary.forward, boundary.backward) for position, boundary in function.inputs],
            function.output and (function.output.forward, function.output.backward),
            function.sizes,
            function.scales,
        )
        for function in functions
    ]
