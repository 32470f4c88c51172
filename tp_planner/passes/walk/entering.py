"""Entering: whole tensors and variables that are read together with shards need a boundary, for their gradients.

Every rank has a summand of such a gradient. The sum is taken where the tensor enters: at an argument of the call, at
the torch functions that read it, or at the use of the variable.
"""

from __future__ import annotations

from collections import Counter

from tp_planner.ir.graph import ModelGraph
from tp_planner.ir.placement import WHOLE, Partial, SequencePartial
from tp_planner.passes.walk.crossings import entering
from tp_planner.passes.walk.facts import Origins, on_stream
from tp_planner.passes.walk.known import SAME_VALUES, Known
from tp_planner.passes.walk.notes import Meeting, Notes


def enter_tensors_read_with_shards(known: Known, notes: Notes, sources: Sources | None = None) -> None:
    """Place the boundaries of all that sharded ops read, and of variables that only other ops read.

    ``sources`` are those of the graph, for whoever asks about it more than once.
    """
    sources = Sources(known.graph) if sources is None else sources
    _use_what_is_handed_on(known, notes)
    for (call, tensor), meeting in notes.meetings.items():
        info = known.graph.tensors[tensor]
        if info.variable is not None and known.reader(call, info.variable) == call:
            _use_with_shards(call, tensor, info.variable, meeting.origins, known, notes)
        elif "float" in info.dtype:
            _enter(call, tensor, meeting, sources, known, notes)
    for call, tensor in notes.read_whole:
        variable = known.graph.tensors[tensor].variable
        is_read_here = variable is not None and known.reader(call, variable) == call
        if variable is not None and is_read_here and (call, tensor) not in notes.meetings:
            notes.use(call, variable, WHOLE, WHOLE)
    _use_shards(known, notes)


def _use_what_is_handed_on(known: Known, notes: Notes) -> None:
    """A variable that is handed to another call as it is, or returned, is gathered where it is read, and this is said.

    For those that take it, it is a whole tensor like any other.
    """
    for call, variable in known.handed_on:
        read = known.read_of(call, variable)
        if known.stored[variable] != WHOLE and read not in known.closings.reads:
            notes.conflict(call, Origins({("read", read)}), f"{read[0]!r} hands it on to other layers, or returns it")
        notes.use(call, variable, WHOLE, WHOLE)


def _use_with_shards(call: int, tensor: int, variable: str, origins: Origins, known: Known, notes: Notes) -> None:
    """A variable is read whole together with shards; one that is also read without has no one gradient."""
    if (call, tensor) in notes.read_whole or (call, variable) in known.handed_on:
        layer = known.graph.calls[call].layer
        reason = f"{layer!r} reads {variable!r} both with sharded and with whole tensors"
        notes.conflict(call, origins, reason, in_code=True)
    else:
        notes.use(call, variable, WHOLE, _summand(origins))


def _use_shards(known: Known, notes: Notes) -> None:
    """Write down the variables that ops read as shards."""
    for op in map(known.graph.ops.__getitem__, sorted(notes.followed)):
        for tensor in op.inputs:
            variable = known.graph.tensors[tensor].variable
            if variable is not None and (placement := known.placement(tensor, op.call)) != WHOLE:
                notes.reads[known.read_of(op.call, variable)] = placement
                notes.use(op.call, variable, placement, placement)


def _enter(call: int, tensor: int, meeting: Meeting, sources: Sources, known: Known, notes: Notes) -> None:
    """Let a whole tensor enter at the arguments of the call that reads it with shards, if it can."""
    info, source = known.graph.tensors[tensor], sources.made_from(call, tensor)
    positions = [] if call in known.parents else _positions_among_arguments(known.graph, call, source)
    read_whole = (call, tensor) in notes.read_whole
    if positions and not read_whole and not {tensor, source} & set(known.graph.calls[call].outputs):
        if "float" in known.graph.tensors[source].dtype:
            for position in positions:
                outside, summand = known.outside(source, call), _summand(meeting.origins)
                notes.cross(call, "input", position, source, entering(outside, summand))
    elif not info.requires_grad and tensor not in sources.from_inputs:
        return
    elif None not in meeting.at:
        _enter_functions(tensor, meeting, known, notes)
    elif info.requires_grad:
        layer = known.graph.calls[call].layer
        reason = f"a whole tensor meets a sharded one inside {layer!r}, where no boundary can stand"
        notes.conflict(call, meeting.origins, reason, in_code=True)
    else:
        notes.input_gradients = False


def _summand(origins: Origins) -> Partial:
    """Return what the gradient is of a tensor that meets these shards."""
    return SequencePartial() if on_stream(origins) else Partial()


def _positions_among_arguments(graph: ModelGraph, call: int, tensor: int) -> list[int]:
    return [position for position, given in graph.calls[call].inputs if given == tensor]


def _enter_functions(tensor: int, meeting: Meeting, known: Known, notes: Notes) -> None:
    for function in meeting.at:
        assert function is not None
        for position, given in function.inputs:
            if given == tensor:
                outside, summand = known.outside(tensor, function.call), _summand(meeting.origins)
                notes.cross_into(function, position, tensor, entering(outside, summand))


class Sources:
    """What tensors are made from."""

    def __init__(self, graph: ModelGraph) -> None:
        self.from_inputs = _float_tensors_from_inputs(graph)
        self._makers = {tensor: op for op in graph.ops for tensor in op.outputs}
        self._readers = Counter((op.call, tensor) for op in graph.ops for tensor in op.inputs)

    def made_from(self, call: int, tensor: int) -> int:
        """Return the tensor of which ``tensor`` is but another layout, made for it alone in the call's own code."""
        while (op := self._makers.get(tensor)) is not None and op.call == call and op.name in SAME_VALUES:
            if len(op.inputs) != 1 or self._readers[call, op.inputs[0]] != 1:
                break
            tensor = op.inputs[0]
        return tensor


def _float_tensors_from_inputs(graph: ModelGraph) -> set[int]:
    """Return the floating-point tensors that depend on the model's inputs through such tensors."""
    found = {tensor for tensor in graph.inputs if "float" in graph.tensors[tensor].dtype}
    for op in graph.ops:
        if any(tensor in found for tensor in op.inputs):
            found.update(tensor for tensor in op.outputs if "float" in graph.tensors[tensor].dtype)
    return found
