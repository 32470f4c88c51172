"""Crossings: how a tensor, and its gradient, change where a region begins or ends.

``outside`` is the placement on the far side of the region: what the tensor is between regions.
"""

from __future__ import annotations

from dataclasses import dataclass

from tp_planner.ir.graph import ModelGraph, VariableInfo
from tp_planner.ir.placement import WHOLE, Partial, Placement, SequencePartial, SequenceShard
from tp_planner.ir.plan import Boundary, Transition

SUMMAND = Partial()


@dataclass(frozen=True, slots=True)
class Crossing:
    """The change of a tensor on the way forward, and that of its gradient on the way back."""

    forward: Transition
    backward: Transition


def entering(outside: Placement, summand: Partial = SUMMAND) -> Crossing:
    """Return how a tensor enters a region that reads it whole: every rank has a summand of its gradient."""
    return Crossing(Transition(outside, WHOLE), Transition(summand, outside))


def cut(outside: Placement, inside: Placement) -> Crossing:
    """Return how a tensor enters a region as shards, or as the first rank's summand."""
    # The gradient of what one rank adds to a sum is that of the sum, which is whole on all of them.
    gradient = WHOLE if isinstance(inside, Partial) else inside
    return Crossing(Transition(outside, inside), Transition(gradient, outside))


def summed(outside: Placement, summand: Partial = SUMMAND) -> Crossing:
    """Return how a tensor leaves a region in which every rank has a summand of it."""
    return Crossing(Transition(summand, outside), Transition(outside, WHOLE))


def gathered(inside: Placement, outside: Placement) -> Crossing:
    """Return how the shards of a tensor leave a region."""
    return Crossing(Transition(inside, outside), Transition(outside, inside))


def used(stored: Placement, use: Placement, gradient: Placement) -> Crossing:
    """Return how a variable gets from where it is stored to its use."""
    return Crossing(Transition(stored, use), Transition(gradient, stored))


def used_on_stream(use: SequenceShard) -> Crossing:
    """Return how a whole variable gets to its use as a shard of the stream; its gradient there is part of a summand."""
    return Crossing(Transition(WHOLE, use), Transition(use, SequencePartial()))


def boundary_of_tensor(graph: ModelGraph, tensor: int, crossing: Crossing) -> Boundary:
    """Return the boundary at which a tensor between layers crosses."""
    info = graph.tensors[tensor]
    return Boundary(
        tensor=graph.tensor_name(tensor),
        shape=info.shape,
        dtype=info.dtype,
        itemsize=info.itemsize,
        forward=crossing.forward,
        backward=crossing.backward,
        has_gradient=info.has_gradient,
    )


def boundary_of_variable(info: VariableInfo, crossing: Crossing) -> Boundary:
    """Return the boundary at which a variable is read."""
    return Boundary(
        tensor=info.key,
        shape=info.shape,
        dtype=info.dtype,
        itemsize=info.itemsize,
        forward=crossing.forward,
        backward=crossing.backward,
        has_gradient=info.trainable,
    )
