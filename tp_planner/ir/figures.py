"""What a plan costs in numbers: the few figures by which two plans are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tp_planner.ir.plan import Plan, VariablePlan


@dataclass(frozen=True, slots=True)
class Figures:
    """One training step on rank 0, whose shards are the largest.

    ``bytes`` are those that enter collectives, ``wire_bytes`` those that the rank sends for them. ``parameter_bytes``
    are those of all variables, ``peak_bytes`` the largest sum of all that the rank holds at one moment.
    """

    collectives: int
    bytes: int
    wire_bytes: int
    parameter_bytes: int
    peak_bytes: int


def figures_of(plan: Plan) -> Figures:
    """Return the figures of a plan."""
    return Figures(
        collectives=len(plan.collectives),
        bytes=sum(collective.bytes for collective in plan.collectives),
        wire_bytes=sum(collective.wire_bytes for collective in plan.collectives),
        parameter_bytes=sum(map(local_bytes, plan.variables)),
        peak_bytes=plan.step.memory.peak.total,
    )


def whole_bytes(variable: VariablePlan) -> int:
    """Return the bytes of a variable as one device would store it."""
    return math.prod(variable.shape) * variable.itemsize


def local_bytes(variable: VariablePlan) -> int:
    """Return the bytes of a variable that rank 0 stores."""
    return math.prod(variable.local_shape) * variable.itemsize
