"""Why one layer or variable is planned as it is, as sections of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tp_planner.ir.explanation import Alternative, ComputedLayer, Crossing, PathExplanation, StoredVariable
from tp_planner.ir.figures import Figures
from tp_planner.ir.names import fold_names
from tp_planner.ir.placement import Shape
from tp_planner.ir.step import Collective
from tp_planner.report.amounts import bytes_text, with_change
from tp_planner.report.sections import Item, Section, Table

_FIGURE_HEADS = ("collectives", "wire bytes", "parameters", "peak memory")


def explanation_sections(explanation: PathExplanation) -> list[Section]:
    """Return the report: styles with their reasons, variables, ends of the layers, collectives, alternatives."""
    return [
        _heading(explanation),
        *_variables(explanation.variables),
        *_ends(explanation),
        _collectives(explanation.collectives),
        *_alternatives(explanation),
    ]


def _heading(explanation: PathExplanation) -> Section:
    sentences = [f"{each.layer}: {each.style}: {each.reason}" for each in explanation.layers]
    if not sentences:
        sentences = ["it has no variables and no boundaries: it computes on what it is given"]
    if len(explanation.equals) > 1:
        sentences.append(f"{len(explanation.equals)} are planned alike: {_folded(explanation.equals)}")
    title = f"{explanation.path} ({explanation.kind}) of {explanation.model!r} on mesh ({explanation.mesh})"
    return Section(title, tuple(sentences))


def _variables(variables: Sequence[StoredVariable]) -> list[Section]:
    if not variables:
        return []
    rows = tuple(
        (
            each.key,
            each.dtype if each.trainable else f"{each.dtype}, not trained",
            _shape(each.shape),
            each.placement,
            _shape(each.local_shape),
            bytes_text(each.whole_bytes),
            bytes_text(each.local_bytes),
        )
        for each in variables
    )
    heads = ("variable", "dtype", "shape", "stored", "per rank", "bytes whole", "bytes per rank")
    reasons: dict[str, list[str]] = {}
    for each in variables:
        reasons.setdefault(f"{each.placement}: {each.reason}", []).append(each.key)
    items = tuple(Item(reason, (_folded(keys),)) for reason, keys in reasons.items())
    return [Section("variables", items=items, table=Table(heads, rows, frozenset(heads[-2:])))]


def _ends(explanation: PathExplanation) -> list[Section]:
    rows = tuple(
        (layer.layer, *_crossing_cells(crossing), _then(crossing, layer))
        for layer in explanation.layers
        for crossing in layer.crossings
        if not crossing.place.startswith("variable") or "->" in crossing.forward + crossing.backward
    )
    if not rows:
        return []
    heads = ("layer", "where", "tensor", "shape", "forward", "gradient", "")
    legend = "R: whole on every rank; S(d): sharded on dim d; P: a summand on every rank"
    return [Section("what enters and leaves", (legend,), table=Table(heads, rows))]


def _crossing_cells(crossing: Crossing) -> tuple[str, ...]:
    place = crossing.place.replace("variable ", "")
    shape = _shape(crossing.shape) if crossing.tensor else ""
    return (place, crossing.tensor, shape, crossing.forward, crossing.backward)


def _then(crossing: Crossing, layer: ComputedLayer) -> str:
    """Return who shares a crossing, layers beside this one by their last names, or what runs after it."""
    if crossing.shared_with:
        beside = f"{layer.layer.rpartition('/')[0]}/"
        return f"shared with {_folded(name.removeprefix(beside) for name in crossing.shared_with)}"
    if crossing.place == "output" and layer.after_output:
        return f"then {layer.after_output.replace('+', ' and ')}"
    return ""


def _collectives(collectives: Sequence[Collective]) -> Section:
    if not collectives:
        return Section("collectives of one training step: none")
    heads = ("times", "phase", "collective", "layer", "where", "bytes", "wire bytes", "why")
    rows = tuple(
        (
            str(times),
            each.phase,
            each.kind,
            each.layer,
            each.place.partition(" (")[0],  # the tensor's name stands above
            bytes_text(each.bytes * times),
            bytes_text(each.wire_bytes * times),
            each.cause or each.reason,
        )
        for each, times in Counter(collectives).items()
    )
    return Section(
        f"collectives of one training step: {len(collectives)}",
        table=Table(heads, rows, frozenset({"times", "bytes", "wire bytes"})),
    )


def _alternatives(explanation: PathExplanation) -> list[Section]:
    if not explanation.alternatives:
        return [Section("alternatives: none, no rule for its variables would change anything")]
    alone = Section(
        "alternatives, each planned: other rules for its exact path, the whole model's figures, other layers changed",
        items=tuple(_explained(each) for each in explanation.alternatives),
        table=_table(explanation, explanation.alternatives),
    )
    if not explanation.alternatives_for_equals:
        return [alone]
    together = Section(
        f"alternatives for all {len(explanation.equals)} together: {_folded(explanation.equals)}",
        tuple(
            f"{_placements(each)} is refused: {each.problem}"
            for each in explanation.alternatives_for_equals
            if each.problem
        ),
        table=_table(explanation, explanation.alternatives_for_equals),
    )
    return [alone, together]


def _explained(alternative: Alternative) -> Item:
    """Return what a choice makes of each layer; layers of the same style and reason are one."""
    if alternative.problem:
        return Item(f"{_placements(alternative)}: refused", (alternative.problem,))
    reasons: dict[str, list[str]] = {}
    for layer, style, reason in alternative.styles:
        reasons.setdefault(f"{style}: {reason}", []).append(layer)
    details = [f"{_folded(layers)}: {reason}" for reason, layers in reasons.items()]
    changed = [f"changes {_folded(alternative.changed)} too"] if alternative.changed else []
    return Item(_placements(alternative), (*details, *changed))


def _table(explanation: PathExplanation, alternatives: Sequence[Alternative]) -> Table:
    before = explanation.figures
    rows = [("as planned", _styles(layer.style for layer in explanation.layers), *_figure_cells(before, before), "0")]
    rows += [_alternative_cells(each, before) for each in alternatives]
    heads = ("stored", "computed", *_FIGURE_HEADS, "changed")
    return Table(heads, tuple(rows), frozenset(heads[2:]))


def _alternative_cells(alternative: Alternative, before: Figures) -> tuple[str, ...]:
    if alternative.figures is None:
        return (_placements(alternative), "refused", *[""] * len(_FIGURE_HEADS), "")
    styles = _styles(style for _, style, _ in alternative.styles)
    figures = _figure_cells(alternative.figures, before)
    return (_placements(alternative), styles, *figures, str(len(alternative.changed)))


def _figure_cells(figures: Figures, before: Figures) -> tuple[str, ...]:
    return (
        with_change(figures.collectives, before.collectives, str),
        with_change(figures.wire_bytes, before.wire_bytes, bytes_text),
        with_change(figures.parameter_bytes, before.parameter_bytes, bytes_text),
        with_change(figures.peak_bytes, before.peak_bytes, bytes_text),
    )


def _styles(styles: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(styles))


def _placements(alternative: Alternative) -> str:
    """Return for example ``kernel S(1), bias S(0)``: each name of a variable once, however many blocks have it."""
    pairs = [(key.rpartition("/")[2], placement) for key, placement in alternative.placements]
    distinct = dict.fromkeys(pairs)
    if len(distinct) > 1 and {placement for _, placement in distinct} == {"R"}:
        return "all R"
    return ", ".join(f"{name} {placement}" for name, placement in distinct)


def _folded(names: Iterable[str]) -> str:
    return ", ".join(map(str, fold_names(names)))


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
