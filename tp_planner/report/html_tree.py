"""The tree of a model in the page of a plan: its layers, their weights cut into shards, and what happens between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from tp_planner.ir.placement import Placement, Replicate, Shape, Shard, StridedShard, chunk_sizes
from tp_planner.ir.plan import Boundary, Plan, Transition, VariablePlan
from tp_planner.ir.step import Collective
from tp_planner.report.markup import Markup, element, join, tip
from tp_planner.report.names import without_numbers_of
from tp_planner.report.outline import Edge, Leaf, Node, walk
from tp_planner.report.quantities import byte_size, bytes_element, dashed, human_bytes, shape_text

STYLES = {
    "column": "an output dim of the weight is sharded",
    "row": "a contracted dim of the weight is sharded",
    "vocabulary": "the looked-up dim is sharded",
    "batched": "a dim of input, weight and output is sharded",
    "elementwise": "works on shards as they are",
    "gathered": "stored sharded, gathered at use",
    "replicated": "the same on every rank",
}
UNFOLDED_UP_TO = 60  # layers of a tree that is open at first
LANES_UP_TO = 4
CUTS_UP_TO = 32  # parts of a drawn weight, above which there would be nothing but lines
NAMES_UP_TO = 16  # names of equal blocks in an explanation
DEEPEST = 8  # level above which names are no longer moved to the right

Say = Callable[[str], str]  # a text of one layer made a text of all that it stands for


def model_tree(plan: Plan, tree: Sequence[Node]) -> Markup:
    """Return the section with the tree, its legend, and the tools that fold and filter it."""
    leaves = [leaf for leaf, _, _ in walk(tree)]
    drawing = _Tree(plan, _bands(leaves), len(leaves) <= UNFOLDED_UP_TO)
    lanes = f"lanes-{min(plan.axis_size, LANES_UP_TO)}"
    return element(
        "section",
        element("h2", "Model"),
        element("div", *_legend(plan), class_=f"legend {lanes}"),
        element("div", *_tools(), class_="tools"),
        element("div", *(drawing.node(node, 0, "", 1) for node in tree), class_=f"tree {lanes}"),
        id="model",
    )
