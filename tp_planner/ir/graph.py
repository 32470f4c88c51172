"""The traced model: layer calls, the ops inside them, and the tensors between them.

The graph is recorded by running the model once on fake tensors. Its ``flow`` is a networkx graph whose
nodes are ops and whose edges are tensors; layer calls nest as the model does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import networkx as nx

from tp_planner.ir.contraction import Contraction
from tp_planner.ir.placement import Shape

REPEAT = "repeat"  # name of the op that stands for a whole block


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Stands for a tensor inside the arguments of an op: the ``position``-th of the op's inputs."""

    position: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor: shape, strides, dtype name, and whether gradients flow into it.

    ``requires_grad`` says that it depends on a variable that can be trained, ``has_gradient`` that one of these is
    trainable now.
    """

    id: int
    shape: Shape
    stride: Shape
    dtype: str
    itemsize: int
    requires_grad: bool
    has_gradient: bool
    variable: str | None = None  # the variable this tensor is the value of

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """A layer: its unique name in the model, its class, its variables in order of creation, what it contracts.

    ``contractions`` has one entry for each mode of a layer whose computation is a contraction; it is empty
    for every other layer. A stretch is no layer of the model, but stands for several while it is planned.
    """

    name: str
    path: str
    class_name: str
    variables: tuple[str, ...]
    contractions: tuple[tuple[str, Contraction], ...]
    is_dropout: bool
    is_stretch: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer. ``inputs`` are (position among the flattened arguments, tensor id)."""

    id: int
    layer: str
    parent: int | None
    mode: str  # how the layer was called: "" or, for a layer that computes two functions, which one
    inputs: tuple[tuple[int, int], ...]
    outputs: tuple[int, ...]
    ops: tuple[int, int]  # first op inside and first op after
    core_output: int | None  # what enters the layer's own activation function, where it has one


@dataclass(frozen=True, slots=True)
class Op:
    """One ATen op. ``arguments`` is (args, kwargs) with TensorRef for tensors; opaque to the passes.

    Equal blocks share their ``arguments`` objects.
    """

    id: int
    name: str
    call: int
    arguments: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    random: bool
    constants: tuple[Any, ...] = ()  # values of the tensors among the inputs that are constants
    is_constant: bool = False  # whether it computes one, of a few whole numbers alone


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """One call of a torch function in the code of a layer: ``number`` counts those of the name in the layer's call.

    Positions are among the function's flattened arguments; ``constants`` has those that are numbers and texts. All ops
    of ``ops``, which are the first inside and the first after, are of the layer's call. One that is ``elementwise``
    makes each element of those at the same place, without random numbers.
    """

    name: str
    call: int
    number: int
    inputs: tuple[tuple[int, int], ...]
    outputs: tuple[int, ...]
    constants: tuple[tuple[int, Any], ...]
    ops: tuple[int, int]
    elementwise: bool = False


@dataclass(frozen=True, slots=True)
class Repeat:
    """A call of a block that did not run, because it does what ``twin`` does, an earlier call of an equal block.

    ``layers`` and ``variables`` pair those of the twin with those of this block, in order; ``inputs`` and ``outputs``
    the tensors that go in and those that it makes, masks and losses included.
    """

    block: str
    call: int
    twin: int
    layers: tuple[tuple[str, str], ...]
    variables: tuple[tuple[str, str], ...]
    inputs: tuple[tuple[int, int], ...]
    outputs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class VariableInfo:
    """A variable of the model. ``key`` is unique; ``path`` is what Keras and layout rules call it."""

    key: str
    path: str
    name: str
    shape: Shape
    dtype: str
    itemsize: int
    trainable: bool
    owner: str  # name of the layer that created it
    kept_whole: str  # why no rule can shard it; empty for most variables
    penalty: Literal["none", "additive", "whole"]  # its regularizer: none, a sum over elements, or any function


@dataclass(frozen=True)
class ModelGraph:
    """Everything the passes know of a model. Ops and calls are in order of execution.

    ``repeats`` has the calls inside which one op of the name ``REPEAT`` stands for a whole block. ``functions`` are
    those that have ops, in order; None if they were not recorded. ``own_gradients`` are the ops inside functions that
    say themselves what their gradient is.
    """

    model_name: str
    training: bool
    layers: Mapping[str, LayerInfo]
    variables: Mapping[str, VariableInfo]
    tensors: Mapping[int, TensorInfo]
    calls: Mapping[int, Call]
    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    repeats: Mapping[int, Repeat] = field(default_factory=dict)
    functions: tuple[FunctionCall, ...] | None = None
    own_gradients: frozenset[int] = frozenset()

    @property
    def repeated_layers(self) -> frozenset[str]:
        """The layers of which no call was run, because they are inside blocks that repeat others."""
        ran = {call.layer for call in self.calls.values() if call.id not in self.repeats}
        return frozenset(layer for repeat in self.repeats.values() for _, layer in repeat.layers) - ran

    @cached_property
    def flow(self) -> nx.MultiDiGraph:
        """The ops as a graph: an edge for each tensor from the op that made it to each op that reads it."""
        flow: nx.MultiDiGraph = nx.MultiDiGraph()
        producer: dict[int, int] = {}
        for op in self.ops:
            flow.add_node(op.id, op=op)
            for tensor in dict.fromkeys(op.inputs):
                if tensor in producer:
                    flow.add_edge(producer[tensor], op.id, tensor=self.tensors[tensor])
            producer.update(dict.fromkeys(op.outputs, op.id))
        return flow

    @cached_property
    def makers(self) -> Mapping[int, str]:
        """The layer in whose call each tensor was made, by tensor."""
        makers: dict[int, str] = {}
        for op in self.ops:
            made = dict.fromkeys(op.outputs, self.calls[op.call].layer)
            if op.name == REPEAT:
                repeat = self.repeats[op.call]
                names = dict(repeat.layers)
                for twin, tensor in repeat.outputs:
                    made[tensor] = names.get(makers.get(twin, ""), made[tensor])
            makers.update(made)
        return makers

    def tensor_name(self, tensor: int) -> str:
        """Return what people call a tensor: an input of the model, or the output of a layer."""
        if tensor in self.inputs:
            return f"model input {self.inputs.index(tensor)}"
        maker = self.makers.get(tensor)
        return "constant" if maker is None else f"{maker} output"

    def enclosing(self, call: int | None) -> Iterator[Call]:
        """Yield the call and the calls it runs inside, innermost first."""
        while call is not None:
            yield self.calls[call]
            call = self.calls[call].parent
