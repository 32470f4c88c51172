"""A plan as one page of HTML, to look at in a browser: it loads nothing, neither from a network nor from a file.

The page is complete without its script, which folds, filters and sorts what is there. All that comes from the plan
is escaped, and the page's policy lets no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from itertools import groupby

from tp_planner.ir.figures import figures_of, local_bytes, whole_bytes
from tp_planner.ir.names import fold_names
from tp_planner.ir.placement import Placement, Shape, local_shape
from tp_planner.ir.plan import Plan, RuleReport
from tp_planner.ir.plan_json import plan_hash
from tp_planner.ir.step import Collective, MemoryUse
from tp_planner.ir.verdict import Verdict
from tp_planner.report.amounts import bytes_text
from tp_planner.report.guesses import guess_lines
from tp_planner.report.holders import HOLDER_HEADS, holder_rows
from tp_planner.report.html_tree import kind_text, model_tree, searched_text, shape_text
from tp_planner.report.markup import Markup, bytes_element, element, join, tip
from tp_planner.report.outline import Leaf, Node, outline, walk
from tp_planner.report.verdict import BEGINS, marks_of, verdict_sections

MEMORY_KINDS = ("parameters", "gradients", "optimizer", "activations", "temporaries")
PHASES = ("forward", "backward", "update")
RANKS_DRAWN = 16
TABLE_HEADS = ("#", "layer", "layers", "style", "bytes", "on rank 0", "collectives", "each rank sends")


def plan_to_html(plan: Plan, estimate: Sequence[str] = (), verdict: Verdict | None = None) -> str:
    """Return the plan as a page: totals, memory, the model as a tree with its weights and collectives, and tables.

    ``estimate`` are the lines of ``estimate_lines``, where there is one. With a ``verdict`` the page begins with it,
    and each layer has its differences.
    """
    tree = outline(plan)
    style, script = (files("tp_planner.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{plan.model} on {plan.mesh}"),
        element("style", Markup(style)),
    )
    marks = {} if verdict is None else marks_of(verdict)
    figures = (_verdict(verdict), _totals(plan), _notes(plan), _memory(plan), _estimate(estimate))
    sections = (*figures, model_tree(plan, tree, marks), _holders(plan), _layer_table(tree), _rules(plan))
    body = element("body", _header(plan), element("main", *sections), element("script", Markup(script)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _policy(style: str, script: str) -> str:
    """Return the policy that forbids everything but the page's own style and script."""
    own = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{own[0]}'; script-src 'sha256-{own[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


# What the plan is for, and its totals


def _header(plan: Plan) -> Markup:
    ranks = [element("i") for _ in range(min(plan.axis_size, RANKS_DRAWN))]
    facts = {
        "mesh": join(element("span", *ranks, class_="ranks", aria_hidden="true"), f"{plan.mesh}"),
        "layers are split over": f"{plan.axis}, {plan.axis_size} rank{'s' if plan.axis_size > 1 else ''}",
        **(
            {"the batch is split over": f"{plan.mesh.batch_axis}, {plan.replicas} replicas"}
            if plan.replicas > 1
            else {}
        ),
        "traced with": ", ".join(f"{shape_text(shape)} {dtype}" for shape, dtype in plan.inputs) or "no inputs",
        "optimizer": plan.step.optimizer or "none named",
        "loss": plan.step.loss or "none named",
        "plan": plan_hash(plan)[:12],
    }
    listed = [element("div", element("dt", name), element("dd", value)) for name, value in facts.items()]
    return element("header", element("p", "tensor-parallel plan"), element("h1", plan.model), element("dl", *listed))


def _verdict(verdict: Verdict | None) -> Markup:
    if verdict is None:
        return Markup("")
    first, *more = verdict_sections(verdict)
    sentences = [
        *first.sentences,
        *(sentence for each in more if each.title.startswith(BEGINS) for sentence in each.sentences),
    ]
    lines = (element("p", sentence) for sentence in sentences)
    state = "right" if verdict.is_same else "wrong"
    return element("section", element("h2", first.title), *lines, id="verdict", class_=state)


def _totals(plan: Plan) -> Markup:
    figures, whole = figures_of(plan), sum(map(whole_bytes, plan.variables))
    peak = figures.peak_bytes
    sharded = sum(variable.is_sharded for variable in plan.variables)
    cards = (
        _card(
            "collectives per step",
            element("data", str(figures.collectives), value=figures.collectives),
            *_by_kind(plan.collectives),
        ),
        _card(
            "each rank sends per step",
            bytes_element(figures.wire_bytes),
            *_sent_by_phase(plan.collectives),
        ),
        _card(
            "variables on rank 0",
            bytes_element(figures.parameter_bytes),
            join("of ", bytes_element(whole), " in the model"),
            f"{sharded} of {len(plan.variables)} variables are sharded",
        ),
        _card(
            "peak memory of rank 0",
            bytes_element(peak) if peak else "unknown",
            f"in the {plan.step.memory.peak_phase} phase" if peak else "the plan has no simulated step",
            *(element("b", "for guessed sizes", class_="warning") for _ in plan.guessed[:1] if peak),
        ),
    )
    return element("section", *cards, class_="cards", id="totals", aria_label="totals")


def _card(title: str, value: str, *more: str) -> Markup:
    lines = (element("p", line) for line in more)
    return element("div", element("h2", title), element("p", value, class_="big"), *lines, class_="card")


def _by_kind(collectives: Sequence[Collective]) -> list[str]:
    """Return one line for each kind of collective, with how many there are in each phase."""
    counts = Counter((each.kind, each.phase) for each in collectives)
    lines = []
    for kind in sorted({kind for kind, _ in counts}):
        phases = ", ".join(f"{counts[kind, phase]} {phase}" for phase in PHASES if counts[kind, phase])  # type: ignore[index]
        lines.append(f"{kind_text(kind)}: {phases}")
    implicit = sum(not each.is_planned for each in collectives)
    return [*lines, f"{implicit} implicit" if implicit else "none implicit"]


def _sent_by_phase(collectives: Sequence[Collective]) -> list[str]:
    sent: Counter[str] = Counter()
    for each in collectives:
        sent[each.phase] += each.wire_bytes
    return [f"{phase}: {bytes_text(sent[phase])}" for phase in PHASES if sent[phase]]


def _notes(plan: Plan) -> Markup:
    if not plan.notes:
        return Markup()
    listed = (element("li", note) for note in plan.notes)
    return element("section", element("h2", "Notes"), element("ul", *listed), id="notes")


def _estimate(lines: Sequence[str]) -> Markup:
    if not lines:
        return Markup()
    return element("section", element("h2", "Estimated time"), element("pre", "\n".join(lines)), id="estimate")


# Memory


def _memory(plan: Plan) -> Markup:
    memory = plan.step.memory
    whole = sum(map(whole_bytes, plan.variables))
    rows = [("one device: variables", [("single", whole)])]
    rows += [(f"{ranks}: variables", [("parameters", size)]) for ranks, size in _ranks_alike(plan)]
    if memory.peak.total:
        rows.append((f"rank 0 at its peak: {memory.peak_phase}", _parts(memory.peak)))
    scale = max(whole, memory.peak.total, 1)
    bars = [
        element(
            "div",
            element("span", name),
            _bar(parts, scale),
            bytes_element(sum(size for _, size in parts)),
            class_="bar",
        )
        for name, parts in rows
    ]
    guessed = [element("p", line, class_="warning") for line in guess_lines(plan.guessed)]
    details = _memory_table(plan) if memory.peak.total else _quiet("What a step needs beside its variables is unknown.")
    return element("section", element("h2", "Memory per rank"), *guessed, *bars, details, id="memory")


def _parts(use: MemoryUse) -> list[tuple[str, int]]:
    return [(kind, getattr(use, kind)) for kind in MEMORY_KINDS]


def _ranks_alike(plan: Plan) -> list[tuple[str, int]]:
    """Return how many bytes of variables each rank has, neighbours that have as many together."""
    mesh, parts = plan.mesh, plan.axis_size
    elements: Counter[tuple[Shape, Placement, Placement]] = Counter()  # bytes of one element of variables alike
    for each in plan.variables:
        elements[each.shape, each.placement, each.batch_placement] += each.itemsize

    def stored(shape: Shape, placed: Placement, across: Placement, rank: int) -> int:
        shape = local_shape(shape, placed, parts, mesh.coordinate(rank, plan.axis))
        replica = mesh.coordinate(rank, mesh.batch_axis) if mesh.batch_axis else 0
        return math.prod(local_shape(shape, across, plan.replicas, replica))

    sizes = [sum(stored(*kind, rank) * n for kind, n in elements.items()) for rank in range(mesh.size)]
    alike = []
    for size, run in groupby(range(mesh.size), lambda rank: sizes[rank]):
        first, *others = run
        alike.append((f"ranks {first} to {others[-1]}, each" if others else f"rank {first}", size))
    return alike


def _bar(parts: Sequence[tuple[str, int]], scale: int) -> Markup:
    rects, left = [], 0
    for kind, size in parts:
        rects.append(
            element("rect", x=_percent(left, scale), width=_percent(size, scale), height="100%", class_=f"fill-{kind}")
        )
        left += size
    label = ", ".join(f"{kind} {bytes_text(size)}" for kind, size in parts)
    return element("svg", *rects, role="img", aria_label=label)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3f}%"


def _memory_table(plan: Plan) -> Markup:
    memory = plan.step.memory
    heads = (element("th", text, scope="col") for text in ("rank 0", "at the peak", "at its own largest"))
    rows = [
        element(
            "tr",
            element("th", element("i", class_=f"swatch swatch-{kind}"), kind, scope="row"),
            element("td", bytes_element(size)),
            element("td", bytes_element(getattr(memory.largest, kind))),
        )
        for kind, size in _parts(memory.peak)
    ]
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *rows))
    if memory.reserved is not None:
        words = "CUDA's kernels, allocated in blocks of 512 B; reserved by PyTorch's caching allocator: "
        table = join(table, _quiet(words + bytes_text(memory.reserved)))
    if not plan.step.optimizer:
        table = join(table, _quiet("No optimizer is named, so its state and its update are not in these figures."))
    if not plan.step.loss:
        table = join(
            table, _quiet("No loss of Keras is named: the sum of the outputs stands for it, and takes less memory.")
        )
    return table


def _holders(plan: Plan) -> Markup:
    """Return what is held at the peak, by layer and op."""
    if not plan.step.holders:
        return Markup()
    heads = (element("th", text, scope="col") for text in HOLDER_HEADS)
    rows = (
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:]))
        for row in holder_rows(plan)
    )
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *rows))
    title = f"Held at the peak, {plan.step.memory.peak_phase}"
    return element("section", element("h2", title), element("div", table, class_="wide"), id="holders")


def _quiet(text: str) -> Markup:
    return element("p", text, class_="quiet")


# Tables


def _layer_table(tree: Sequence[Node]) -> Markup:
    heads = [
        element(
            "th", element("button", head, type="button"), scope="col", aria_sort="ascending" if head == "#" else "none"
        )
        for head in TABLE_HEADS
    ]
    rows = [(leaf, times, name, _figures(leaf, times)) for leaf, times, name in walk(tree)]
    body = [
        element(
            "tr",
            _number(position),
            element("th", element("code", name), scope="row"),
            _number(times),
            element("td", element("b", leaf.style, class_=f"badge {leaf.style}") if leaf.style else ""),
            *_figure_cells(figures),
            data_search=searched_text(leaf, name),
        )
        for position, (leaf, times, name, figures) in enumerate(rows, 1)
    ]
    sums = [sum(column) for column in zip(*(figures for *_, figures in rows), strict=True)] or [0] * 4
    count = sum(times for leaf, times, _, _ in rows if leaf.plan)
    foot = (element("td"), element("th", "in all", scope="row"), _number(count), element("td"), *_figure_cells(sums))
    table = element(
        "table",
        element("thead", element("tr", *heads)),
        element("tbody", *body),
        element("tfoot", element("tr", *foot)),
        class_="sortable",
    )
    return element("section", element("h2", "Layers"), element("div", table, class_="wide"), id="layers")


def _figures(leaf: Leaf, times: int) -> tuple[int, int, int, int]:
    """Return the sums of all layers that the leaf stands for: bytes, bytes on rank 0, collectives, bytes sent."""
    whole, local = sum(map(whole_bytes, leaf.variables)), sum(map(local_bytes, leaf.variables))
    made = sum(count for _, count in leaf.collectives)
    sent = sum(count * collective.wire_bytes for collective, count in leaf.collectives)
    return whole * times, local * times, made * times, sent * times


def _figure_cells(figures: Sequence[int]) -> list[Markup]:
    whole, local, made, sent = figures
    return [
        element("td", bytes_element(whole)),
        element("td", bytes_element(local)),
        _number(made),
        element("td", bytes_element(sent)),
    ]


def _number(value: int) -> Markup:
    return element("td", element("data", str(value), value=value))


def _rules(plan: Plan) -> Markup:
    if not plan.rules:
        return Markup()
    heads = (element("th", head, scope="col") for head in ("rule", "mesh axes", "places"))
    rows = (element("tr", *_rule_cells(report, number)) for number, report in enumerate(plan.rules))
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *rows))
    return element("section", element("h2", "Layout rules"), element("div", table, class_="wide"), id="rules")


def _rule_cells(report: RuleReport, number: int) -> tuple[Markup, Markup, Markup]:
    placed = [*report.variables, *(f"{name}/output" for name in report.outputs)]
    names = [str(name) for name in fold_names(placed)]
    said = (
        f"{len(placed)} variable{'s' if len(placed) != 1 else ''}" if not report.outputs else f"{len(placed)} tensors"
    )
    found = tip(said, f"r{number}", names) if placed else element("b", "nothing", class_="warning")
    axes = ", ".join("+".join(axis) if isinstance(axis, tuple) else str(axis) for axis in report.rule.axes)
    return (
        element("th", element("code", report.rule.pattern), scope="row"),
        element("td", f"({axes})"),
        element("td", found),
    )
