"""Gather together: which variables that replicas store in parts are put together in one collective.

A block is a unit: what its call reads travels at once, and so do the gradients. Blocks are layers of which the model
has several, of one class, with layers inside. Of the layers in no block those that follow each other are a unit as
long as that takes no more memory than the largest unit does alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import NamedTuple

from tp_planner.ir.graph import REPEAT, ModelGraph, Op
from tp_planner.ir.placement import Shard, local_shape
from tp_planner.ir.plan import Gathering, PartRead, VariablePlan
from tp_planner.passes.bucket_gradients import BUCKET_BYTES

_TOWER = 3, 4  # a block is a tower of blocks, and no unit, if more than this share of it is in several of one kind
_CONTAINERS = {"Functional", "Sequential", "Model"}  # classes that say nothing of what is inside
_Use = tuple[str, str]  # a layer, and the variable that it reads


@dataclass(frozen=True, slots=True)
class _Reading:
    """A variable in parts that is read in one call of a layer, ``bytes`` long as it travels.

    ``calls`` are the layer's call, in those that repeat the block it is in; ``around`` that layer and those it is in,
    innermost first.
    """

    calls: tuple[int, ...]
    around: tuple[str, ...]
    mode: str
    read: PartRead
    bytes: int

    @property
    def use(self) -> _Use:
        return self.read.layer, self.read.variable


class _Unit(NamedTuple):
    name: str
    is_block: bool
    readings: list[_Reading]

    @property
    def bytes(self) -> int:
        return sum(reading.bytes for reading in self.readings)


def gather_together(graph: ModelGraph, variables: Sequence[VariablePlan], ranks: int) -> tuple[Gathering, ...]:
    """Return what is gathered over the batch axis together, in the order in which a training step reads it first.

    Args:
        graph: the trace of a training call.
        variables: the plan's.
        ranks: the size of the model axis.
    """
    in_parts = {each.key: each for each in variables if isinstance(each.batch_placement, Shard)}
    readings = [
        replace(each, around=tuple(layer for layer in each.around if not graph.layers[layer].is_stretch))
        for each in _readings(graph, in_parts, ranks)
    ]
    times = Counter(reading.use for reading in readings)
    kinds = _kinds(graph, readings, in_parts)
    units = _units(readings, kinds)
    limit = min(BUCKET_BYTES, max((unit.bytes for unit in units), default=0))
    found: list[Gathering] = []
    for unit in _joined(units, times, limit):
        often = min(times[each.use] for each in unit.readings)
        together = [each.read for each in unit.readings if times[each.use] == often]
        found.append(Gathering(unit.name, tuple(together), often == 1))
        # What is read more often than the rest would take all of it along each time.
        found += [
            Gathering(read.layer, (read,), False) for each in unit.readings if (read := each.read) not in together
        ]
    return tuple(found)


def crossed_blocks(graph: ModelGraph, gatherings: Sequence[Gathering]) -> set[str]:
    """Return the blocks that repeat another, and of which something is gathered together with what lies outside."""
    crossed: set[str] = set()
    for repeat in graph.repeats.values():
        inside = {key for twin, key in repeat.variables if key != twin}
        reads = ({read.variable for read in each.reads} for each in gatherings)
        if any(together & inside and together - inside for together in reads):
            crossed.add(graph.calls[repeat.call].layer)
    return crossed


# --- what is read, in order ----------------------------------------------------------------------------


def _readings(graph: ModelGraph, in_parts: Mapping[str, VariablePlan], ranks: int) -> list[_Reading]:
    found: dict[tuple[tuple[int, ...], str], _Reading] = {}  # each once for a layer's call
    inside: dict[int, list[_Reading]] = {repeat.twin: [] for repeat in graph.repeats.values()}
    for op in graph.ops:
        new = list(
            _readings_again(graph, op, inside) if op.name == REPEAT else _readings_of(graph, op, in_parts, ranks)
        )
        for reading in new:
            key = reading.calls, reading.read.variable
            if key in found and found[key].read.dtype != reading.read.dtype:  # in two dtypes: as it is stored
                reading = _as_stored(found[key], in_parts[reading.read.variable], ranks)
            found[key] = reading
        for call in graph.enclosing(op.call):
            if call.id in inside:
                inside[call.id] += new
    return list(found.values())


def _readings_of(graph: ModelGraph, op: Op, in_parts: Mapping[str, VariablePlan], ranks: int) -> list[_Reading]:
    call, found = graph.calls[op.call], []
    around = tuple(each.layer for each in graph.enclosing(op.call))
    for tensor in dict.fromkeys(op.inputs):
        info = graph.tensors[tensor]
        variable = in_parts.get(info.variable or "")
        if variable is not None:
            # The first op on a variable that a layer reads in the dtype it computes in is a cast to that.
            read = graph.tensors[op.outputs[0]] if op.name.startswith("aten._to_copy.") else info
            length = math.prod(_in_replica(variable, ranks)) * read.itemsize
            part = PartRead(call.layer, variable.key, read.dtype)
            found.append(_Reading((call.id,), around, call.mode, part, length))
    return found


def _readings_again(graph: ModelGraph, op: Op, inside: Mapping[int, list[_Reading]]) -> list[_Reading]:
    repeat, found = graph.repeats[op.call], []
    layers, variables = dict(repeat.layers), dict(repeat.variables)
    outside = tuple(each.layer for each in graph.enclosing(op.call))  # the repeated block is the first
    twin = graph.calls[repeat.twin].layer
    for each in inside[repeat.twin]:
        read = each.read
        again = PartRead(layers.get(read.layer, read.layer), variables.get(read.variable, read.variable), read.dtype)
        within = each.around[: each.around.index(twin)] if twin in each.around else ()
        around = (*(layers.get(layer, layer) for layer in within), *outside)
        found.append(replace(each, calls=(op.call, *each.calls), around=around, read=again))
    return found


def _as_stored(reading: _Reading, variable: VariablePlan, ranks: int) -> _Reading:
    length = math.prod(_in_replica(variable, ranks)) * variable.itemsize
    return replace(reading, read=replace(reading.read, dtype=variable.dtype), bytes=length)


def _in_replica(variable: VariablePlan, ranks: int) -> tuple[int, ...]:
    return local_shape(variable.shape, variable.placement, ranks)


def _kinds(
    graph: ModelGraph, readings: Sequence[_Reading], in_parts: Mapping[str, VariablePlan]
) -> dict[str, Hashable]:
    """Return of which kind each layer is: its class, and for containers what the layers inside are and read."""
    inside: dict[str, dict[_Use, Hashable]] = {}
    for each in readings:
        kind = graph.layers[each.read.layer].class_name, in_parts[each.read.variable].shape
        for layer in each.around[1:]:
            if graph.layers[layer].class_name in _CONTAINERS:
                inside.setdefault(layer, {})[each.use] = kind
    return {
        name: (layer.class_name, *inside[name].values()) if name in inside else layer.class_name
        for name, layer in graph.layers.items()
    }


# --- units ---------------------------------------------------------------------------------------------


def _units(readings: Sequence[_Reading], kinds: Mapping[str, Hashable]) -> list[_Unit]:
    """Return the blocks and, outside of them, the layers that read parts, in order; each use is in one unit."""
    blocks = _kinds_of_blocks(readings, kinds)
    units: dict[_Use, _Unit] = {}
    first: dict[_Use, _Reading] = {}
    for each in readings:  # a layer may read a variable in two modes
        first.setdefault(each.use, each)
    for each in first.values():
        block = next((layer for layer in each.around if kinds[layer] in blocks), None)
        key = (each.read.layer, each.mode) if block is None else (block, "")
        units.setdefault(key, _Unit(key[0], block is not None, [])).readings.append(each)
    return list(units.values())


def _kinds_of_blocks(readings: Sequence[_Reading], kinds: Mapping[str, Hashable]) -> set[Hashable]:
    """Return the kinds of layers that are units wherever they are: the outermost repeated ones that are no towers."""
    inside: dict[str, dict[_Use, _Reading]] = {}  # by layer with layers inside
    for each in readings:
        for layer in each.around[1:]:
            inside.setdefault(layer, {})
    for each in readings:
        for layer in inside.keys() & set(each.around):
            inside[layer][each.use] = each
    counts = Counter(kinds[layer] for layer in inside)
    towers = {layer for layer, within in inside.items() if _is_tower(layer, within.values(), kinds, inside.keys())}
    blocks: set[Hashable] = set()
    for each in readings:
        units = [layer for layer in each.around if counts[kinds[layer]] > 1 and layer in inside.keys() - towers]
        blocks.update(kinds[layer] for layer in units[-1:])
    return blocks


def _is_tower(block: str, readings: Collection[_Reading], kinds: Mapping[str, Hashable], composite: Set[str]) -> bool:
    """Whether most of a block lies in several layers of one kind, with layers inside."""
    layers: dict[Hashable, set[str]] = {}
    sizes: Counter[Hashable] = Counter()
    for each in readings:
        for layer in composite & set(each.around[: each.around.index(block)]):
            layers.setdefault(kinds[layer], set()).add(layer)
            sizes[kinds[layer]] += each.bytes
    share, of = _TOWER
    whole = sum(each.bytes for each in readings)
    return any(len(layers[kind]) > 1 and size * of > whole * share for kind, size in sizes.items())


def _joined(units: Sequence[_Unit], times: Mapping[_Use, int], limit: int) -> Iterator[_Unit]:
    """Yield the units, those joined that follow each other, are no blocks, and are read once.

    They are in one layer, and take up to ``limit`` bytes.
    """
    run: _Unit | None = None
    for unit in units:
        can_join = not unit.is_block and all(times[each.use] == 1 for each in unit.readings)
        if run and can_join and run.bytes + unit.bytes <= limit and _around(run) == _around(unit):
            run.readings.extend(unit.readings)
            continue
        if run:
            yield run
        run = unit if can_join else None
        if not can_join:
            yield unit
    if run:
        yield run


def _around(unit: _Unit) -> tuple[str, ...]:
    return unit.readings[0].around[1:]
