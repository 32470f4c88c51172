"""Whether a parallel model is the same function as on one device, as sections of a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tp_planner.ir.names import FoldedName, fold_names
from tp_planner.ir.plan import LayerPlan
from tp_planner.ir.verdict import Beginning, Judged, Verdict
from tp_planner.report.html_tree import Mark
from tp_planner.report.sections import Item, Section, Table

# The columns of the table, and the kinds of tensors in each. Differences are relative, in both dtypes.
_COLUMNS = {
    "output": ("output",),
    "gradient at output": ("gradient at",),
    "gradients of variables": ("gradient of",),
    "variables and slots after": ("weight", "slot"),
}
BEGINS = "it begins to differ at"
UNITS = "roundings"  # how many times one device's own
SHOWN = 12  # wrong tensors that are listed


def verdict_sections(verdict: Verdict) -> list[Section]:
    """Return the report: the verdict, where it begins to differ if it does, and the differences by layer."""
    sections = [_heading(verdict)]
    if verdict.begins is not None:
        sections += [_beginning(verdict, verdict.begins), _wrong(verdict)]
    return [*sections, _by_layer(verdict)]


def _heading(verdict: Verdict) -> Section:
    plan, tensors = verdict.plan, verdict.tensors
    ranks = "1 process" if plan.mesh.size == 1 else f"{plan.mesh.size} processes"
    title = (
        f"{plan.model!r} on mesh ({plan.mesh}) is {'' if verdict.is_same else 'NOT '}the function it is on one device"
    )
    if not verdict.is_same:
        failed = (f"a rank has failed, nothing was compared after that: {verdict.failure}",) if verdict.failure else ()
        return Section(title, (*failed, f"{len(verdict.wrong)} of {len(tensors)} tensors differ by more than rounding"))
    sentences = [f"{len(tensors)} tensors of {ranks} were compared: outputs, gradients, values after the steps"]
    worst = max(tensors, key=lambda each: each.narrow)
    sentences.append(f"largest difference in {verdict.dtype}: {worst.narrow:.1e} ({worst.event})")
    if most_units := max((each.units for each in tensors if each.units is not None), default=None):
        sentences.append(f"no difference is more than {most_units:.1f} times the rounding of one device itself")
    wide = [(each.wide, each) for each in tensors if each.wide is not None]
    if wide:
        most, worst = max(wide, key=lambda pair: pair[0])
        sentences.append(f"largest difference in float64: {most:.1e} ({worst.event})")
    return Section(title, tuple(sentences))


def _beginning(verdict: Verdict, begins: Beginning) -> Section:
    first, names = begins.first, begins.layers
    sentences = [
        f"the first tensor that differs is the {first.event}: {_both(first, verdict.dtype)}, {first.judgement}"
    ]
    if first.disagreement:
        sentences.append(f"ranks that should hold equal values differ by {first.disagreement:.1e}")
    planned = [layer for layer in verdict.plan.layers if layer.layer in names]
    items = tuple(Item(f"{each.layer}: {each.style}: {each.reason}", tuple(_ends(each))) for each in planned)
    said = f"see what the plan does there, and why: tp-planner explain {names[0]!r} MODEL --layout LAYOUT --mesh MESH"
    return Section(f"{BEGINS} {', '.join(map(repr, names))}", (*sentences, said), items)


def _ends(layer: LayerPlan) -> Iterator[str]:
    for place, boundary in layer.boundaries:
        if not boundary.is_identity:
            yield f"{place}: forward {boundary.forward}, backward {boundary.backward}"
    if layer.output is None and layer.output_placement is not None:
        yield f"output: {layer.output_placement}"


def _wrong(verdict: Verdict) -> Section:
    wrong = verdict.wrong
    rows = tuple(
        (str(each.event), each.placement, _said(each.narrow), _said(each.wide), each.judgement)
        for each in wrong[:SHOWN]
    )
    heads = ("tensor", "placement", verdict.dtype, "float64", "is")
    more = (f"and {len(wrong) - SHOWN} more",) if len(wrong) > SHOWN else ()
    return Section("differences that are no rounding, in order", more, table=Table(heads, rows, frozenset(heads[2:4])))


def marks_of(verdict: Verdict) -> dict[str, Mark]:
    """Return what a page says of each layer: the largest difference of what is its own, and of layers like it."""
    marks: dict[str, Mark] = {}
    for folded, found in _folded(verdict):
        text = _worst(found, tuple(each.event.kind for each in found))
        mark = Mark(f"differs by {text}", any(each.is_wrong for each in found))
        marks |= dict.fromkeys(folded.members, mark)
    return marks


def _folded(verdict: Verdict) -> Iterator[tuple[FoldedName, list[Judged]]]:
    """Yield layers, equal ones folded, with what was compared of them and of their variables."""
    by_layer: dict[str, list[Judged]] = {}
    for each in verdict.tensors:
        kind, name = each.event.kind, each.event.name
        if kind not in ("loss", "metric"):
            by_layer.setdefault("optimizer" if kind == "slot" else verdict.layer_of(name), []).append(each)
    for folded in fold_names(by_layer):
        yield folded, [each for member in folded.members for each in by_layer[member]]


def _by_layer(verdict: Verdict) -> Section:
    rows = []
    for folded, found in _folded(verdict):
        cells = (_worst(found, kinds) for kinds in _COLUMNS.values())
        units = max((each.units for each in found if each.units is not None), default=None)
        times = "" if units is None else f"{units:.1f}"
        rows.append((str(folded), *cells, times, "ERROR" if any(each.is_wrong for each in found) else ""))
    return Section(
        f"largest differences by layer, {verdict.dtype} / float64, relative to the largest element",
        table=Table(("layer", *_COLUMNS, UNITS, ""), tuple(rows), frozenset({*_COLUMNS, UNITS})),
    )


def _worst(found: Iterable[Judged], kinds: tuple[str, ...]) -> str:
    those = [each for each in found if each.event.kind in kinds]
    if not those:
        return ""
    narrow = max(each.narrow for each in those)
    wide = [each.wide for each in those if each.wide is not None]
    return f"{narrow:.0e} / {max(wide):.0e}" if wide else f"{narrow:.0e}"


def _both(judged: Judged, dtype: str) -> str:
    return f"{_said(judged.narrow)} in {dtype}, {_said(judged.wide)} in float64"


def _said(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1e}"
