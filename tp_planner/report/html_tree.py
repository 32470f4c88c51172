"""The tree of a model in the page of a plan: layers, their weights cut into shards, and what happens between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tp_planner.ir.figures import local_bytes, whole_bytes
from tp_planner.ir.names import without_numbers_of
from tp_planner.ir.placement import Replicate, Shape
from tp_planner.ir.plan import Boundary, Plan, Transition, VariablePlan
from tp_planner.ir.step import Collective, CollectiveKind
from tp_planner.report.amounts import bytes_text
from tp_planner.report.drawing import draw_tensor
from tp_planner.report.markup import Markup, bytes_element, element, join, tip
from tp_planner.report.outline import Edge, Leaf, Node, walk

STYLES = {
    "column": "an output dim of the weight is sharded",
    "row": "a contracted dim of the weight is sharded",
    "vocabulary": "the looked-up dim is sharded",
    "batched": "a dim of input, weight and output is sharded",
    "sequence": "works on shards of the sequence",
    "elementwise": "works on shards as they are",
    "gathered": "stored sharded, gathered at use",
    "replicated": "the same on every rank",
}
UNFOLDED_UP_TO = 60  # layers of a tree that is open at first
LANES_UP_TO = 8
SIDES = ("input", "variable", "function", "other", "output")  # of edges: the first two above their layer
NAMES_UP_TO = 16  # names of equal blocks in an explanation
DEEPEST = 8  # level above which names are no longer moved to the right

Say = Callable[[str], str]  # a text of one layer made a text of all that it stands for


@dataclass(frozen=True, slots=True)
class _Setting:
    """What is the same for the whole tree: number of ranks, the band of each leaf, and whether blocks are unfolded."""

    ranks: int
    bands: Mapping[int, str]
    unfolded: bool
    marks: Mapping[str, Mark]


@dataclass(frozen=True, slots=True)
class Mark:
    """What a page says of a layer beside its plan: a short text, and whether it is that something is wrong."""

    text: str
    is_wrong: bool


def model_tree(plan: Plan, tree: Sequence[Node], marks: Mapping[str, Mark] | None = None) -> Markup:
    """Return the section with the tree, its legend, and the tools that fold and filter it; ``marks`` are by layer."""
    leaves = [leaf for leaf, _, _ in walk(tree)]
    setting = _Setting(plan.axis_size, _bands(leaves), len(leaves) <= UNFOLDED_UP_TO, marks or {})
    lanes = f"lanes-{min(plan.axis_size, LANES_UP_TO)}"
    return element(
        "section",
        element("h2", "Model"),
        element("div", *_legend(leaves, setting), class_=f"legend {lanes}"),
        element("div", *_tools(), class_="tools"),
        element("div", _heads(), *(_node(setting, node, "", 0, 1) for node in tree), class_=f"tree {lanes}"),
        id="model",
    )


def _legend(leaves: Sequence[Leaf], setting: _Setting) -> tuple[Markup, Markup]:
    used = {leaf.style for leaf in leaves}
    styles = (
        element("span", element("b", style, class_=f"badge {style}"), f" {meaning}")
        for style, meaning in STYLES.items()
        if style in used
    )
    region = element("span", element("i", class_="lanes"), " activations are sharded")
    signs = (
        region if any(setting.bands.values()) else "",
        element("span", element("i", class_="swatch swatch-parameters"), " rank 0's part of a weight"),
        element("span", element("b", "R"), " whole on every rank"),
        element("span", element("b", "S(d)"), " sharded on dim d"),
        element("span", element("b", "P"), " a summand on every rank"),
    )
    return element("p", *styles), element("p", *signs)


def _tools() -> tuple[Markup, ...]:
    return (
        element("input", type="search", id="filter", placeholder="filter layers", aria_label="filter layers"),
        element("span", id="found", role="status"),
        element("button", "unfold all", type="button", id="unfold"),
        element("button", "fold all", type="button", id="fold"),
    )


def _heads() -> Markup:
    """Return the line above the tree that says what its columns are."""
    names = ("", "layer", "style", "variables", "bytes on rank 0")
    return element("div", *(element("span", name) for name in names), class_="line heads")


def searched_text(leaf: Leaf, name: str) -> str:
    """Return what the filter looks at: names, style and class of the layer, and names of its variables."""
    class_name = leaf.plan.class_name if leaf.plan else ""
    names = (variable.key.rpartition("/")[2] for variable in leaf.variables)
    return " ".join([name, leaf.style, class_name, *names]).lower()


def shape_text(shape: Shape) -> str:
    """Return a shape as ``64x8``."""
    return "x".join(map(str, shape)) or "scalar"


def kind_text(kind: CollectiveKind) -> str:
    """Return a kind of collective as it is written in prose: ``all-reduce``."""
    return kind.replace("_", "-")


# Blocks


def _node(setting: _Setting, node: Node, prefix: str, depth: int, times: int) -> Markup:
    name, times = f"{prefix}{node.joint}{node.name}", times * node.times
    if node.leaf is not None:
        return _layer(setting, node, node.leaf, name, depth, times)
    leaves = list(walk(node.children))
    bands = [setting.bands[leaf.order] for leaf, _, _ in leaves]
    return element(
        "details",
        element("summary", *_block(node, depth)),
        *(_node(setting, child, name, depth + 1, times) for child in node.children),
        class_="block from" if "from" in bands[0] else "block",
        open=setting.unfolded,
    )


def _block(node: Node, depth: int) -> tuple[str, ...]:
    """Return the cells of a block's own line: name, styles of its layers, sums of what is in it."""
    leaves = list(walk(node.children))
    strip = (element("i", class_=leaf.style) for leaf, _, _ in leaves if leaf.style)
    made = sum(n * count for leaf, n, _ in leaves for _, count in leaf.collectives)
    said = f"{made} collective{'s' if made > 1 else ''}" + (f" each, {made * node.times} in all" * (node.times > 1))
    return (
        element("span", class_="rail"),
        _name(node, depth, ""),
        element("span", *strip, class_="strip", aria_hidden="true"),
        element("span", said if made else "", class_="sum"),
        _stored([(variable, n * node.times) for leaf, n, _ in leaves for variable in leaf.variables]),
    )


def _name(node: Node, depth: int, class_name: str) -> Markup:
    chip = Markup()
    if node.times > 1:
        members = node.name.members
        more = [f"and {node.times - NAMES_UP_TO} more"] if node.times > NAMES_UP_TO else []
        first = _first_order(node)
        chip = tip(f"{node.times} equal", f"n{depth}-{first}", [*members[:NAMES_UP_TO], *more], "chip")
    shown = (element("code", str(node.name) or "·"), chip, element("small", class_name))
    return element("span", *shown, class_=f"name depth-{min(depth, DEEPEST)}")


def _first_order(node: Node) -> int:
    return next(leaf.order for leaf, _, _ in walk([node]))


def _stored(variables: Sequence[tuple[VariablePlan, int]]) -> Markup:
    """Return the bytes on rank 0 and those of the whole variables, each with how often it is there."""
    whole = sum(n * whole_bytes(variable) for variable, n in variables)
    local = sum(n * local_bytes(variable) for variable, n in variables)
    cells = (bytes_element(local), element("small", " of ", bytes_element(whole))) if whole else ()
    return element("span", *cells, class_="size")


# Layers


def _layer(setting: _Setting, node: Node, leaf: Leaf, name: str, depth: int, times: int) -> Markup:
    def say(text: str) -> str:
        return without_numbers_of(leaf.name, text) if times > 1 else text

    mark = setting.marks.get(leaf.name)
    cells = (
        element("span", class_="rail"),
        _name(node, depth, leaf.plan.class_name if leaf.plan else ""),
        _style(leaf, say, mark),
        element("span", *_weights(setting, leaf, say), class_="weights"),
        _stored([(variable, 1) for variable in leaf.variables]),
    )
    band = setting.bands[leaf.order]
    edges: dict[str, list[Markup]] = {side: [] for side in SIDES}
    for number, edge in enumerate(leaf.edges):
        said = _region_end(edge, band)
        edges[edge.side].append(_edge(edge, said, f"l{leaf.order}-e{number}", depth, times, say))
    return element(
        "div",
        *(*edges["input"], *edges["variable"]),
        element("div", *cells, class_="line"),
        *(*edges["function"], *edges["other"], *edges["output"]),
        class_=" ".join(filter(None, ("layer", band, _state(mark)))),
        data_search=searched_text(leaf, name),
    )


def _state(mark: Mark | None) -> str:
    return "" if mark is None else "wrong" if mark.is_wrong else "right"


def _style(leaf: Leaf, say: Say, mark: Mark | None) -> Markup:
    said = element("small", mark.text, class_="mark") if mark else ""
    if leaf.plan is None:
        return element("span", said, class_="style")
    badge = element("b", leaf.style, class_=f"badge {leaf.style}")
    flow = "" if leaf.enters == leaf.makes == Replicate() else f"{leaf.enters} → {leaf.makes}"
    lines = [say(leaf.plan.reason), *([f"takes {leaf.enters}, makes {leaf.makes}"] if flow else [])]
    return element("span", tip(badge, f"l{leaf.order}", lines), element("small", flow), said, class_="style")


def _weights(setting: _Setting, leaf: Leaf, say: Say) -> list[Markup]:
    gathered = {use.variable for use in leaf.plan.uses if use.boundary.forward.collective} if leaf.plan else set()
    weights = [
        _weight(setting, variable, variable.key in gathered, f"l{leaf.order}-v{number}", say)
        for number, variable in enumerate(leaf.variables)
    ]
    return [*weights, *(element("small", "uses ", element("code", say(key))) for key in leaf.borrowed)]


def _weight(setting: _Setting, variable: VariablePlan, is_gathered: bool, id: str, say: Say) -> Markup:
    state = "gathered" if is_gathered else "sharded" if variable.is_sharded else "replicated"
    stored = f"{variable.stored_as}: {shape_text(variable.local_shape)}, {bytes_text(local_bytes(variable))} on rank 0"
    lines = [
        say(variable.key),
        f"{shape_text(variable.shape)} {variable.dtype}, {bytes_text(whole_bytes(variable))}",
        stored + (", gathered whole at use" if is_gathered else ""),
        say(variable.reason),
        *([] if variable.trainable else ["not trainable"]),
    ]
    caption = element("span", element("code", variable.key.rpartition("/")[2]), element("small", *_cut_shape(variable)))
    return tip(
        join(draw_tensor(variable.shape, variable.placement, setting.ranks), caption), id, lines, f"weight {state}"
    )


def _cut_shape(variable: VariablePlan) -> list[str]:
    """Return the shape; of the sharded dim, how much of it rank 0 has."""
    parts: list[str] = []
    for length, local in zip(variable.shape, variable.local_shape, strict=True):
        parts += ["x", str(length) if length == local else element("mark", f"{local}/{length}")]
    return parts[1:] or ["scalar"]


# Edges


def _region_end(edge: Edge, band: str) -> str:
    """Return what the edge is to the region that its layer is in."""
    if "sharded" not in band:
        return ""
    if edge.side == "input" and "from" not in band:
        return "a region begins"
    return "the region ends" if edge.side == "output" and "to" not in band else ""


def _edge(edge: Edge, said: str, id: str, depth: int, times: int, say: Say) -> Markup:
    arrow = "\N{DOWNWARDS ARROW}" if edge.side in ("input", "output") else "\N{LEFT RIGHT ARROW}"
    changes = element("b", *_changes(edge.boundary)) if edge.boundary else ""
    pills = [
        _pill(collective, count, f"{id}-{n}", times, say) for n, (collective, count) in enumerate(edge.collectives)
    ]
    if edge.shared_with and not pills:
        pills.append(_shared(edge, id, say))
    label = element("span", f"{arrow} {say(edge.place)} ", changes, class_=f"name depth-{min(depth, DEEPEST)}")
    return element(
        "div", element("span", class_="rail"), label, *pills, element("small", said), class_=f"edge {edge.side}"
    )


def _pill(collective: Collective, count: int, id: str, times: int, say: Say) -> Markup:
    kind = kind_text(collective.kind)
    often = f"{count} times " if count > 1 else ""
    lines = [
        f"{kind} of {collective.bytes} bytes over {collective.group_size} ranks, {collective.phase}",
        say(collective.reason),
        say(collective.place),
        f"each rank sends {bytes_text(collective.wire_bytes)}",
    ]
    if count * times > 1:
        lines.append(f"{count * times} times per step")
    if not collective.is_planned:
        lines.append(f"implicit: {say(collective.cause)}")
    shown = join(f"{often}{kind} ", bytes_element(collective.bytes), f" {collective.phase}")
    return tip(shown, id, lines, f"pill {collective.phase}" + ("" if collective.is_planned else " implicit"))


def _shared(edge: Edge, id: str, say: Say) -> Markup:
    lines = [f"{say(edge.shared_with)} takes the same tensor in the same way: it is converted once"]
    return tip("shared", id, lines, "pill shared")


def _changes(boundary: Boundary) -> list[str]:
    """Return the change of placement forward, and that of the gradient where it says more."""
    forward, backward = boundary.forward, boundary.backward
    says_more = backward.source != backward.target or (forward.source == forward.target != backward.source)
    if not boundary.has_gradient or not says_more:
        return [_transition(forward)]
    return [_transition(forward), element("small", "  \N{UPWARDS ARROW} grad "), _transition(backward)]


def _transition(transition: Transition) -> str:
    return str(transition).replace("->", " → ")


# Regions


def _bands(leaves: Sequence[Leaf]) -> dict[int, str]:
    """Return the classes of each leaf: whether activations are sharded there, and just before and just after it.

    A region goes from the first layer that returns a shard to the last that takes one, whatever runs in between.
    """
    inside = [_takes_shards(leaf) or _returns_shards(leaf) for leaf in leaves]
    begun: dict[str, int] = {}  # scope of a region that goes on -> where it begins
    for position, leaf in enumerate(leaves):
        if _takes_shards(leaf) and _scope(leaf) in begun:
            inside[begun[_scope(leaf)] : position] = [True] * (position - begun[_scope(leaf)])
        if _returns_shards(leaf):
            begun.setdefault(_scope(leaf), position)
        elif _takes_shards(leaf):
            begun.pop(_scope(leaf), None)
    ends = [_takes_shards(leaf) and not _returns_shards(leaf) for leaf in leaves]
    joined = [
        inside[n] and inside[n + 1] and (not ends[n] or _takes_shards(leaves[n + 1])) for n in range(len(leaves) - 1)
    ]
    words = zip(inside, [False, *joined], [*joined, False], strict=True)
    return {
        leaf.order: " ".join(word for word, holds in zip(("sharded", "from", "to"), held, strict=True) if holds)
        for leaf, held in zip(leaves, words, strict=False)
    }


def _takes_shards(leaf: Leaf) -> bool:
    return leaf.plan is not None and bool(leaf.plan.sharded_inputs)


def _returns_shards(leaf: Leaf) -> bool:
    return leaf.leaves != Replicate()


def _scope(leaf: Leaf) -> str:
    return leaf.plan.scope if leaf.plan else ""
