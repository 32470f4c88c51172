"""What a rank holds at the peak: equal tensors of equal layers together, the largest first."""

from __future__ import annotations

from tp_planner.ir.holders import holders_of
from tp_planner.ir.step import Holder
from tp_planner.ir.step_log import Freed, Origin, StepLog


def test_holders_are_those_of_the_peak() -> None:
    """What has gone by then, or comes later, is not held; parameters are no holders, and small ones are left out.

    A storage that stands for several counts so often.
    """
    log = StepLog()
    log.allocate(5000, "parameters")
    gone = log.allocate(4000, "activations", origin=Origin("block_0/up", "mm", "float32", (1000,)))
    log.events.append(Freed(gone))
    for block in (0, 1):
        log.allocate(2000, "activations", origin=Origin(f"block_{block}/up", "relu", "float32", (500,)))
    log.allocate(8, "activations", origin=Origin("block_0/up", "sum", "float32", (2,)))
    unknown = log.allocate(1500, times=2)
    log.events.append(Freed(unknown))
    log.allocate(2500, "temporaries", origin=Origin("", "mul", "float32", (625,)))
    assert holders_of(log) == (
        Holder("activations", ("block_0/up", "block_1/up"), "relu", "float32", (500,), 2, 4000),
        Holder("temporaries", ("",), "", "", (), 2, 3000),
    )
