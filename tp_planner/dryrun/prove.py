"""Prove: run the planned model on fake shards and compare it, op by op, with what the plan assumes.

Inside a region layers compute on plain local shards. That is right only where the model's own code does on a
shard what DTensor would do: a reshape to a fixed number of heads, say, does not. So the applied model is run
once more on fake tensors, and every op between the layers has to be the traced one: same op, same layer, same
constants (those DTensor would use), outputs of the shape the placement says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import torch
from torch.utils._pytree import tree_flatten

from tp_planner.frontend.functions import FunctionRecorder
from tp_planner.frontend.inputs import CallArguments, fake_inputs
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.frontend.recorder import Recorder
from tp_planner.frontend.trace import fake_tensors, run_recorded
from tp_planner.ir.errors import in_one_line
from tp_planner.ir.graph import FunctionCall, ModelGraph, Op, TensorInfo, TensorRef
from tp_planner.ir.placement import Placement, Replicate, SequenceShard, Shape, Shard, divides, local_shape
from tp_planner.ir.plan import Plan
from tp_planner.job.axes import Axes
from tp_planner.layers.apply import applied_for_simulation
from tp_planner.passes.walk.facts import Conflict, Origin, Origins, Walk
from tp_planner.passes.walk.stream import or_gathered
from tp_planner.patches import replaced
from tp_planner.regions.calls import running

# Ops that change no value. What a chain of them does is determined by the shapes at its ends, which are compared.
LAYOUT_OPS = {
    f"aten.{name}.default" for name in ("alias", "clone", "contiguous", "detach", "reshape", "view", "_unsafe_view")
}
# Torch functions that mean the same whatever the sizes, but take other ops where a dim is 1: compared as one op each.
# So do functions in place, which make the views anew that they write through.
SIZELESS = {"einsum", "matmul", "__matmul__", "tensordot", "add_", "sub_", "mul_", "div_", "__iadd__", "__isub__"}
SIZELESS |= {"__imul__", "__itruediv__", "masked_fill_"}
NOT_COMPARED = (torch.device, torch.Generator)  # constants that say nothing of shapes and values
# Ops whose constants are the shape of their output.
SHAPED_OPS = {"aten.expand.default"}


def prove(
    model: keras.Model, inputs: Any, plan: Plan, graphs: Sequence[ModelGraph], walks: Sequence[Walk], axes: Axes
) -> list[Conflict]:
    """Return where computing on local shards would not be what the plan assumes; nothing if it is proven.

    Args:
        model: the plain model; it is as before afterwards.
        inputs: as for ``trace``.
        plan: the plan to prove.
        graphs: the traces the plan was made from.
        walks: the placements found on them.
        axes: those of a mesh of the planned size, fake or real.
    """
    with fake_tensors():
        arguments = fake_inputs(model, inputs)
        # Made before the variables are fake: a torch module inside the model reads its own parameters.
        recorders = [Recorder(model, repeats=graph.repeats, left_out=graph.repeated_layers) for graph in graphs]
        with applied_for_simulation(model, plan, axes, repeated_layers(graphs)):
            for graph, walk, recorder in zip(graphs, walks, recorders, strict=True):
                recorder.know(named_variables(model))
                conflicts = _compare_run(model, arguments, graph, walk, recorder, axes.model.size)
                if conflicts:  # most of those of other graphs are the same, and go with these
                    return conflicts
    return []


def repeated_layers(graphs: Sequence[ModelGraph]) -> frozenset[str]:
    """Return the layers that no graph has run."""
    return frozenset.intersection(*(graph.repeated_layers for graph in graphs))


def _compare_run(
    model: keras.Model, arguments: CallArguments, graph: ModelGraph, walk: Walk, recorder: Recorder, parts: int
) -> list[Conflict]:
    failure: Exception | None = None
    functions = None if graph.functions is None else FunctionRecorder(recorder)
    paused = replaced(running, "converting", recorder.paused, "what boundaries do is not the layers' own")
    try:
        with functions or contextlib.nullcontext(), paused:
            run_recorded(model, arguments, recorder, graph.training)
    except Exception as error:  # the model's own code may raise anything on shapes it does not expect
        failure = error
    if functions is not None and (read := _sizes_read(graph, walk, functions.functions, parts)):
        reason = "its code reads sizes of shards of the sequence, and is given those of the whole"
        return [Conflict(origin[1][0], frozenset({origin}), reason) for origin in sorted(read)]
    traced = _steps(graph.ops, graph.functions or ())
    assumed = [op for op in traced if op.id not in walk.skipped_ops and _is_compared(op, graph.tensors)]
    skipped = _spans(graph, walk)
    steps = _steps(recorder.ops, functions.functions if functions else ())
    between = [op for op in steps if _is_compared(op, recorder.tensors)]
    ran = [op for op in between if (recorder.calls[op.call].layer, recorder.calls[op.call].mode) not in skipped]
    cast, position = _cast_at_boundaries(graph, walk), 0
    for op in assumed:
        difference = (
            _failure(failure) if position >= len(ran) else _difference(op, ran[position], graph, recorder, walk, parts)
        )
        if not difference:
            position += 1
        elif op.id not in cast:
            layer, fails = graph.calls[op.call].layer, position >= len(ran) and failure is not None
            starts = [*_stuck(graph, recorder), op.call] if fails else [op.call]
            starts += _viewing(graph, [*op.inputs, *_taken(graph, starts)])
            culprits = _sizes_in_code(graph, walk, starts, parts) or _culprits(graph, walk, op)
            return [Conflict(layer, culprits, f"{op.name} in {layer!r} {difference}", in_code=True)]
    if failure is None and len(ran) > position:
        more = ran[position]
        layer = recorder.calls[more.call].layer
        call = next(call.id for call in graph.calls.values() if call.layer == layer)
        reason = f"{more.name} in {layer!r} runs on local shards only"
        return [Conflict(layer, _sharded_inside(graph, walk, call), reason, in_code=True)]
    if failure is not None:
        stuck = _stuck(graph, recorder)
        starts = [*stuck, *_viewing(graph, _taken(graph, stuck))]
        culprits = _sizes_in_code(graph, walk, starts, parts) or _sharded_inside(graph, walk, stuck[0])
        return [
            Conflict(
                recorder.running_layer, culprits, f"layer {recorder.running_layer!r} {_failure(failure)}", in_code=True
            )
        ]
    return _compare_calls(graph, recorder, walk, parts)


def _sizes_read(graph: ModelGraph, walk: Walk, ran: Sequence[FunctionCall], parts: int) -> Origins:
    """Return the arguments of functions making whole tensors that were sizes of shards, and should be of the whole."""
    lengths = {
        graph.tensors[tensor].shape[placement.dim]
        for tensor, placement in walk.placements.items()
        if isinstance(placement, SequenceShard)
    }
    known = {(function.call, function.name, function.number): function for function in ran}
    sharded_lengths: dict[int, set[int]] = {}  # of dims that regions shard, by call whose own code reads them
    for op in graph.ops:
        for tensor in op.inputs:
            placement = walk.placements.get(tensor)
            if isinstance(placement, Shard) and not isinstance(placement, SequenceShard):
                sharded_lengths.setdefault(op.call, set()).add(graph.tensors[tensor].shape[placement.dim])
    found: set[Origin] = set()
    for function in graph.functions or ():
        other = known.get((function.call, function.name, function.number))
        ends = (*(tensor for _, tensor in function.inputs), *function.outputs)
        if other is None or any(tensor in walk.placements for tensor in ends):
            continue
        on_sequence = lengths - sharded_lengths.get(function.call, set())
        call, read = graph.calls[function.call], dict(other.constants)
        for position, size in function.constants:
            if size in on_sequence and type(read.get(position)) is int and read[position] * parts == size:
                found.add(("scale", (call.layer, call.mode, function.name, function.number, position)))
    return frozenset(found)


def _steps(ops: Sequence[Op], functions: Sequence[FunctionCall]) -> list[Op]:
    """Return the ops with one in place of all ops of each function that is compared as a whole."""
    steps, done = [], 0
    for function in functions:
        if function.name in SIZELESS:
            first, after = function.ops
            inputs = tuple(tensor for _, tensor in function.inputs)
            constants = tuple(value for _, value in function.constants)
            one = Op(first, function.name, function.call, (constants, {}), inputs, function.outputs, random=False)
            steps += [*ops[done:first], one]
            done = after
    return [*steps, *ops[done:]]


def _cast_at_boundaries(graph: ModelGraph, walk: Walk) -> set[int]:
    """Return the ops that cast a variable where it is gathered: shards are cast before they are sent."""
    gathered = {
        (placed.call, placed.variable)
        for placed in walk.boundaries
        if placed.place == "variable" and not placed.boundary.is_identity
    }
    casts = (op for op in graph.ops if op.name == "aten._to_copy.default")
    return {op.id for op in casts if (op.call, graph.tensors[op.inputs[0]].variable) in gathered}


def _is_compared(op: Op, tensors: Mapping[int, TensorInfo]) -> bool:
    """Whether an op computes: neither a change of layout, nor the assignment of a variable, which takes any shard.

    What is computed of a few whole numbers alone, sizes it may be, is compared where another op reads it.
    """
    assigns = op.name == "aten.copy_.default" and tensors[op.inputs[0]].variable is not None
    return op.name not in LAYOUT_OPS and not assigns and not op.is_constant


def _compare_calls(graph: ModelGraph, recorder: Recorder, walk: Walk, parts: int) -> list[Conflict]:
    """Compare what every call took and returned; this sees reshapes that no other op follows."""
    if len(graph.calls) != len(recorder.calls):
        everything = frozenset().union(*walk.origins.values())
        return [Conflict("", everything, "the model calls other layers on local shards", in_code=True)]
    for call, ran in zip(graph.calls.values(), recorder.calls.values(), strict=True):
        whole = (*(tensor for _, tensor in call.inputs), *call.outputs)
        local = (*(tensor for _, tensor in ran.inputs), *ran.outputs)
        for number, found in zip(whole, local, strict=True):
            shape = recorder.tensors[found].shape
            expected = _expected_shape(graph, walk, number, call.id, parts, walk.taken.get((call.id, number)))
            if shape != expected:
                reason = f"layer {call.layer!r} takes or returns shape {shape} on local shards, not {expected}"
                culprits = _sizes_in_code(graph, walk, [call.id], parts) or _sharded_inside(graph, walk, call.id)
                return [Conflict(call.layer, culprits, reason, in_code=True)]
    return []


def _spans(graph: ModelGraph, walk: Walk) -> set[tuple[str, str]]:
    """Return the (layer, mode) whose ops the walk took for one: contractions, and dropout."""
    calls = {graph.ops[op].call for op in walk.skipped_ops}
    return {(graph.calls[call].layer, graph.calls[call].mode) for call in calls}


def _failure(error: Exception | None) -> str:
    if error is None:
        return "does not run on local shards"
    return f"fails on local shards ({in_one_line(error)[:160]})"


def _difference(op: Op, ran: Op, graph: ModelGraph, recorder: Recorder, walk: Walk, parts: int) -> str | None:
    """Return in what ``ran``, the op on local shards, is not what ``op`` stands for on whole tensors."""
    if op.name != ran.name or graph.calls[op.call].layer != recorder.calls[ran.call].layer:
        return f"becomes {ran.name} on local shards"
    for whole, local in zip((*op.inputs, *op.outputs), (*ran.inputs, *ran.outputs), strict=True):
        found = recorder.tensors[local].shape
        if graph.tensors[whole].dtype != recorder.tensors[local].dtype:
            return f"works on {recorder.tensors[local].dtype} on local shards, not {graph.tensors[whole].dtype}"
        expected = _expected_shape(graph, walk, whole, op.call, parts, walk.cut_for.get((op.id, whole)))
        if found != expected:
            return f"works on shape {found} on local shards, not {expected}"
    if op.constants != ran.constants:
        return f"reads the constants {ran.constants} on local shards, not {op.constants}"
    if op.name in SHAPED_OPS:
        return None
    followed = None if op.name in SIZELESS else walk.followed.get(op.id)
    constants = followed.arguments if followed else _constants(op)
    if not _equal(constants, _constants(ran)):
        return f"takes {_constants(ran)} on local shards, not {constants}"
    return None


def _expected_shape(
    graph: ModelGraph, walk: Walk, tensor: int, call: int, parts: int, cut: Placement | None = None
) -> Shape:
    info = graph.tensors[tensor]
    placement = cut or walk.placements.get(tensor, Replicate())
    if info.variable is not None and cut is None:
        placement = walk.reads.get((graph.calls[call].layer, info.variable), Replicate())
    return local_shape(info.shape, placement, parts)


def _constants(op: Op) -> tuple[Any, ...]:
    return tuple(leaf for leaf in tree_flatten(op.arguments)[0] if not isinstance(leaf, TensorRef))


def _equal(expected: tuple[Any, ...], found: tuple[Any, ...]) -> bool:
    if len(expected) != len(found):
        return False
    return all(
        left == right or any(isinstance(left, kind) and isinstance(right, kind) for kind in NOT_COMPARED)
        for left, right in zip(expected, found, strict=True)
    )


def _stuck(graph: ModelGraph, recorder: Recorder) -> list[int]:
    """Return the first call of the layer in which the model failed."""
    return [next(call.id for call in graph.calls.values() if call.layer == recorder.running_layer)]


def _taken(graph: ModelGraph, calls: Sequence[int]) -> list[int]:
    return [tensor for call in calls for _, tensor in graph.calls[call].inputs]


def _viewing(graph: ModelGraph, read: Sequence[int]) -> list[int]:
    """Return the calls whose code changed the layout of what is read: no comparison has seen in what way."""
    makers = {tensor: op for op in graph.ops for tensor in op.outputs}
    calls: dict[int, None] = {}
    ahead = list(dict.fromkeys(read))
    for tensor in ahead:  # which grows
        maker = makers.get(tensor)
        if maker is not None and maker.name in LAYOUT_OPS:
            calls[maker.call] = None
            ahead += [each for each in maker.inputs if each not in ahead]
    return list(calls)


def _sizes_in_code(graph: ModelGraph, walk: Walk, starts: Sequence[int], parts: int) -> Origins:
    """Return what sizes can be changed in the code around one of the calls: those that it writes, or that it reads."""
    return _writing_sizes(graph, walk, starts) or _reading_sizes(graph, walk, starts, parts)


def _reading_sizes(graph: ModelGraph, walk: Walk, starts: Sequence[int], parts: int) -> Origins:
    """Return a layer among those called that takes shards of a region, and does not see the whole's sizes yet."""
    parents = {call.parent for call in graph.calls.values()}
    for call in (graph.calls[start] for start in starts):
        given = [(graph.tensors[tensor].shape, walk.placements.get(tensor)) for _, tensor in call.inputs]
        record = walk.records.get(call.id)
        is_step = call.ops[0] in walk.skipped_ops or (record is not None and record.sees_whole)
        if not is_step and call.id not in parents and any(_is_equal_part(*each, parts) for each in given):
            return frozenset({("sees", (call.layer, call.mode))})
    return frozenset()


def _is_equal_part(shape: Shape, placement: Placement | None, parts: int) -> bool:
    """Whether a tensor arrives as shards of a region, of which ranks hold equal ones."""
    return (
        isinstance(placement, Shard) and not isinstance(placement, SequenceShard) and divides(shape, placement, parts)
    )


def _writing_sizes(graph: ModelGraph, walk: Walk, starts: Sequence[int]) -> Origins:
    """Return the innermost layer around one of the calls whose code writes sizes of whole tensors."""
    for start in starts:
        for call in graph.enclosing(start):
            if (call.layer, call.mode) in walk.writes_sizes:
                return frozenset({("sizes", (call.layer, call.mode))})
    return frozenset()


def _culprits(graph: ModelGraph, walk: Walk, op: Op) -> Origins:
    """Return the origins of the shards that ``op`` reads; where it reads none, of all in its enclosing calls."""
    found = frozenset().union(*(walk.origins.get(tensor, frozenset()) for tensor in op.inputs))
    if found:
        return or_gathered(found, graph, walk, op.call)
    return _sharded_inside(graph, walk, op.call)


def _sharded_inside(graph: ModelGraph, walk: Walk, start: int) -> Origins:
    """Return the origins of all shards in the innermost call around ``start`` that has any."""
    for call in graph.enclosing(start):
        inside = graph.ops[call.ops[0] : call.ops[1]]
        tensors = [tensor for other in inside for tensor in (*other.inputs, *other.outputs)]
        tensors += [tensor for _, tensor in call.inputs]
        found = frozenset().union(*(walk.origins.get(tensor, frozenset()) for tensor in tensors))
        if found:
            return or_gathered(found, graph, walk, start)
    return frozenset().union(*walk.origins.values())
