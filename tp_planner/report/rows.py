"""The rows of a plan's tables, as text cells: what a plain and a coloured report both show.

Layers that differ in a number of their names only, as equal blocks do, are one row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from tp_planner.ir.names import FoldedName, fold_names, without_numbers_of
from tp_planner.ir.placement import Replicate, Shape, parts_of
from tp_planner.ir.plan import Boundary, LayerPlan, Plan, Transition, VariablePlan
from tp_planner.ir.step import Collective
from tp_planner.report.amounts import bytes_text
from tp_planner.report.guesses import guess_lines

VARIABLE_HEADS = ("variable", "shape", "stored", "per rank")
Key = TypeVar("Key")
COLLECTIVE_HEADS = ("times", "phase", "collective", "layer", "where", "bytes each", "sent each")


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer, or several equal ones: its style, its variables, and what happens at its ends.

    ``variables`` has the cells under ``VARIABLE_HEADS``, one tuple for each variable.
    """

    layer: str
    style: str
    variables: tuple[tuple[str, ...], ...]
    boundaries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """A reason and the names of what it holds for."""

    reason: str
    names: tuple[str, ...]


def heading(plan: Plan) -> list[str]:
    """Return what the plan is for and how to read it, one sentence a line."""
    inputs = ", ".join(f"{_shape(shape)} {dtype}" for shape, dtype in plan.inputs)
    ranks = f"{plan.axis_size} rank{'s' if plan.axis_size > 1 else ''}"
    lines = [
        f"Plan for {plan.model!r} on mesh ({plan.mesh}): layers are split over {plan.axis!r}, {ranks}",
        f"traced with inputs {inputs}",
        "R: whole on every rank; S(d): sharded on dim d; P: a summand on every rank",
    ]
    if any(parts_of(variable.placement) for variable in plan.variables):
        lines.append("S(d:a+b): dim d is parts of a and b side by side; every rank has its share of each")
    if plan.shards_stream:
        lines.append("Seq(d), SeqP: S(d) and P of the residual stream; R in calls whose sequence does not divide")
    if plan.replicas > 1:
        lines[1:2] = [
            f"the batch is split over {plan.mesh.batch_axis!r}: {plan.replicas} replicas, each with its own share",
            f"traced with inputs {inputs} of one replica",
        ]
        lines.append("batch S(d): each shard is stored in parts over the batch axis, and put together for use")
    return lines


def layer_rows(plan: Plan) -> list[LayerRow]:
    """Return one row for each group of equal layers, in order of execution; every variable is in one of them."""
    remaining = {variable.key: variable for variable in plan.variables}
    children: dict[str, list[str]] = {}
    for key in remaining:
        children.setdefault(_parent(key), []).append(key)
    crossed: set[str] = set()
    rows: list[LayerRow] = []
    for layer in plan.layers:
        keys = dict.fromkeys([*children.get(layer.path, ()), *(use.variable for use in layer.uses)])
        own = [remaining.pop(key) for key in keys if key in remaining]
        cells = tuple(map(_variable_cells, own))
        boundaries = _boundary_cells(layer, own, crossed)
        if cells or boundaries or layer.style != "replicated":  # or it only keeps less for the backward pass
            rows.append(LayerRow(layer.layer + _mode(layer), layer.style, cells, boundaries))
    rows += [LayerRow(_parent(key), "", (_variable_cells(each),), ()) for key, each in remaining.items()]
    return [replace(row, layer=str(name)) for row, name in _fold((replace(row, layer=""), row.layer) for row in rows)]


def collective_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Return the cells under ``COLLECTIVE_HEADS`` for each group of equal collectives of a training step."""
    counts = Counter(
        (c.layer, (c.phase, c.kind), (_where(c) + _over(c, plan), str(c.bytes), str(c.wire_bytes)))
        for c in plan.collectives
    )
    folded = _fold(((times, what, cells), layer) for (layer, what, cells), times in counts.items())
    return [(str(times * len(name.members)), *what, str(name), *cells) for (times, what, cells), name in folded]


def style_reasons(plan: Plan) -> list[Explanation]:
    """Return each reason for a style other than replicated, with the layers it holds for."""
    layers = [layer for layer in plan.layers if layer.style != "replicated"]
    return _explain((f"{layer.style}: {layer.reason}", layer.layer + _reading(layer)) for layer in layers)


def variable_reasons(plan: Plan) -> list[Explanation]:
    """Return each reason for a placement with the variables that have it."""
    return _explain((f"{variable.stored_as}: {variable.reason}", variable.key) for variable in plan.variables)


def summary(plan: Plan) -> list[str]:
    """Return what the ranks store, one sentence a line."""
    sharded = sum(variable.is_sharded for variable in plan.variables)
    whole = sum(_bytes(variable.shape, variable.itemsize) for variable in plan.variables)
    local = sum(_bytes(variable.local_shape, variable.itemsize) for variable in plan.variables)
    return [
        f"variables: {len(plan.variables)}, {sharded} of them sharded",
        f"bytes of variables: {whole} in the model, {local} on rank 0",
    ]


def memory_lines(plan: Plan) -> list[str]:
    """Return what rank 0 holds in one training step, one sentence a line."""
    memory, optimizer = plan.step.memory, plan.step.optimizer or "no optimizer named"
    loss = f"loss {plan.step.loss}" if plan.step.loss else "no loss of Keras named"
    kernels = ", CUDA's kernels" if plan.device == "cuda" else ""
    kinds = ("parameters", "gradients", "optimizer", "activations", "temporaries")
    peak = ", ".join(f"{kind} {bytes_text(getattr(memory.peak, kind))}" for kind in kinds)
    largest = ", ".join(f"{kind} {bytes_text(getattr(memory.largest, kind))}" for kind in kinds)
    return [
        f"memory of rank 0 in one training step, {optimizer}, {loss}{kernels}: "
        f"{bytes_text(memory.peak.total)} at the peak, {memory.peak_phase}",
        f"  at the peak: {peak}",
        f"  each at its own largest: {largest}",
        *(
            []
            if memory.reserved is None
            else [f"  reserved by CUDA's caching allocator: {bytes_text(memory.reserved)}"]
        ),
        *(f"  {line}" for line in guess_lines(plan.guessed)),
    ]


def collectives_heading(plan: Plan) -> str:
    """Return how many collectives a training step takes."""
    kinds = Counter(collective.kind for collective in plan.collectives)
    counts = ", ".join(f"{kinds[kind]} {kind}" for kind in sorted(kinds))
    all_of_them = f"collectives of one training step: {kinds.total()}" + (f" ({counts})" if counts else "")
    if plan.step.micro_steps == 1:
        return all_of_them
    others = sum(not each.once for each in plan.collectives)
    return f"{all_of_them}, the last of the {plan.step.micro_steps} micro-steps of an update; {others} in each other"


def _fold(pairs: Iterable[tuple[Key, str]]) -> list[tuple[Key, FoldedName]]:
    """Return the pairs with the names of equal keys folded, in order of first appearance."""
    names: dict[Key, list[str]] = {}
    order: dict[tuple[Key, str], int] = {}
    for key, name in pairs:
        names.setdefault(key, []).append(name)
        order.setdefault((key, name), len(order))
    folded = [(key, name) for key, same in names.items() for name in fold_names(same)]
    return sorted(folded, key=lambda pair: order[pair[0], pair[1].members[0]])


def _explain(pairs: Iterable[tuple[str, str]]) -> list[Explanation]:
    """Return each reason with its names; reasons that differ in the numbers of their own names are one."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for reason, name in pairs:
        groups.setdefault(without_numbers_of(name, reason), []).append((reason, name))
    explanations = []
    for starred, members in groups.items():
        reasons = {reason for reason, _ in members}
        reason = starred if len(reasons) > 1 else members[0][0]
        explanations.append(Explanation(reason, tuple(str(name) for name in fold_names(name for _, name in members))))
    return explanations


def _parent(key: str) -> str:
    return key.rpartition("/")[0]


def _reading(layer: LayerPlan) -> str:
    return f" [{layer.mode}]" if layer.mode else ""


def _mode(layer: LayerPlan) -> str:
    return _reading(layer) + (f" ({layer.calls} calls)" if layer.calls > 1 else "")


def _variable_cells(variable: VariablePlan) -> tuple[str, ...]:
    name = variable.key.rpartition("/")[2]
    return (name, _shape(variable.shape), variable.stored_as, _shape(variable.local_shape))


def _boundary_cells(layer: LayerPlan, own: Sequence[VariablePlan], crossed: set[str]) -> tuple[str, ...]:
    """Return one cell for each tensor that enters or leaves the layer sharded, or changes on the way."""
    boundaries = {position: boundary for position, boundary in layer.inputs if _happens(boundary)}
    sharded = dict(layer.sharded_inputs)
    positions = sorted({*boundaries, *sharded})
    cells = []
    for position in positions:
        name = "in" if len(positions) == 1 else f"in {position}"
        boundary = boundaries.get(position)
        cells.append(f"{name} {sharded[position]}" if boundary is None else f"{name} {_input(boundary, crossed)}")
    for use in layer.uses:
        if _happens(use.boundary):
            cells.append(f"{use.variable.rpartition('/')[2]} {_changes(use.boundary)}")
    for function in layer.functions:
        cells += [f"{function} in {_changes(each)}" for _, each in function.inputs if _happens(each)]
        if function.output is not None:
            cells.append(f"{function} out {_changes(function.output)}")
        cells += [f"{function} size {whole}->{local}" for _, whole, local in function.sizes]
        cells += [f"{function} size of the whole sequence" for _ in function.scales[:1]]
    if layer.sees_whole:
        cells.append("sees sizes of the whole")
    if layer.output is not None:
        has_bias = any(variable.key.endswith("/bias") for variable in own)
        bias = ", then bias" if has_bias and layer.epilogue_after_output.startswith("bias") else ""
        into_loss = ", in training in shards into the loss" if layer.into_loss else ""
        cells.append(f"out {_changes(layer.output)}{bias}{into_loss}")
    elif layer.output_placement not in (None, Replicate()):
        cells.append(f"out {layer.output_placement}")
    return tuple(cells)


def _happens(boundary: Boundary) -> bool:
    """Whether the boundary changes anything in the traced step."""
    return boundary.forward.source != boundary.forward.target or (boundary.has_gradient and not boundary.is_identity)


def _input(boundary: Boundary, crossed: set[str]) -> str:
    """Return the changes of an input; a boundary that an earlier layer executes for the same tensor is shared."""
    text = _changes(boundary)
    crossing = f"{boundary.tensor} {text}"
    shared = crossing in crossed and not boundary.is_identity
    crossed.add(crossing)
    return f"{text} (shared)" if shared else text


def _changes(boundary: Boundary) -> str:
    forward, backward = boundary.forward, boundary.backward
    if not boundary.has_gradient or not _adds(backward, forward):
        return str(forward)
    return f"{forward}, grad {backward}"


def _adds(backward: Transition, forward: Transition) -> bool:
    """Whether the gradient's way says more than its tensor's."""
    return backward.source != backward.target or (forward.source == forward.target != backward.source)


def _where(collective: Collective) -> str:
    """Return where in the layer a collective stands: its input, its output or a variable, without their paths.

    One that no boundary asks for is implicit: the op is named that causes it.
    """
    if not collective.is_planned:
        return f"implicit: {collective.cause}"
    words, _, path = collective.place.partition(" (")[0].rpartition(" ")
    return f"{words} {path.rpartition('/')[2]}".strip()


def _over(collective: Collective, plan: Plan) -> str:
    """Return the axis, where there is more than one to tell apart, whether it starts early, and if it is made once."""
    axis = f", over {collective.axis!r}" if plan.replicas > 1 else ""
    early = ", early" if collective.early else ""
    return axis + early + (f", once in {plan.step.micro_steps} micro-steps" if collective.once else "")


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _bytes(shape: Shape, itemsize: int) -> int:
    for length in shape:
        itemsize *= length
    return itemsize
