"""Stretches: equal parts of a Functional model that are no layers, and are blocks of it while it is planned.

A model of a thousand Dense layers in a row repeats itself as one of a thousand blocks does, though no layer holds what
is repeated. Where a single tensor is all that goes on, such a model can be cut; equal parts between cuts, each of one
or several layers, are put into a layer that Keras calls in their place. Afterwards the model is as it was.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import torch
from keras.src.models.functional import Functional
from keras.src.ops.symbolic_arguments import SymbolicArguments

from tp_planner.frontend.keras_internals import operation_fn

TIMES = 4  # how often in a row a part is repeated at least
LONGEST = 64  # how many parts between cuts a stretch has at most


class Stretch(keras.Layer):
    """Stands for a few layers of a model that are called one after the other, from one tensor to another."""

    def __init__(self, wiring: Wiring) -> None:
        layers = list(dict.fromkeys(node.operation for node in wiring.nodes))
        super().__init__(name=f"{layers[0].name}..{layers[-1].name}", autocast=False)
        self.wiring = wiring
        self.how = wiring.how
        self._layers.extend(layers)
        self._call_context_args = set().union(*(layer._call_context_args for layer in layers))
        self.built = True

    # The layers inside cast, check and mask; this one only passes on what it is given.
    __call__ = torch.nn.Module.__call__

    def forward(self, tensor: Any, **context: Any) -> Any:
        return self.wiring.run(tensor, context)


class Wiring:
    """The calls inside a stretch, each a node of the model: how it takes what those before it made.

    ``how`` is equal for stretches that are wired alike. It has slots, so that nobody who looks for what layers hold
    goes on from here to the whole model.
    """

    __slots__ = ("entry", "how", "nodes")

    def __init__(self, entry: Any, nodes: Sequence[Any]) -> None:
        self.entry, self.nodes, self.how = entry, nodes, _how(entry, nodes)

    def run(self, tensor: Any, context: Mapping[str, Any]) -> list[Any]:
        """Return all that the layers make of ``tensor``, for a Functional model holds that until its call ends."""
        made = {id(self.entry): tensor}
        for node in self.nodes:
            args, kwargs = node.arguments.fill_in(made)
            outputs = operation_fn(node.operation, **context)(*args, **kwargs)
            made.update(zip(map(id, node.outputs), keras.tree.flatten(outputs), strict=True))
        return [made[id(tensor)] for tensor in self.outputs]

    @property
    def outputs(self) -> list[Any]:
        """What Keras calls the tensors that are made."""
        return [tensor for node in self.nodes for tensor in node.outputs]


@dataclass(frozen=True, eq=False)
class _Joint:
    """Takes the place of the nodes of a stretch in a Functional model."""

    operation: Stretch
    arguments: SymbolicArguments
    outputs: Sequence[Any]
    is_input = False

    @property
    def input_tensors(self) -> list[Any]:
        tensors: list[Any] = self.arguments.keras_tensors
        return tensors


@dataclass(frozen=True)
class _Part:
    """The nodes between two cuts of a model."""

    entry: Any
    nodes: tuple[Any, ...]


@contextlib.contextmanager
def stretches_as_layers(
    model: keras.Model, layers: Mapping[str, keras.Layer], alike: Callable[[str], Hashable]
) -> Iterator[dict[str, keras.Layer]]:
    """Inside, equal stretches of the Functional and Sequential models among ``layers`` are layers of these.

    Args:
        model: the model.
        layers: all its layers by name.
        alike: returns what has to be equal in layers that are planned alike, by a layer's name.

    Yields:
        The layers by name, with the stretches before what is in them; nothing if there are no stretches.
    """
    names = {id(layer): name for name, layer in layers.items()}
    inside: dict[str, dict[int, Stretch]] = {}
    with contextlib.ExitStack() as stack:
        for owner_name, owner in layers.items():
            function = getattr(owner, "_functional", owner)
            if isinstance(function, Functional) and (found := _stretches(function, names, alike)):
                inside[owner_name] = {id(layer): stretch for stretch in found for layer in stretch._layers}
                held = list(dict.fromkeys(inside[owner_name].get(id(layer), layer) for layer in owner._layers))
                for each, name, new in (
                    (function, "_nodes_by_depth", _joined(function, found)),
                    (owner, "_layers", held),
                ):
                    stack.callback(vars(each).__setitem__, name, vars(each)[name])
                    vars(each)[name] = new  # no attribute that Keras is to track
        yield _with_stretches(layers, inside) if inside else {}


def _with_stretches(
    layers: Mapping[str, keras.Layer], inside: Mapping[str, Mapping[int, Stretch]]
) -> dict[str, keras.Layer]:
    """Return the layers by name, each stretch before its first layer."""
    of_layer = {layer: stretch for each in inside.values() for layer, stretch in each.items()}
    found: dict[str, keras.Layer] = {}
    names: dict[int, str] = {}
    for name, layer in layers.items():
        stretch = of_layer.get(id(layer))
        if stretch is not None and id(stretch) not in names:
            prefix = name.rpartition("/")[0]
            names[id(stretch)] = f"{prefix}/{stretch.name}" if prefix else stretch.name
            found[names[id(stretch)]] = stretch
        found[name] = layer
    return found


def _joined(function: Functional, stretches: Sequence[Stretch]) -> dict[int, list[Any]]:
    """Return the nodes of a Functional model by depth, those of each stretch as one, where its first one is."""
    first = {id(stretch.wiring.nodes[0]): stretch for stretch in stretches}
    gone = {id(node) for stretch in stretches for node in stretch.wiring.nodes}
    joined: dict[int, list[Any]] = {}
    for depth, nodes in function._nodes_by_depth.items():
        joined[depth] = [node for node in nodes if id(node) not in gone]
        for stretch in (first[id(node)] for node in nodes if id(node) in first):
            wiring = stretch.wiring
            joined[depth].append(_Joint(stretch, SymbolicArguments(wiring.entry), wiring.outputs))
    return joined


# --- where a model is cut, and what is repeated ---------------------------------------------------------


def _stretches(function: Functional, names: Mapping[int, str], alike: Callable[[str], Hashable]) -> list[Stretch]:
    """Return the stretches of a Functional model, in order."""
    uses = Counter(id(node.operation) for nodes in function._nodes_by_depth.values() for node in nodes)
    parts = _parts(function)
    fit = [all(id(node.operation) in names and uses[id(node.operation)] == 1 for node in part.nodes) for part in parts]
    # A layer with layers inside that stands alone is a block already.
    blocks = [len(part.nodes) == 1 and bool(getattr(part.nodes[0].operation, "_layers", ())) for part in parts]
    wanted = [good and not block for good, block in zip(fit, blocks, strict=True)]
    if sum(wanted) < TIMES:
        return []
    kinds: list[Hashable] = [
        (tuple(alike(names[id(node.operation)]) for node in part.nodes), _how(part.entry, part.nodes))
        if want
        else object()
        for part, want in zip(parts, wanted, strict=True)
    ]
    found = []
    for first, after in _repeated(kinds):
        within = parts[first:after]
        found.append(Stretch(Wiring(within[0].entry, [node for part in within for node in part.nodes])))
    return found


def _parts(function: Functional) -> list[_Part]:
    """Return what lies between the cuts of a model, in the order in which it is called."""
    nodes = [
        node for depth in sorted(function._nodes_by_depth, reverse=True) for node in function._nodes_by_depth[depth]
    ]
    last: dict[int, int] = {}  # by tensor: the last node that takes it
    for position, node in enumerate(nodes):
        last.update((id(tensor), position) for tensor in node.input_tensors)
    last.update((id(tensor), len(nodes)) for tensor in function.outputs)
    live = {id(tensor) for tensor in function.inputs if id(tensor) in last}
    parts: list[_Part] = []
    entry: Any = function.inputs[0] if len(function.inputs) == 1 else None
    waiting: list[Any] = []
    for position, node in enumerate(nodes):
        if node.is_input:
            continue
        waiting.append(node)
        live.update(id(tensor) for tensor in node.outputs if id(tensor) in last)
        live = {tensor for tensor in live if last[tensor] > position} if len(live) > 1 else live
        cut = next((tensor for tensor in node.outputs if live == {id(tensor)}), None)
        if cut is not None:
            if entry is not None:
                parts.append(_Part(entry, tuple(waiting)))
            entry, waiting = cut, []
    return parts


def _repeated(kinds: Sequence[Hashable]) -> Iterator[tuple[int, int]]:
    """Yield the first and the one after the last of each part of ``kinds`` that is repeated in a row."""
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    sequence = [numbers[kind] for kind in kinds]
    start = 0
    while start < len(sequence):
        length, times = _most_repeated(sequence, start)
        for _ in range(times):
            yield start, start + length
            start += length
        start += times == 0


def _most_repeated(sequence: Sequence[int], start: int) -> tuple[int, int]:
    """Return how long a part from ``start`` on is, and how often it comes: what covers most, the shortest of these."""
    best = 0, 0
    for length in range(1, min(LONGEST, (len(sequence) - start) // TIMES) + 1):
        end = start
        while end + length < len(sequence) and sequence[end] == sequence[end + length]:
            end += 1
        times = (end - start) // length + 1
        if times >= TIMES and times * length > best[0] * best[1]:
            best = length, times
    return best


def _how(entry: Any, nodes: Sequence[Any]) -> str:
    """Return in words how nodes are wired: tensors by the call that made them, numbers and texts as they are.

    Whatever else they are given makes them equal to themselves only.
    """
    numbers = {id(entry): "entry"}
    told = []
    for position, node in enumerate(nodes):
        arguments = node.arguments.args, node.arguments.kwargs
        leaves = [numbers.get(id(leaf)) or _constant(leaf) for leaf in keras.tree.flatten(arguments)]
        told.append(f"{sorted(node.arguments.kwargs)} {leaves}")
        numbers.update((id(tensor), f"{position}.{output}") for output, tensor in enumerate(node.outputs))
    return " ".join(told)


def _constant(value: Any) -> str:
    is_plain = value is None or isinstance(value, int | float | str | bool)
    return repr(value) if is_plain else f"{type(value).__name__} {id(value)}"
