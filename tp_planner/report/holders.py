"""What a rank holds at the peak of a training step: rows of a table, the largest first."""

from __future__ import annotations

from tp_planner.ir.names import fold_names
from tp_planner.ir.plan import Plan
from tp_planner.ir.step import Holder
from tp_planner.report.amounts import bytes_text
from tp_planner.report.guesses import guess_lines
from tp_planner.report.sections import Section, Table

HOLDER_HEADS = ("held", "layer", "made by", "tensor", "times", "bytes each", "bytes")
_NUMBERS = frozenset(HOLDER_HEADS[-3:])
_OF_VARIABLES = ("parameters", "gradients", "optimizer")


def memory_sections(plan: Plan) -> list[Section]:
    """Return what is held at the peak: a row for each of the largest holders, those of equal layers together."""
    peak, phase = plan.step.memory.peak.total, plan.step.memory.peak_phase
    sentences = (
        *guess_lines(plan.guessed),
        "activations are there for the backward pass, temporaries for the moment; made by: the op, in the call of the "
        "layer or on the way back through it",
    )
    title = f"memory of rank 0 at its peak, {phase}: {bytes_text(peak)}"
    return [Section(title, sentences, table=Table(HOLDER_HEADS, tuple(holder_rows(plan)), _NUMBERS))]


def holder_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Return the cells under ``HOLDER_HEADS``: variables by kind, then tensors, then all that is too small to name."""
    peak, holders = plan.step.memory.peak, plan.step.holders
    rows = [_in_all(kind, getattr(peak, kind)) for kind in _OF_VARIABLES]
    rows += map(_cells, holders)
    small = peak.activations + peak.temporaries - sum(holder.bytes for holder in holders)
    return [*rows, _in_all("smaller ones", small)] if small else rows


def _in_all(what: str, size: int) -> tuple[str, ...]:
    return (what, *[""] * (len(HOLDER_HEADS) - 2), bytes_text(size))


def _cells(holder: Holder) -> tuple[str, ...]:
    layers = ", ".join(str(name) for name in fold_names(holder.layers) if str(name)) or "outside of layers"
    tensor = f"{holder.dtype} {'x'.join(map(str, holder.shape))}".strip()
    times, each = str(holder.count), bytes_text(holder.bytes // holder.count)
    return (holder.kind, layers, holder.op or "given", tensor, times, each, bytes_text(holder.bytes))
