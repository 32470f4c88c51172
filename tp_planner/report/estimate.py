"""The estimated time of a training step, and whether its memory fits, as text."""

from __future__ import annotations

from tp_planner.ir.hardware import Hardware, PhaseTime, TimeRange
from tp_planner.ir.plan import Plan
from tp_planner.passes.estimate_time import estimate_time
from tp_planner.report.amounts import bytes_text
from tp_planner.report.guesses import guess_lines

_TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def estimate_lines(plan: Plan, hardware: Hardware) -> list[str]:
    """Return the estimated time of one training step on each rank of ``hardware``, with what it assumes.

    Raises PlanError as ``estimate_time`` does.
    """
    estimate = estimate_time(plan, hardware)
    inputs = ", ".join(f"{'x'.join(map(str, shape))} {dtype}" for shape, dtype in plan.inputs)
    return [
        f"estimated, not measured: one training step with inputs {inputs} on {plan.mesh.size} x {hardware.name}",
        *(f"  {line}" for line in guess_lines(plan.guessed)),
        f"  {_range(estimate.total)}",
        *(f"    {_phase(phase)}" for phase in estimate.phases),
        f"  {_memory(plan, hardware)}",
        *(f"  {assumption}" for assumption in estimate.assumptions),
    ]


def _phase(phase: PhaseTime) -> str:
    communication = f"communication {_range(phase.communication)}" if phase.communication.high else "no communication"
    return f"{phase.phase}: {_range(phase.total)}, of this {communication}"


def _memory(plan: Plan, hardware: Hardware) -> str:
    memory, size = plan.step.memory, int(hardware.memory_size.value)
    of_all = f"memory at the peak, {memory.peak_phase}: {bytes_text(memory.peak.total)} of {bytes_text(size)}"
    if memory.reserved is not None:
        of_all += f", {bytes_text(memory.reserved)} reserved"
    if (memory.reserved or memory.peak.total) <= size:
        return of_all
    return f"{of_all}: it does not fit; take more ranks, a smaller batch or hardware with more memory"


def _range(time: TimeRange) -> str:
    """Return both ends in the unit of the high one, with three digits."""
    scale, unit = next((pair for pair in _TIME_UNITS if time.high >= pair[0]), _TIME_UNITS[-1])
    low, high = _three_digits(time.low / scale), _three_digits(time.high / scale)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"
