"""Why one layer or variable is planned as it is, as sections of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tp_planner.ir.explanation import Alternative, Crossing, PathExplanation, StoredVariable
from tp_planner.ir.figures import Figures
from tp_planner.ir.placement import Shape
from tp_planner.ir.step import Collective
from tp_planner.report.amounts import bytes_text, with_change
from tp_planner.report.names import fold_names
from tp_planner.report.sections import Section, Table

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
        sentences = ["no layer of it has a variable or a boundary: it computes on what it is given"]
    if len(explanation.equals) > 1:
        sentences.append(f"{len(explanation.equals)} blocks are planned alike: {_folded(explanation.equals)}")
    return Section(
        f"{explanation.path} ({explanation.kind}) of {explanation.model!r} on mesh ({explanation.mesh})",
        tuple(sentences),
    )


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
    reasons = tuple(f"{each.key} is {each.placement}: {each.reason}" for each in variables)
    return [Section("variables", reasons, Table(heads, rows, frozenset(heads[-2:])))]


def _ends(explanation: PathExplanation) -> list[Section]:
    rows = tuple(
        (layer.layer, *_crossing_cells(crossing), _then(crossing, layer.after_output))
        for layer in explanation.layers
        for crossing in layer.crossings
        if not crossing.place.startswith("variable") or "->" in crossing.forward + crossing.backward
    )
    if not rows:
        return []
    heads = ("layer", "where", "tensor", "shape", "forward", "gradient", "")
    legend = "R: whole on every rank; S(d): sharded on dim d; P: a summand on every rank"
    return [Section("what enters and leaves", (legend,), Table(heads, rows))]


def _crossing_cells(crossing: Crossing) -> tuple[str, ...]:
    place = crossing.place.replace("variable ", "")
    shape = _shape(crossing.shape) if crossing.tensor else ""
    return (place, crossing.tensor, shape, crossing.forward, crossing.backward)


def _then(crossing: Crossing, after_output: str) -> str:
    if crossing.shared_with:
        return f"shared with {_folded(crossing.shared_with)}"
    return f"then {after_output}" if crossing.place == "output" and after_output else ""


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
            each.place,
            bytes_text(each.bytes * times),
            bytes_text(each.wire_bytes * times),
            each.cause or each.reason,
        )
        for each, times in Counter(collectives).items()
    )
    return Section(
        f"collectives of one training step: {len(collectives)}",
        (),
        Table(heads, rows, frozenset({"times", "bytes", "wire bytes"})),
    )


def _alternatives(explanation: PathExplanation) -> list[Section]:
    sections = []
    if explanation.alternatives:
        title = "alternatives: other rules for its exact path, each planned; whole model, one step, one rank"
        sections.append(_alternatives_section(title, explanation, explanation.alternatives))
    if explanation.alternatives_for_equals:
        title = f"alternatives for all {len(explanation.equals)} blocks together: {_folded(explanation.equals)}"
        sections.append(_alternatives_section(title, explanation, explanation.alternatives_for_equals))
    return sections


def _alternatives_section(
    title: str, explanation: PathExplanation, alternatives: Sequence[Alternative]
) -> Section:
    before = explanation.figures
    rows = [("as planned", _styles(explanation), *_figure_cells(before, before), "")]
    rows += [_alternative_cells(each, before) for each in alternatives]
    heads = ("stored", "computed", *_FIGURE_HEADS, "others that change")
    problems = tuple(f"{_placements(each)} is refused: {each.problem}" for each in alternatives if each.problem)
    return Section(title, problems, Table(heads, tuple(rows), frozenset(_FIGURE_HEADS)))


def _alternative_cells(alternative: Alternative, before: Figures) -> tuple[str, ...]:
    if alternative.figures is None:
        return (_placements(alternative), "refused", *[""] * len(_FIGURE_HEADS), "")
    styles = ", ".join(dict.fromkeys(style for _, style, _ in alternative.styles))
    changed = ", ".join(map(str, fold_names(alternative.changed)))
    return (_placements(alternative), styles, *_figure_cells(alternative.figures, before), changed)


def _figure_cells(figures: Figures, before: Figures) -> tuple[str, ...]:
    return (
        with_change(figures.collectives, before.collectives, str),
        with_change(figures.wire_bytes, before.wire_bytes, bytes_text),
        with_change(figures.parameter_bytes, before.parameter_bytes, bytes_text),
        with_change(figures.peak_bytes, before.peak_bytes, bytes_text),
    )


def _styles(explanation: PathExplanation) -> str:
    return ", ".join(dict.fromkeys(layer.style for layer in explanation.layers))


def _placements(alternative: Alternative) -> str:
    """Return for example ``kernel S(1), bias S(0)``: each name of a variable once, however many blocks have it."""
    pairs = ((key.rpartition("/")[2], placement) for key, placement in alternative.placements)
    return ", ".join(f"{name} {placement}" for name, placement in dict.fromkeys(pairs))


def _folded(names: Iterable[str]) -> str:
    return ", ".join(map(str, fold_names(names)))


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
