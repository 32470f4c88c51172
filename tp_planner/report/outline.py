"""The model as a tree of its layers, in order of execution, in which equal blocks are one node.

The tree follows the paths of the layers. A number inside a flat name is a level too: ``block_0_up`` and
``block_0_down`` are children of ``block_0``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from tp_planner.ir.names import FoldedName, fold_names, without_numbers_of
from tp_planner.ir.placement import Placement, Replicate
from tp_planner.ir.plan import Boundary, LayerPlan, Plan, VariablePlan
from tp_planner.ir.step import Collective

_NUMBERED = re.compile(r"(?P<block>[^/]*?\d+)_(?P<rest>[^/]+(?:/.*)?)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Edge:
    """A boundary of a layer with its collectives, or collectives that no boundary of its plan makes.

    ``shared_with`` names the layer that executes the same boundary for the same tensor.
    """

    side: Literal["input", "variable", "function", "output", "other"]
    place: str  # "in", "in 1", "out", the name of a variable, the end of a function, or what else communicates
    boundary: Boundary | None
    collectives: tuple[tuple[Collective, int], ...]  # with how often
    shared_with: str = ""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One layer in one mode, its variables and its edges; ``plan`` is None for what is outside of all layers."""

    order: int
    name: str
    plan: LayerPlan | None
    variables: tuple[VariablePlan, ...]
    borrowed: tuple[str, ...]  # variables that it uses, and that are with another layer
    edges: tuple[Edge, ...]

    @property
    def style(self) -> str:
        return self.plan.style if self.plan else ""

    @property
    def collectives(self) -> tuple[tuple[Collective, int], ...]:
        """What it communicates in one training step, each with how often."""
        return tuple(pair for edge in self.edges for pair in edge.collectives)

    @property
    def enters(self) -> Placement:
        """The placement in which the layer computes on its first input that is not whole."""
        if self.plan is None:
            return Replicate()
        placements = [placement for _, placement in self.plan.sharded_inputs]
        placements += [boundary.forward.target for _, boundary in self.plan.inputs]
        return next((placement for placement in placements if placement != Replicate()), Replicate())

    @property
    def makes(self) -> Placement:
        """The placement of what the layer computes, before the boundary at its output."""
        if self.plan is None:
            return Replicate()
        if self.plan.output is not None:
            return self.plan.output.forward.source
        return self.plan.output_placement or Replicate()

    @property
    def leaves(self) -> Placement:
        """The placement of the layer's output."""
        return (self.plan.output_placement if self.plan else None) or Replicate()


@dataclass(frozen=True, slots=True)
class Node:
    """One place in the tree, or several equal ones: a leaf, or a block with what is in it.

    ``leaf`` and ``children`` are those of the first of them. ``joint`` stands between the parent's name and its own.
    """

    joint: str
    name: FoldedName
    leaf: Leaf | None
    children: tuple[Node, ...]

    @property
    def times(self) -> int:
        return len(self.name.members)


def outline(plan: Plan) -> tuple[Node, ...]:
    """Return the tree; all variables and all collectives of the plan are in it, each of them once."""
    return _nodes([_Path("", leaf.name, leaf) for leaf in _leaves(plan)])


def walk(nodes: Sequence[Node], times: int = 1, prefix: str = "") -> Iterator[tuple[Leaf, int, str]]:
    """Yield each leaf of the tree, how many layers it stands for, and the name of all of them."""
    for node in nodes:
        name = f"{prefix}{node.joint}{node.name}"
        if node.leaf is not None:
            yield node.leaf, times * node.times, name
        yield from walk(node.children, times * node.times, name)


# The leaves


def _leaves(plan: Plan) -> Iterator[Leaf]:
    variables = {variable.key: variable for variable in plan.variables}
    children: dict[str, list[str]] = {}
    for key in variables:
        children.setdefault(key.rpartition("/")[0], []).append(key)
    collectives: dict[str, Counter[Collective]] = {}
    for collective in plan.collectives:
        collectives.setdefault(collective.layer, Counter())[collective] += 1
    last = {layer.layer: layer for layer in plan.layers}
    executed: dict[tuple[str, str, str], str] = {}
    for order, layer in enumerate(plan.layers):
        keys = dict.fromkeys([*children.get(layer.path, ()), *(use.variable for use in layer.uses)])
        own = tuple(variables.pop(key) for key in keys if key in variables)
        borrowed = tuple(use.variable for use in layer.uses if use.variable not in {each.key for each in own})
        remaining = collectives.get(layer.layer, Counter())
        edges = tuple(_edges(layer, remaining, executed))
        if last[layer.layer] is layer:
            edges += _other_edges(collectives.pop(layer.layer, Counter()))
        if own or borrowed or edges or layer.style != "replicated":  # or it only keeps less for the backward pass
            yield Leaf(order, layer.layer + _suffix(layer), layer, own, borrowed, edges)
    rest = [Leaf(0, key, None, (variable,), (), ()) for key, variable in variables.items()]
    rest += [Leaf(0, name or "outside", None, (), (), _other_edges(made)) for name, made in collectives.items()]
    yield from (replace(leaf, order=order) for order, leaf in enumerate(rest, len(plan.layers)))


def _edges(
    layer: LayerPlan, remaining: Counter[Collective], executed: dict[tuple[str, str, str], str]
) -> Iterator[Edge]:
    """Yield the boundaries at which something happens, with their collectives, which are taken out of the remaining.

    ``executed`` has the layers that execute boundaries, by tensor and changes.
    """
    for place, boundary in layer.boundaries:
        where, _, name = place.partition(" ")
        stands = place.rstrip("0123456789").rstrip() if "input" in place else place
        at = name if where == "variable" else f"{stands} ({boundary.tensor})"
        kinds = {"forward": boundary.forward.collective, "backward": boundary.backward.collective}
        made = tuple(
            (each, times)
            for each, times in remaining.items()
            if each.is_planned and each.place == at and each.kind == kinds.get(each.phase)
        )
        for each, _ in made:
            del remaining[each]
        crossing = (boundary.tensor, str(boundary.forward), str(boundary.backward))
        first = executed.setdefault(crossing, layer.layer) if where == "input" else layer.layer
        if made or _happens(boundary):
            shared_with = "" if first == layer.layer else first
            if where == "input":
                yield Edge("input", f"in {name}" if len(layer.inputs) > 1 else "in", boundary, made, shared_with)
            elif where == "output":
                yield Edge("output", "out", boundary, made)
            elif where != "variable":
                yield Edge("function", stands, boundary, made)
            else:
                yield Edge("variable", name.rpartition("/")[2], boundary, made)


def _other_edges(made: Mapping[Collective, int]) -> tuple[Edge, ...]:
    """Return collectives that are at no boundary of their layer's plan: of penalties, later calls, or implicit."""
    return tuple(Edge("other", each.place, None, ((each, times),)) for each, times in made.items())


def _happens(boundary: Boundary) -> bool:
    """Whether the boundary changes anything in the traced step."""
    return boundary.forward.source != boundary.forward.target or (boundary.has_gradient and not boundary.is_identity)


def _suffix(layer: LayerPlan) -> str:
    return (f" [{layer.mode}]" if layer.mode else "") + (f" ({layer.calls} calls)" if layer.calls > 1 else "")


# The tree


@dataclass(frozen=True, slots=True)
class _Path:
    """The rest of a leaf's name below a node, and what stands before it."""

    joint: str
    rest: str
    leaf: Leaf

    @property
    def head(self) -> str:
        """The block of a numbered name, else the first segment."""
        match = _NUMBERED.fullmatch(self.rest)
        return match["block"] if match else self.segment

    @property
    def segment(self) -> str:
        return self.rest.partition("/")[0]

    def below(self, name: str) -> _Path:
        end = len(name) + 1
        return _Path(self.rest[len(name) : end], self.rest[end:], self.leaf)


def _nodes(paths: Sequence[_Path]) -> tuple[Node, ...]:
    """Return the tree of the leaves at the ends of these paths, neighbours in one block together."""
    runs = groupby(paths, lambda path: (path.joint, path.head))
    return _folded([node for (joint, head), run in runs for node in _run(joint, head, list(run))])


def _run(joint: str, head: str, run: list[_Path]) -> Iterator[Node]:
    """Yield the nodes of neighbours with one head: a leaf, or the block with what is in it."""
    if len(run) == 1:
        yield Node(joint, _single(run[0].rest), run[0].leaf, ())
        return
    segments = {path.segment for path in run}
    name = segments.pop() if len(segments) == 1 else head
    for path in run:
        if path.rest == name:
            yield Node(joint, _single(name), path.leaf, ())
    if inner := [path.below(name) for path in run if path.rest != name]:
        yield Node(joint, _single(name), None, _nodes(inner))


def _single(name: str) -> FoldedName:
    return fold_names([name])[0]


def _folded(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Return the nodes with those that differ in numbers only as one, in order of first appearance."""
    equal: dict[Hashable, dict[str, Node]] = {}
    for node in nodes:
        equal.setdefault(_key(node), {})[str(node.name)] = node
    folded = [replace(same[name.members[0]], name=name) for same in equal.values() for name in fold_names(same)]
    return tuple(sorted(folded, key=lambda node: _first(node).order))


def _first(node: Node) -> Leaf:
    return node.leaf or _first(node.children[0])


def _key(node: Node) -> Hashable:
    """Return what is equal for equal nodes: all but their names, numbers of names, and tensors' names."""
    if node.leaf is not None:
        return (node.joint, _leaf_key(node.leaf))
    name = str(node.name)
    return (node.joint, *((without_numbers_of(name, str(child.name)), _key(child)) for child in node.children))


def _leaf_key(leaf: Leaf) -> Hashable:
    def say(text: str) -> str:
        return without_numbers_of(leaf.name, text)

    plan = leaf.plan
    return (
        plan and (plan.style, plan.class_name, plan.mode, plan.calls, say(plan.reason)),
        (leaf.enters, leaf.makes, leaf.leaves),
        tuple((say(v.key), v.shape, v.stored_as, v.dtype, say(v.rule or ""), say(v.reason)) for v in leaf.variables),
        tuple(map(say, leaf.borrowed)),
        tuple(
            (
                say(edge.place),
                edge.boundary and replace(edge.boundary, tensor=""),
                tuple((replace(c, layer="", place="", cause=say(c.cause)), times) for c, times in edge.collectives),
                say(edge.shared_with),
            )
            for edge in leaf.edges
        ),
    )
