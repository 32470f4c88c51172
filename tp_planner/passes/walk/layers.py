"""Layers that the walk takes for one step: a contraction, which begins or ends a region, and dropout inside of one."""

from __future__ import annotations

from tp_planner.ir.graph import Call, TensorInfo
from tp_planner.ir.placement import (
    WHOLE,
    Partial,
    Placement,
    SequencePartial,
    SequenceShard,
    Shard,
    divides,
    in_parts,
    parts_of,
)
from tp_planner.passes.choose_styles import StyleChoice, input_placement, output_dim, weight_uses
from tp_planner.passes.follow_ops import Refused
from tp_planner.passes.walk.crossings import cut, entering, gathered, summed
from tp_planner.passes.walk.facts import CallRecord, Origin
from tp_planner.passes.walk.known import Known
from tp_planner.passes.walk.notes import Notes
from tp_planner.passes.walk.packing import pack_tensor, pack_weight, parts_of_choice

ShardedInputs = tuple[tuple[int, Placement], ...]


def follow_dropout(call: Call, known: Known, notes: Notes) -> None:
    """Follow dropout: shards stay shards, for each rank draws the mask of the whole tensor and cuts it alike."""
    (position, tensor), output = call.inputs[0], call.outputs[0]
    placement = known.placement(tensor, call.id)
    if placement == WHOLE:
        return
    origins = known.origins_of([tensor], call.id)
    if not isinstance(placement, Shard):
        notes.conflict(call.id, origins, f"dropout {call.layer!r} cannot cut its mask as {placement}")
        return
    known.place(output, placement, origins)
    order = _memory_order(known.graph.tensors[tensor])
    reason = "the mask is drawn whole on every rank and cut"
    notes.record(CallRecord(call.id, ((position, placement),), placement, reason=reason, dropout_order=order))


def _memory_order(info: TensorInfo) -> tuple[int, ...]:
    """Return the dims of a tensor from the outermost in memory to the innermost."""
    return tuple(sorted(range(len(info.shape)), key=lambda dim: (-info.stride[dim], dim)))


def follow_contraction(call: Call, choice: StyleChoice, known: Known, notes: Notes) -> None:
    """Follow a contraction: its input as its style takes it, its weights, and an output that is shards or a sum."""
    sharded_inputs, parts = _take_input(call, choice, known, notes), parts_of_choice(choice, known.stored)
    core = call.outputs[0] if call.core_output is None else call.core_output
    dim = output_dim(choice, len(known.graph.tensors[core].shape))
    outside = _outside_of_sum(call, core, known) if dim is None else WHOLE
    assert choice.contraction is not None
    for key, use in weight_uses(choice).items():
        placement = in_parts(use.placement, parts)
        gradient: Placement = Partial() if use.gradient_is_partial else placement
        if outside != WHOLE and key == choice.contraction.bias:  # it is added to shards of the sequence
            gradient = SequencePartial()
        notes.use(call.id, key, placement, gradient)
    if dim is None:
        notes.cross(call.id, "output", 0, core, summed(outside))
        notes.record(_record_of_sum(call, choice, outside, sharded_inputs))
        if outside != WHOLE:
            known.place(call.outputs[0], outside, frozenset({("stream", (call.layer, call.mode))}))
    else:
        notes.record(_shard_output(call, choice, core, in_parts(Shard(dim), parts), sharded_inputs, known, notes))


def _take_input(call: Call, choice: StyleChoice, known: Known, notes: Notes) -> ShardedInputs:
    """Place the boundary at the input that the style needs; return the input if it arrives as the shards it takes."""
    position, tensor = call.inputs[0]
    info, outside = known.graph.tensors[tensor], known.outside(tensor, call.id)
    parts = parts_of_choice(choice, known.stored)
    arrives, wanted = known.placement(tensor, call.id), in_parts(input_placement(choice, len(info.shape)), parts)
    if arrives == wanted != WHOLE:
        return ((position, arrives),)
    if arrives != outside:
        reason = f"layer {call.layer!r} takes it as {wanted}, it arrives as {arrives}"
        packed = _take_parts(call, choice, arrives, parts, known)
        notes.conflict(call.id, packed or known.origins_of([tensor], call.id), reason)
    elif wanted != WHOLE and divides(info.shape, wanted, known.parts):
        notes.cross(call.id, "input", position, tensor, cut(outside, wanted))
    elif wanted == WHOLE and "float" in info.dtype:
        notes.cross(call.id, "input", position, tensor, entering(outside))
    return ()


def _take_parts(
    call: Call, choice: StyleChoice, arrives: Placement, parts: tuple[int, ...], known: Known
) -> frozenset[Origin]:
    """Return what to store in parts, so that a layer takes its input in the parts in which it arrives."""
    assert choice.contraction is not None
    main, tensor = choice.contraction.main_weight, call.inputs[0][1]
    packed, _ = pack_weight(call.layer, main, parts_of(arrives), known)
    return packed or pack_tensor(tensor, parts, call.id, known)[0]


def _outside_of_sum(call: Call, core: int, known: Known) -> Placement:
    """Return what the sum that a layer makes becomes: a shard of the stream, if its activation can run on that."""
    outside = known.outside_of_sum(core, call)
    if not isinstance(outside, SequenceShard):
        return WHOLE
    final = _after_activation(call, core, Shard(outside.dim), known)
    return outside if final == Shard(outside.dim) else WHOLE


def _record_of_sum(call: Call, choice: StyleChoice, outside: Placement, sharded_inputs: ShardedInputs) -> CallRecord:
    assert choice.contraction is not None
    after = choice.contraction.bias is not None or choice.contraction.has_activation
    return CallRecord(call.id, sharded_inputs, outside, "bias+activation" if after else "", choice.reason)


def _shard_output(
    call: Call,
    choice: StyleChoice,
    core: int,
    placement: Placement,
    sharded_inputs: ShardedInputs,
    known: Known,
    notes: Notes,
) -> CallRecord:
    """Let a region begin at the output, or place the boundary that gathers it; return how the call is computed."""
    output, outside = call.outputs[0], WHOLE
    origin: Origin = ("layer", (call.layer, call.mode))
    closing = known.closings.layers.get((call.layer, call.mode))
    final = _after_activation(call, core, placement, known)
    if isinstance(final, Refused):
        notes.cross(call.id, "output", 0, core, gathered(placement, outside))
        reason = f"{choice.reason}; gathered before its activation: {final.reason}"
        return CallRecord(call.id, sharded_inputs, outside, "activation", reason)
    if closing is not None or not isinstance(final, Shard):
        notes.cross(call.id, "output", 0, output, gathered(placement, outside))
        return CallRecord(call.id, sharded_inputs, outside, "", f"{choice.reason}; gathered: {closing}")
    known.place(output, final, frozenset({origin}))
    return CallRecord(call.id, sharded_inputs, final, "", choice.reason)


def _after_activation(call: Call, core: int, placement: Placement, known: Known) -> Placement | Refused:
    """Return the placement after the layer's own activation, or why that cannot run on shards."""
    if call.core_output is None:
        return placement
    states: dict[int, Placement] = {core: placement}
    for op in known.graph.ops[call.ops[0] : call.ops[1]]:
        if any(tensor in states for tensor in op.inputs):
            followed = known.follow(op, {tensor: states.get(tensor, WHOLE) for tensor in op.inputs})
            if isinstance(followed, Refused):
                return Refused(f"{op.name} {followed.reason}")
            states.update(zip(op.outputs, followed.outputs, strict=True))
    return states[call.outputs[0]]
