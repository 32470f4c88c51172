"""Works: what each way of each step computes, the last step first: those after it say how gradients come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tp_planner.dryrun.op_work import OpMeter
from tp_planner.ir.graph import ModelGraph
from tp_planner.ir.placement import Placement, Shape
from tp_planner.search.computing import Computed
from tp_planner.search.steps import Step
from tp_planner.search.ways import Slot, Way

Placed = tuple[int, Placement]  # a tensor that is placed so


def works_of(found: Sequence[tuple[Step, Sequence[Way]]], graph: ModelGraph, meter: OpMeter) -> list[list[Computed]]:
    """Return what the ways of each step compute.

    Gradients of a tensor that is placed so come as the first way of the last step leaves them that takes it so. Before
    a block that repeats another they are in memory as the tensor.
    """
    gradients: dict[Placed, Shape] = {}
    works: list[list[Computed]] = []
    for _, ways in reversed(found):
        left: dict[Placed, Shape] = {}
        works.append([_computed(way, graph, meter, gradients, left) for way in ways])
        for placed, strides in left.items():
            if 0 in gradients.setdefault(placed, strides):  # a sum is not expanded
                gradients[placed] = strides
    return works[::-1]


def _computed(
    way: Way, graph: ModelGraph, meter: OpMeter, gradients: Mapping[Placed, Shape], left: dict[Placed, Shape]
) -> Computed:
    """Return what a way computes; note in ``left`` how it leaves gradients, if no way before has."""
    made, taken = _tensors(way.made), _tensors(way.given)
    given = {placed[0]: gradients[placed] for placed in made if placed in gradients}
    measured = way.computed.measured(meter, graph.tensors, given)
    for placed in taken:
        if placed[0] in measured.strides:
            left.setdefault(placed, measured.strides[placed[0]])
    return measured


def _tensors(placed: Sequence[tuple[Slot, Placement]]) -> list[Placed]:
    return [(slot.name, placement) for slot, placement in placed if isinstance(slot.name, int)]
