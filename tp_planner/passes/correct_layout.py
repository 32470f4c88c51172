"""Correct a layout: propose other dims, and rules for weights that none names, where a plan pays for a boundary.

A pair of layers is cheap if the first shards an output dim and the second contracts it. So a row-parallel layer
whose input arrives whole, and a column-parallel layer whose output is gathered although a contraction reads it,
lack their partner. Which change helps is not guessed: the linter plans each proposal and compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from tp_planner.ir.contraction import Contraction
from tp_planner.ir.graph import ModelGraph
from tp_planner.ir.layout import AxisSpec, Layout, LayoutRule
from tp_planner.ir.placement import Replicate, Shard, without_parts
from tp_planner.ir.plan import LayerPlan, Plan

Paths = tuple[str, ...]
LayerMode = tuple[str, str]  # layer name, mode


@dataclass(frozen=True, slots=True)
class Strain:
    """Layers whose main weights one rule shards on a dim that their neighbours do not go along with.

    ``code`` is "contracted-dim" for row-parallel layers with whole inputs, "output-dim" for column-parallel layers
    with gathered outputs, or whose shards meet a whole tensor that is cut. ``weights`` are the paths of the main
    weights, ``dim`` is the dim that is sharded.
    ``siblings`` are the same layers by what they read: layers with one input belong together.
    """

    code: str
    rule: str
    dim: int
    layers: tuple[LayerMode, ...]
    weights: Paths
    siblings: tuple[tuple[LayerMode, ...], ...]


@dataclass(frozen=True, slots=True)
class Correction:
    """Variables that would be placed in another way: ``code``, the rule that places them so far, new axes by path.

    ``code`` is that of the strain, or "missing-rule" for variables that no rule names. The main weights come first.
    """

    code: str
    rule: str | None
    weights: Paths
    axes: tuple[tuple[str, tuple[AxisSpec, ...]], ...]

    def applied_to(self, layout: Layout) -> Layout:
        """Return the layout with an exact rule for each of the variables, which goes before all patterns."""
        new = dict(self.axes)
        kept = tuple(rule for rule in layout.rules if rule.pattern not in new)
        return Layout(layout.mesh, kept + tuple(LayoutRule(path, axes) for path, axes in new.items()))


def find_strains(plan: Plan, graph: ModelGraph) -> tuple[Strain, ...]:
    """Return the layers of a plan that lack their partner, by rule, in order of execution."""
    variables = {variable.key: variable for variable in plan.variables}
    found: dict[tuple[str, str, int], list[LayerPlan]] = {}
    columns = (*_columns_with_gathered_outputs(plan, graph), *_columns_that_meet_cut_tensors(plan))
    for code, layer in (*_rows_with_whole_inputs(plan), *columns):
        contraction = dict(graph.layers[layer.layer].contractions)[layer.mode]
        main = variables[contraction.main_weight]
        if main.rule is not None and isinstance(main.placement, Shard):
            found.setdefault((code, main.rule, main.placement.dim), []).append(layer)
    order = {layer: position for position, layer in enumerate(plan.layers)}
    strains = sorted(found.items(), key=lambda pair: order[pair[1][0]])
    return tuple(_strain(*key, members, plan, graph) for key, members in strains)


def _rows_with_whole_inputs(plan: Plan) -> Iterator[tuple[str, LayerPlan]]:
    for layer in plan.layers:
        if layer.style == "row" and not layer.sharded_inputs:
            yield "contracted-dim", layer


def _columns_with_gathered_outputs(plan: Plan, graph: ModelGraph) -> Iterator[tuple[str, LayerPlan]]:
    """Yield the layers whose output, or that of an equal layer, another contraction reads; others end the model."""
    gathered = [
        layer
        for layer in plan.layers
        if layer.style == "column" and layer.output is not None and layer.output.forward.collective == "all_gather"
    ]
    neighbourhood = _Neighbourhood.of(graph)
    kind = neighbourhood.kind
    read = {kind(layer.layer) for layer in gathered if neighbourhood.readers((layer.layer, layer.mode))}
    yield from (("output-dim", layer) for layer in gathered if kind(layer.layer) in read)


def _columns_that_meet_cut_tensors(plan: Plan) -> Iterator[tuple[str, LayerPlan]]:
    """Yield the layers inside of those whose code cuts a whole tensor, at the cost of gathering its gradient."""
    cutting = {
        layer.layer
        for layer in plan.layers
        for function in layer.functions
        if any(each.has_gradient and each.backward.collective == "all_gather" for _, each in function.inputs)
    }
    for layer in plan.layers:
        inside = any(layer.layer.startswith(f"{name}/") for name in cutting)
        if inside and layer.style == "column" and layer.output is None:
            yield "output-dim", layer


def _strain(code: str, rule: str, dim: int, members: Sequence[LayerPlan], plan: Plan, graph: ModelGraph) -> Strain:
    layers = tuple((layer.layer, layer.mode) for layer in members)
    siblings: dict[str, list[LayerMode]] = {}
    for layer in members:
        reads = layer.inputs[0][1].tensor if layer.inputs else ""
        siblings.setdefault(_alike(reads), []).append((layer.layer, layer.mode))
    return Strain(code, rule, dim, layers, _weights(layers, plan, graph), tuple(map(tuple, siblings.values())))


def _weights(layers: Iterable[LayerMode], plan: Plan, graph: ModelGraph) -> Paths:
    """Return the paths of the layers' main weights, each once."""
    paths = {variable.key: variable.path for variable in plan.variables}
    keys = [dict(graph.layers[layer].contractions)[mode].main_weight for layer, mode in layers]
    return tuple(dict.fromkeys(paths[key] for key in keys))


def propose_corrections(layout: Layout, plan: Plan, graph: ModelGraph, strain: Strain) -> Iterator[Correction]:
    """Yield the changes to try for a strain, in a fixed order."""
    for layers in (strain.layers, *(strain.siblings if len(strain.siblings) > 1 else ())):
        yield from _moves(layout, plan, graph, strain, layers)
    yield from _additions(plan, graph, strain)


def _moves(
    layout: Layout, plan: Plan, graph: ModelGraph, strain: Strain, layers: Sequence[LayerMode]
) -> Iterator[Correction]:
    """Yield the weights of these layers with every other dim sharded that divides, output dims first."""
    rule = next(rule for rule in layout.rules if rule.pattern == strain.rule)
    shapes = {variable.path: variable.shape for variable in plan.variables}
    weights = _weights(layers, plan, graph)
    contractions = [dict(graph.layers[layer].contractions)[mode] for layer, mode in layers]
    labels = contractions[0].labels(contractions[0].main_weight)
    for dim in sorted(range(len(labels)), key=lambda dim: (labels[dim] not in contractions[0].output, dim)):
        if dim != strain.dim and not any(shapes[path][dim] % plan.axis_size for path in weights):
            axes = _exchanged(rule.axes, strain.dim, dim)
            changes = (*((path, axes) for path in weights), *_biases(plan, contractions, dim))
            yield Correction(strain.code, strain.rule, weights, changes)


def _additions(plan: Plan, graph: ModelGraph, strain: Strain) -> Iterator[Correction]:
    """Yield rules for weights that none names, of layers beside the strained ones; equal layers get one at once."""
    variables = {variable.key: variable for variable in plan.variables}
    neighbourhood = _Neighbourhood.of(graph)
    unnamed: dict[str, list[Contraction]] = {}
    for layer in graph.layers.values():
        for _, contraction in layer.contractions[:1]:
            if variables[contraction.main_weight].rule is None:
                unnamed.setdefault(neighbourhood.kind(layer.name), []).append(contraction)
    strained = {neighbourhood.kind(layer): (layer, mode) for layer, mode in strain.layers}
    beside = {neighbourhood.kind(name) for layer in strained.values() for name in neighbourhood.beside(layer)}
    for name, contractions in unnamed.items():
        shapes = [variables[contraction.main_weight].shape for contraction in contractions]
        if name not in beside or len(set(map(len, shapes))) > 1:
            continue
        paths = tuple(variables[contraction.main_weight].path for contraction in contractions)
        for dim in range(len(shapes[0])):
            if not any(shape[dim] % plan.axis_size for shape in shapes):
                axes = axes_with(plan.axis, dim, len(shapes[0]))
                changes = (*((path, axes) for path in paths), *_biases(plan, contractions, dim))
                yield Correction("missing-rule", None, paths, changes)


def _biases(plan: Plan, contractions: Iterable[Contraction], dim: int) -> Iterator[tuple[str, tuple[AxisSpec, ...]]]:
    """Yield the axes of each bias that has to change where dim ``dim`` of its layer's main weight is sharded."""
    variables = {variable.key: variable for variable in plan.variables}
    for contraction in contractions:
        if contraction.bias is not None:
            bias, wanted = variables[contraction.bias], bias_dim(contraction, dim)
            if without_parts(bias.placement) != (Replicate() if wanted is None else Shard(wanted)):
                yield bias.path, axes_with(plan.axis, wanted, len(bias.shape))


def bias_dim(contraction: Contraction, dim: int) -> int | None:
    """Return the dim in which the bias is sharded if the main weight is in ``dim``; None where it stays whole."""
    assert contraction.bias is not None
    found = contraction.labels(contraction.bias).find(contraction.labels(contraction.main_weight)[dim])
    return None if found < 0 else found


def axes_with(axis: str, dim: int | None, ndim: int) -> tuple[AxisSpec, ...]:
    """Return the entries of a rule that shards dim ``dim``, or none, over ``axis``."""
    return tuple(axis if each == dim else None for each in range(ndim))


def rules_to_write(correction: Correction, plan: Plan) -> tuple[LayoutRule, ...]:
    """Return the correction as rules: a rule's own pattern where all its variables change alike, else new ones."""
    by_axes: dict[tuple[str | None, tuple[AxisSpec, ...]], list[str]] = {}
    owners = {variable.path: variable.rule for variable in plan.variables}
    for path, axes in correction.axes:
        by_axes.setdefault((owners[path], axes), []).append(path)
    rules = []
    for (rule, axes), paths in by_axes.items():
        if rule is not None and [path for path, owner in owners.items() if owner == rule and path not in paths] == []:
            rules.append(LayoutRule(rule, axes))
        else:
            rules += [LayoutRule(pattern, axes) for pattern in patterns_of(paths)]
    return tuple(rules)


def patterns_of(paths: Iterable[str]) -> tuple[str, ...]:
    """Return patterns that match the paths: those that differ in numbers only share one.

    >>> patterns_of(["block_0/up/kernel", "block_1/up/kernel", "head/kernel"])
    ('block_[0-9]+/up/kernel', 'head/kernel')
    """
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(re.sub(r"\d+", "[0-9]+", re.sub(r"([^\w/-])", r"\\\1", path)), []).append(path)
    return tuple(pattern if len(group) > 1 else group[0] for pattern, group in groups.items())


def _exchanged(axes: tuple[AxisSpec, ...], one: int, other: int) -> tuple[AxisSpec, ...]:
    changed = list(axes)
    changed[one], changed[other] = axes[other], axes[one]
    return tuple(changed)


def _alike(name: str) -> str:
    """Return what the names of equal layers in different blocks have in common."""
    return re.sub(r"\d+", "*", name)


@dataclass(frozen=True, slots=True)
class _Neighbourhood:
    """The ops of a graph, and the layer of each that belongs to a contraction; layers that did not run have a twin."""

    flow: nx.MultiDiGraph
    twins: Mapping[str, str]
    own: Mapping[LayerMode, list[int]]
    contraction: Mapping[int, str]

    @classmethod
    def of(cls, graph: ModelGraph) -> _Neighbourhood:
        own: dict[LayerMode, list[int]] = {}
        for op in graph.ops:
            inside = [call for call in graph.enclosing(op.call) if graph.layers[call.layer].contractions]
            if inside:
                own.setdefault((inside[0].layer, inside[0].mode), []).append(op.id)
        twins = {other: twin for repeat in graph.repeats.values() for twin, other in repeat.layers}
        return cls(graph.flow, twins, own, {op: layer for (layer, _), ops in own.items() for op in ops})

    def readers(self, layer: LayerMode) -> set[str]:
        """Return the contraction layers that read what ``layer`` makes, with ops between but no other contraction."""
        return self._reached(self._own(layer), self.flow.successors)[0]

    def beside(self, layer: LayerMode) -> set[str]:
        """Return the contraction layers that feed ``layer``, read it, or feed what lies between it and its readers."""
        own = self._own(layer)
        readers, between = self._reached(own, self.flow.successors)
        return (
            readers | self._reached(own, self.flow.predecessors)[0] | self._reached(between, self.flow.predecessors)[0]
        )

    def kind(self, layer: str) -> str:
        """Return what the names of equal layers have in common."""
        while layer in self.twins:
            layer = self.twins[layer]
        return _alike(layer)

    def _own(self, layer: LayerMode) -> Sequence[int]:
        name, mode = layer
        while (name, mode) not in self.own and name in self.twins:
            name = self.twins[name]
        return self.own.get((name, mode), ())

    def _reached(self, start: Iterable[int], step: Callable[[int], Iterable[int]]) -> tuple[set[str], set[int]]:
        """Return the contractions where the walk from ``start`` ends, and the ops that it goes through."""
        layers: set[str] = set()
        origin, between = set(start), set[int]()
        waiting = list(origin)
        while waiting:
            for op in step(waiting.pop()):
                if op in origin or op in between:
                    continue
                if op in self.contraction:
                    layers.add(self.contraction[op])
                else:
                    between.add(op)
                    waiting.append(op)
        return layers, between
