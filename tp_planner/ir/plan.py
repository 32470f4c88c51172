"""The plan: every decision about a model as plain, frozen data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from tp_planner.ir.contract import Recording, check_contract
from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import DeviceType, LayoutRule, Zero
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.placement import (
    WHOLE,
    Placement,
    SequenceShard,
    Shape,
    Shard,
    collective_between,
    divides,
    where_stream_is_whole,
)
from tp_planner.ir.step import Collective, CollectiveKind, Step

Style = Literal["column", "row", "vocabulary", "batched", "sequence", "elementwise", "gathered", "replicated"]


@dataclass(frozen=True, slots=True)
class Transition:
    """A change of placement: of a tensor on the way forward, or of its gradient on the way back."""

    source: Placement
    target: Placement

    @property
    def collective(self) -> CollectiveKind | None:
        return collective_between(self.source, self.target)

    @property
    def where_stream_is_whole(self) -> Transition:
        """What it is in a call that keeps the residual stream whole."""
        return Transition(where_stream_is_whole(self.source), where_stream_is_whole(self.target))

    def __str__(self) -> str:
        return str(self.source) if self.source == self.target else f"{self.source}->{self.target}"


@dataclass(frozen=True, slots=True)
class Boundary:
    """Where a tensor changes its placement: the change forward and the change of its gradient.

    ``shape`` is the global shape in the traced call, ``tensor`` names the tensor: boundaries of one call
    of the model with the same tensor and transitions are executed once and shared, by as many inputs as ``readers``
    says. ``again`` says that what was gathered is not kept for the backward pass but gathered again there. Where the
    gradient comes back ``behind`` others, its sum is begun before the gradients of weights are computed that the same
    layers read, and waited for after them.
    """

    tensor: str
    shape: Shape
    dtype: str
    itemsize: int
    forward: Transition
    backward: Transition
    has_gradient: bool  # whether a gradient flows back here in the traced step
    readers: int = 1
    again: bool = False
    behind: bool = False

    @property
    def is_on_stream(self) -> bool:
        """Whether it is another one where the residual stream is whole."""
        return self.where_stream_is_whole != self

    @property
    def where_stream_is_whole(self) -> Boundary:
        """What it is in a call that keeps the residual stream whole."""
        forward, backward = self.forward.where_stream_is_whole, self.backward.where_stream_is_whole
        if (forward, backward) == (self.forward, self.backward):
            return self
        return replace(self, forward=forward, backward=backward, again=False)

    @property
    def is_identity(self) -> bool:
        """Whether nothing happens: equal placements and no collective in either direction."""
        return self.forward.source == self.forward.target and self.backward.source == self.backward.target


@dataclass(frozen=True, slots=True)
class VariablePlan:
    """Where one variable is stored.

    Over the batch axis it is what the model axis left that is cut once more: each part is one of ``batch_placement``
    of the shard that ``placement`` says. Where that leaves it whole, ``slot_placement`` says of what part of it each
    replica has the mean of the gradients, and an optimizer's slots, and makes the update.
    """

    key: str
    path: str
    shape: Shape
    local_shape: Shape  # on rank 0
    dtype: str
    itemsize: int
    trainable: bool
    placement: Placement  # on the model axis
    rule: str | None  # pattern of the layout rule that decided, if any
    reason: str
    batch_placement: Placement = WHOLE
    slot_placement: Placement = WHOLE

    @property
    def stored_as(self) -> str:
        """The placement, and those on the batch axis that say anything: ``"S(0), batch S(1)"``, ``"R, slots S(0)"``."""
        across = "" if self.batch_placement == WHOLE else f", batch {self.batch_placement}"
        return f"{self.placement}{across}" + ("" if self.slot_placement == WHOLE else f", slots {self.slot_placement}")

    @property
    def is_sharded(self) -> bool:
        """Whether no rank stores the whole variable."""
        return isinstance(self.placement, Shard) or isinstance(self.batch_placement, Shard)


@dataclass(frozen=True, slots=True)
class VariableUse:
    """How a layer reads a variable during its call: as stored, or after a boundary."""

    variable: str
    boundary: Boundary


@dataclass(frozen=True, slots=True)
class PartRead:
    """A variable that replicas store in parts, as a layer reads it: in the dtype in which it travels."""

    layer: str
    variable: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Gathering:
    """What is put together over the batch axis in one collective, when the first of its ``reads`` is made.

    ``layer`` is the block that makes them, or the first of layers that follow each other. The gradients of the
    variables are added, and cut, together too. What is read ``once`` in a step can be gathered before it is.
    """

    layer: str
    reads: tuple[PartRead, ...]
    once: bool = True

    @property
    def place(self) -> str:
        """Where its collectives stand in the layer: at the variable, or at the first of several."""
        first = self.reads[0].variable
        return first if len(self.reads) == 1 else f"variables in parts ({first})"


def _whole(boundary: Boundary | None) -> Boundary | None:
    return None if boundary is None else boundary.where_stream_is_whole


def _inputs_where_stream_is_whole(inputs: tuple[tuple[int, Boundary], ...]) -> tuple[tuple[int, Boundary], ...]:
    return tuple((position, boundary.where_stream_is_whole) for position, boundary in inputs)


@dataclass(frozen=True, slots=True)
class FunctionPlan:
    """What changes at one call of a torch function in a layer's code.

    It is the ``number``-th call (from 1) of the function ``name`` in one call of the layer. ``inputs`` maps positions
    among its flattened arguments to boundaries, ``output`` is the boundary of what it returns. ``sizes`` are arguments
    that the code writes as sizes of the whole tensor: (position, whole size, size of a shard). ``scales`` are positions
    of arguments that the code reads from shards of the residual stream, and that are sizes of the whole here.
    """

    name: str
    number: int
    inputs: tuple[tuple[int, Boundary], ...] = ()
    output: Boundary | None = None
    sizes: tuple[tuple[int, int, int], ...] = ()
    scales: tuple[int, ...] = ()

    @property
    def where_stream_is_whole(self) -> FunctionPlan:
        """What changes in a call that keeps the residual stream whole."""
        inputs = _inputs_where_stream_is_whole(self.inputs)
        return replace(self, inputs=inputs, output=_whole(self.output), scales=())

    def __str__(self) -> str:
        return f"{self.name} {self.number}"


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How one layer computes on the model axis.

    ``inputs`` maps positions among the flattened call arguments to boundaries; ``output`` is the boundary
    after the layer; ``epilogue_after_output`` says that bias and activation run after that boundary.
    ``sharded_inputs`` are the placements of the arguments that arrive sharded. Where the layer takes or
    returns sharded tensors, ``scope`` is the layer inside whose call the whole region lies. For dropout on a
    sharded tensor ``dropout_order`` is the order in memory, outermost first, of the dims of the whole tensor, in
    which a single device draws the mask. ``functions`` are the torch functions in its own code at which something
    changes. ``sees_whole`` says that the sizes which its own code reads of arguments that arrive sharded are those of
    the whole tensors. ``into_loss`` says that in a training step what it returns is not gathered at ``output``, but
    read in shards by the loss. ``makes_again`` says that of what torch functions in its own code make element by
    element, nothing is kept for the backward pass that can be made again there of half as much memory.
    """

    layer: str
    path: str
    class_name: str
    mode: str
    style: Style
    reason: str
    inputs: tuple[tuple[int, Boundary], ...] = ()
    uses: tuple[VariableUse, ...] = ()
    output: Boundary | None = None
    output_placement: Placement | None = None
    epilogue_after_output: Literal["", "activation", "bias+activation"] = ""
    sharded_inputs: tuple[tuple[int, Placement], ...] = ()
    scope: str = ""
    dropout_order: tuple[int, ...] = ()
    functions: tuple[FunctionPlan, ...] = ()
    calls: int = 1
    into_loss: bool = False
    sees_whole: bool = False
    makes_again: bool = False

    @property
    def where_stream_is_whole(self) -> LayerPlan:
        """How the layer computes in a call that keeps the residual stream whole; itself if that is the same."""
        on_stream = {position for position, placement in self.sharded_inputs if isinstance(placement, SequenceShard)}
        placed = self.output_placement and where_stream_is_whole(self.output_placement)
        changes = any(each.is_on_stream for _, each in self.boundaries) or any(each.scales for each in self.functions)
        if not on_stream and placed == self.output_placement and not changes:
            return self
        return replace(
            self,
            inputs=_inputs_where_stream_is_whole(self.inputs),
            uses=tuple(replace(use, boundary=use.boundary.where_stream_is_whole) for use in self.uses),
            output=_whole(self.output),
            output_placement=placed,
            sharded_inputs=tuple(each for each in self.sharded_inputs if each[0] not in on_stream),
            dropout_order=() if on_stream else self.dropout_order,
            functions=tuple(function.where_stream_is_whole for function in self.functions),
        )

    @property
    def keeps_less(self) -> bool:
        """Whether calls leave out of what autograd keeps something that is made again in the backward pass."""
        return self.makes_again or any(boundary.again for _, boundary in self.inputs)

    @property
    def boundaries(self) -> Iterator[tuple[str, Boundary]]:
        """The boundaries of one call with the place they stand at."""
        for position, boundary in self.inputs:
            yield f"input {position}", boundary
        for use in self.uses:
            yield f"variable {use.variable}", use.boundary
        for function in self.functions:
            for position, boundary in function.inputs:
                yield f"{function} input {position}", boundary
            if function.output is not None:
                yield f"{function} output", function.output
        if self.output is not None:
            yield "output", self.output


@dataclass(frozen=True, slots=True)
class GuessedDim:
    """A dim that an input leaves open, and the size that the model was planned with because nobody knows it."""

    input: str
    dim: int
    size: int


@dataclass(frozen=True, slots=True)
class RuleReport:
    """What became of one layout rule."""

    rule: LayoutRule
    variables: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions for one model, layout and mesh. What users hold of it prints and writes itself: ``readable_plan``.

    ``fingerprint`` identifies the model the plan was made for: its variables (path, shape, dtype) and
    layers, in order. ``inputs`` are the shapes and dtypes that one replica of the model was traced with, and
    ``guessed`` are the sizes among them that are guesses: what depends on sizes, memory and time, is that of these.
    ``collectives`` are those of one training step, in order of execution, and ``step`` is what else it takes of one
    rank. ``buckets`` are the keys of variables whose gradients are averaged over the batch axis together, in the
    order in which that begins. ``gatherings`` are what replicas store in parts and read together, in the order of
    reading; each gather is started when the one ``gathers_ahead`` places before it is needed. ``sums`` are those of
    variables that are used on shards of the residual stream: their gradients are added over the model axis together,
    when the backward pass ends. ``zero`` is what was asked to be in parts over the batch axis, whatever rules say: 1
    for an optimizer's slots, 3 for weights too, 0 for neither. ``device`` is the one whose kernels ``step`` counts;
    layers and collectives are the same on all.
    """

    model: str
    fingerprint: str
    mesh: Mesh
    axis: str
    inputs: tuple[tuple[Shape, str], ...]
    rules: tuple[RuleReport, ...]
    variables: tuple[VariablePlan, ...]
    layers: tuple[LayerPlan, ...]
    collectives: tuple[Collective, ...]
    step: Step
    input_gradients: bool  # whether gradients with respect to the model's inputs are right, not only its variables'
    notes: tuple[str, ...]
    buckets: tuple[tuple[str, ...], ...] = ()
    sequence_parallel: bool = False  # whether the residual stream was to be sharded
    sums: tuple[tuple[str, ...], ...] = ()
    device: DeviceType = "cpu"
    guessed: tuple[GuessedDim, ...] = ()
    gatherings: tuple[Gathering, ...] = ()
    gathers_ahead: int = 1
    zero: Zero = 0

    @property
    def shares_updates(self) -> bool:
        """Whether replicas share the update of any variable that each of them stores whole."""
        return any(each.slot_placement != WHOLE for each in self.variables)

    @property
    def shards_stream(self) -> bool:
        """Whether the residual stream is sharded anywhere."""
        return any(layer.where_stream_is_whole is not layer for layer in self.layers)

    @property
    def keeps_less(self) -> bool:
        """Whether layers leave out of what autograd keeps something that is made again in the backward pass."""
        return any(layer.keeps_less for layer in self.layers)

    @property
    def axis_size(self) -> int:
        """Number of ranks the layers are split over."""
        return self.mesh.axis_size(self.axis)

    @property
    def replicas(self) -> int:
        """Number of copies of the model, each of which sees its own share of the batch."""
        return self.mesh.replicas

    def check(self, recorded: Recording) -> None:
        """Compare the plan's collectives with those of a training step that ran, an update or a micro-step before it.

        Args:
            recorded: what ``tp_planner.record`` saw. The update is left out if it could not be simulated.

        Raises:
            ContractError: with the first difference, and the layer where it is.
            PlanError: for what is no recording.

        >>> with tp_planner.record(model) as recorder:  # doctest: +SKIP
        ...     model.train_on_batch(x, y)
        >>> plan.check(recorder.recording)  # doctest: +SKIP
        """
        if not isinstance(recorded, Recording):
            raise PlanError(f"expected a Recording, got {type(recorded).__name__}; give recorder.recording")
        planned, ran = self.collectives, recorded.collectives
        if not self.step.whole_update:
            planned = tuple(each for each in planned if each.phase != "update")
            ran = tuple(each for each in ran if each.phase != "update")
        if not recorded.updates:
            planned = tuple(each for each in planned if not each.once)
        unequal = {each.key for each in self.variables if not divides(each.shape, each.placement, self.axis_size)}
        unequal |= {each.place for each in self.gatherings if any(read.variable in unequal for read in each.reads)}
        check_contract(self.inputs, planned, Recording(recorded.inputs, ran), unequal)
