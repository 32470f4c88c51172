"""Packing: where code takes a sharded dim apart, the weights it comes from are stored in the parts that it makes.

A refused op says of which parts a dim would have to be. They are followed back, op by op, to the weights whose columns
or rows they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from tp_planner.ir.graph import REPEAT, ModelGraph, Op
from tp_planner.ir.placement import Placement, Shard, in_parts, parts_of
from tp_planner.passes.choose_styles import StyleChoice
from tp_planner.passes.follow_ops import Refused
from tp_planner.passes.packed_ops import CONCATENATION, first_viewed_dim, moved_dim, taken_apart
from tp_planner.passes.view_ops import VIEWS
from tp_planner.passes.walk.facts import Closings, LayerMode, Origins
from tp_planner.passes.walk.known import Known
from tp_planner.passes.walk.notes import Notes
from tp_planner.passes.walk.stream import gather_around

Parts = tuple[int, ...]
NOT_PACKED: tuple[Origins, str] = Origins(), ""


def stored_in_parts(
    stored: Mapping[str, Placement],
    styles: Mapping[LayerMode, StyleChoice],
    closings: Closings,
    graph: ModelGraph,
) -> Mapping[str, Placement]:
    """Return the placements of variables, in parts where walks have found them; all weights of a layer agree.

    A layer that is gathered for another reason is stored as the layout says.
    """
    if not closings.packed:
        return stored
    found = dict(stored)
    for (layer, variable), parts in closings.packed.items():
        closed = {name for name, _ in (*closings.layers, *closings.whole)}
        if layer in closed or (layer, variable) in closings.reads:
            continue
        found[variable] = in_parts(found[variable], parts)
        for (name, _), choice in styles.items():
            if name == layer and choice.is_contraction:
                found.update(weights_in_parts(choice, found, parts))
    for repeat in graph.repeats.values():
        found.update({own: in_parts(found[own], parts_of(found[twin])) for twin, own in repeat.variables})
    return found


def weights_in_parts(choice: StyleChoice, stored: Mapping[str, Placement], parts: Parts) -> dict[str, Placement]:
    """Return the weights of a contraction that have its sharded dim, in parts."""
    assert choice.contraction is not None and choice.label is not None
    return {
        key: in_parts(stored[key], parts)
        for key, labels in choice.contraction.weights
        if stored[key] == Shard(labels.find(choice.label))
    }


def parts_of_choice(choice: StyleChoice, stored: Mapping[str, Placement]) -> Parts:
    """Return the parts of which the sharded label of a contraction is."""
    assert choice.contraction is not None
    return parts_of(stored[choice.contraction.main_weight])


def note_refusal(
    refused: Refused, call: int, origins: Origins, reason: str, known: Known, notes: Notes, in_code: bool = True
) -> None:
    """Write down that an op is refused: a weight is to be stored in parts, or sharding ends where it comes from."""
    packed, why = Origins(), ""
    if refused.op is not None and _is_taken_apart(refused, refused.op, known):
        packed, why = pack_tensor(refused.tensor, refused.parts, refused.op.call, known)
    if packed:
        notes.conflict(call, packed, reason)
    else:
        ends = gather_around(call, _first_to_end(origins, known), known)
        notes.conflict(call, ends, f"{reason}; {why}" if why else reason, in_code)


def _first_to_end(origins: Origins, known: Known) -> Origins:
    """Return where sharding ends first: variables are gathered before what layers make is, which may go on then.

    Of variables vectors are first, whose shards alone may be what a matrix met.
    """
    reads = {origin: known.graph.variables[origin[1][1]].shape for origin in origins if origin[0] == "read"}
    if not reads or any(kind not in ("read", "layer") for kind, _ in origins):
        return origins
    return frozenset(origin for origin, shape in reads.items() if len(shape) < 2) or frozenset(reads)


def _is_taken_apart(refused: Refused, op: Op, known: Known) -> bool:
    """Whether code takes apart what an op refuses: of the dims that a view makes of one, it has to go on to do so.

    For heads are such dims, too, and those of keys may be fewer than the ranks.
    """
    placed, tensors = known.placement(refused.tensor, op.call), known.graph.tensors
    if op.name not in VIEWS or not isinstance(placed, Shard):
        return True
    dim = first_viewed_dim(op, tensors, placed.dim)
    ahead = [] if dim is None else [(op.outputs[0], dim)]
    for tensor, at in ahead:  # which grows
        for reader in known.graph.ops[op.id :]:
            if reader.inputs[:1] == (tensor,):
                if (apart := taken_apart(reader, tensors)) is not None and apart.dim == at:
                    return True
                if (moved := moved_dim(reader, at, len(tensors[tensor].shape))) is not None:
                    ahead.append((reader.outputs[0], moved))
    return False


def pack_tensor(tensor: int, parts: Parts, call: int, known: Known) -> tuple[Origins, str]:
    """Return which weight to store in parts, so that a tensor's sharded dim is these parts side by side.

    Nothing where no weight can; then comes with it, where it was found, why.
    """
    while parts:
        if (variable := known.graph.tensors[tensor].variable) is not None:
            return pack_weight(known.graph.calls[call].layer, variable, parts, known)
        op = known.makers.get(tensor)
        if op is None or op.name == REPEAT:
            return NOT_PACKED
        layer = known.graph.calls[op.call]
        if (choice := known.contraction(layer)) is not None:
            assert choice.contraction is not None
            is_output = tensor in layer.outputs
            return pack_weight(layer.layer, choice.contraction.main_weight, parts, known) if is_output else NOT_PACKED
        source = next((each for each in op.inputs if isinstance(known.placement(each, op.call), Shard)), tensor)
        parts = () if source == tensor else _in_source(op, tensor, source, parts, known)
        tensor, call = source, op.call
    return NOT_PACKED


def _in_source(op: Op, tensor: int, source: int, parts: Parts, known: Known) -> Parts:
    """Return the parts of the sharded dim of what an op takes, from those of what it makes; nothing if unknown."""
    tensors, placed = known.graph.tensors, known.placement(source, op.call)
    assert isinstance(placed, Shard)
    length, made = tensors[source].shape[placed.dim], sum(parts)
    apart = taken_apart(op, tensors)
    if apart is not None and apart.dim == placed.dim:
        first, after = apart.spans[op.outputs.index(tensor)]
        return tuple(part for part in (first, *parts, length - after) if part)
    if any(part * length % made for part in parts) or (op.name == CONCATENATION and length != made):
        return ()
    return tuple(part * length // made for part in parts)


def pack_weight(layer: str, variable: str, parts: Parts, known: Known) -> tuple[Origins, str]:
    """Return that a weight is to be stored in parts, if it is this layer's alone and every rank has its own of each."""
    stored = known.stored[variable]
    ends = sorted({*accumulate(parts), *accumulate(parts_of(stored))})
    fine = tuple(after - before for before, after in zip([0, *ends], ends, strict=False))
    if not isinstance(stored, Shard) or known.graph.variables[variable].shape[stored.dim] != sum(parts):
        return NOT_PACKED
    if fine == parts_of(stored) or variable in known.passed_on or known.readers_of(variable) != {layer}:
        return NOT_PACKED
    if sum(variable in dict(each.weights) for _, each in known.graph.layers[layer].contractions) > 1:
        return NOT_PACKED
    if any(part % known.parts for part in fine):
        return Origins(), f"its parts of {_listed(fine)} do not each divide by {known.parts}"
    return frozenset({("packed", (layer, variable, fine))}), ""


def _listed(parts: Parts) -> str:
    return f"{', '.join(map(str, parts[:-1]))} and {parts[-1]}"
