"""Note accumulation: which gradients replicas average once an update, and which in each of its micro-steps, and why."""

from __future__ import annotations

from tp_planner.ir.placement import WHOLE
from tp_planner.ir.plan import Plan


def note_accumulation(plan: Plan, micro_steps: int, why_in_each: str) -> tuple[str, ...]:
    """Return the notes; ``why_in_each`` is why none is averaged once, "" if those are that each replica has whole."""
    if micro_steps == 1 or plan.replicas == 1:
        return ()
    if why_in_each:
        return (f"gradients are averaged in each of the {micro_steps} micro-steps of an update: {why_in_each}",)
    notes = [
        f"gradients are averaged once in the {micro_steps} micro-steps of an update: each replica adds up its own, and "
        f"the last of them sends the sums; the plan is that of this one"
    ]
    trained = [each for each in plan.variables if each.trainable and "float" in each.dtype]
    in_parts = sum(each.batch_placement != WHOLE or each.slot_placement != WHOLE for each in trained)
    if in_parts == len(trained):
        notes.clear()
    if in_parts:
        notes.append(
            f"gradients of {in_parts} variables are reduced in each of the {micro_steps} micro-steps of an update: a "
            f"replica keeps its part of them alone, and has no room for the whole"
        )
    return tuple(notes)
