"""What a rank holds at the peak: equal tensors of equal layers together, the largest first."""

from __future__ import annotations

from tp_planner.ir.holders import holders_of
from tp_planner.ir.step import Holder, StorageKind
from tp_planner.ir.step_log import Freed, Origin, StepLog


def test_holders_are_those_of_the_peak() -> None:
    """What has gone by then, or comes later, is not held; parameters are no holders, and small ones are left out.

    A storage that stands for several counts so often.
    """
    log = StepLog()
    log.allocate(5000, "parameters")
    gone = _allocate(log, 4000, "activations", Origin("block_0/up", "mm", "float32", (1000,)))
    log.events.append(Freed(gone))
    for block in (0, 1):
        _allocate(log, 2000, "activations", Origin(f"block_{block}/up", "relu", "float32", (500,)))
    _allocate(log, 8, "activations", Origin("block_0/up", "sum", "float32", (2,)))
    unknown = log.allocate(1500, times=2)
    log.events.append(Freed(unknown))
    _allocate(log, 2500, "temporaries", Origin("", "mul", "float32", (625,)))
    assert holders_of(log) == (
        Holder("activations", ("block_0/up", "block_1/up"), "relu", "float32", (500,), 2, 4000),
        Holder("temporaries", ("",), "", "", (), 2, 3000),
    )


def _allocate(log: StepLog, size: int, kind: StorageKind, origin: Origin) -> int:
    number = log.allocate(size, kind)
    log.origins[number] = origin
    return number
