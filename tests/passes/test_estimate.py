"""The time estimate is the roofline and the ring, worked out by hand, and the report says what it assumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from tp_planner.frontend.hardware_file import list_hardware, read_hardware_file
from tp_planner.ir.errors import PlanError
from tp_planner.ir.hardware import Figure, FigureRange, Hardware, TimeRange
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.plan import Plan
from tp_planner.ir.step import Collective, CollectiveKind, Memory, MemoryUse, Phase, Step, Work
from tp_planner.passes.estimate_time import estimate_time
from tp_planner.report.estimate import estimate_lines

# Every figure is a power of ten times a digit, so that the sums below can be followed.
HARDWARE = Hardware(
    name="Abacus",
    matmul_rate=(("bfloat16", Figure(2e12, "")), ("float32", Figure(1e12, ""))),
    matmul_efficiency=FigureRange(0.5, 1.0, ""),
    memory_size=Figure(8 * 2**30, ""),
    memory_bandwidth=Figure(1e12, ""),
    memory_efficiency=FigureRange(0.25, 0.5, ""),
    link_bandwidth=Figure(1e11, ""),
    link_efficiency=FigureRange(0.5, 1.0, ""),
    collective_latency=FigureRange(1e-5, 2e-5, ""),
    ring_step_latency=FigureRange(1e-6, 2e-6, ""),
    launch_overhead=FigureRange(1e-6, 1e-5, ""),
    node_size=Figure(8.0, ""),
)
NO_MEMORY = MemoryUse(0, 0, 0, 0, 0)
NO_TIME = TimeRange(0.0, 0.0)


def plan_of(*work: Work, collectives: tuple[Collective, ...] = (), parts: int = 4, peak: MemoryUse = NO_MEMORY) -> Plan:
    return Plan(
        model="m",
        fingerprint="",
        mesh=Mesh((("model", parts),)),
        axis="model",
        inputs=(((2, 16), "int32"),),
        rules=(),
        variables=(),
        layers=(),
        collectives=collectives,
        step=Step("Adam", "mean_squared_error", Memory(peak, peak, "backward"), work),
        input_gradients=True,
        notes=(),
    )


def work(phase: Phase, flops: Mapping[str, int] | None = None, memory_bytes: int = 0, ops: int = 0) -> Work:
    return Work(phase, tuple((flops or {}).items()), memory_bytes, ops)


def collective(kind: CollectiveKind, size: int, phase: Phase = "forward", group: int = 4) -> Collective:
    return Collective(kind, "model", group, size, "layer", "output", phase, "")


COMPUTE: dict[str, tuple[Work, tuple[float, float]]] = {
    "arithmetic": (work("forward", {"float32": 10**9}), (1e-3, 2e-3)),
    "arithmetic in two dtypes": (work("forward", {"bfloat16": 2 * 10**9, "float32": 10**9}), (2e-3, 4e-3)),
    "memory": (work("forward", memory_bytes=10**9), (2e-3, 4e-3)),
    "launches": (work("forward", ops=1000), (1e-3, 1e-2)),
    "all three": (work("forward", {"float32": 10**9}, 10**9, 1000), (2e-3, 1.6e-2)),
}


@pytest.mark.parametrize(("done", "expected"), COMPUTE.values(), ids=COMPUTE)
def test_compute_is_a_roofline(done: Work, expected: tuple[float, float]) -> None:
    """Low: the longest of arithmetic, traffic and launches at their best; high: their sum at their worst."""
    (phase,) = estimate_time(plan_of(done), HARDWARE).phases
    assert (phase.compute.low, phase.compute.high) == pytest.approx(expected)
    assert phase.communication == NO_TIME


# Over four ranks: a ring of three steps there, and three back for an all-reduce.
COMMUNICATION: dict[CollectiveKind, tuple[float, float]] = {
    "all_reduce": (1.6e-5 + 1.5e-3, 3.2e-5 + 3e-3),
    "all_gather": (1.3e-5 + 3e-3, 2.6e-5 + 6e-3),
    "reduce_scatter": (1.3e-5 + 0.75e-3, 2.6e-5 + 1.5e-3),
    "all_to_all": (1.3e-5 + 0.75e-3, 2.6e-5 + 1.5e-3),
    "broadcast": (1.3e-5 + 1e-3, 2.6e-5 + 2e-3),
}


@pytest.mark.parametrize(("kind", "expected"), COMMUNICATION.items(), ids=COMMUNICATION)
def test_communication_is_a_ring(kind: CollectiveKind, expected: tuple[float, float]) -> None:
    """A latency, the latency of each step around the ring, and the bytes sent over the bandwidth."""
    plan = plan_of(work("forward", ops=1), collectives=(collective(kind, 10**8),))
    (phase,) = estimate_time(plan, HARDWARE).phases
    assert (phase.communication.low, phase.communication.high) == pytest.approx(expected)


def test_one_rank_does_not_communicate() -> None:
    """A group of one waits for nobody."""
    plan = plan_of(work("forward", ops=1), collectives=(collective("all_reduce", 10**8, group=1),))
    assert estimate_time(plan, HARDWARE).phases[0].communication == NO_TIME


def test_phases_have_their_own_work_and_collectives() -> None:
    """Phases come in order of execution; one that only communicates is not forgotten; the total is their sum."""
    plan = plan_of(
        work("backward", ops=2000),
        work("forward", ops=1000),
        collectives=(collective("broadcast", 10**8, "update"), collective("broadcast", 10**8, "forward")),
    )
    estimate = estimate_time(plan, HARDWARE)
    assert [phase.phase for phase in estimate.phases] == ["forward", "backward", "update"]
    assert [phase.compute.low for phase in estimate.phases] == pytest.approx([1e-3, 2e-3, 0])
    assert [phase.communication.low for phase in estimate.phases] == pytest.approx([1.013e-3, 0, 1.013e-3])
    assert (estimate.total.low, estimate.total.high) == pytest.approx((3e-3 + 2.026e-3, 3e-2 + 4.052e-3))


def test_more_work_never_takes_less_time() -> None:
    """The low estimate is not above the high one, on every profile of the package."""
    done = work("forward", {"bfloat16": 10**12, "float32": 10**10}, 10**9, 500)
    plan = plan_of(done, collectives=(collective("all_reduce", 10**7),))
    for path in list_hardware().values():
        total = estimate_time(plan, read_hardware_file(path)).total
        assert 0 < total.low < total.high


def test_a_plan_without_a_step_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        estimate_time(plan_of(), HARDWARE)
    assert str(caught.value) == "the plan of 'm' has no simulated step to estimate from; plan the model again"


def test_all_dtypes_without_a_rate_are_named() -> None:
    """An estimate that leaves products out would be wrong without a word."""
    plan = plan_of(work("forward", {"float64": 1, "bfloat16": 1}), work("backward", {"int8": 1}))
    with pytest.raises(PlanError) as caught:
        estimate_time(plan, HARDWARE)
    assert caught.value.problems == (
        "'Abacus' has no matmul rate for float64; add [matmul_rate.float64] to a copy of its profile",
        "'Abacus' has no matmul rate for int8; add [matmul_rate.int8] to a copy of its profile",
    )


LINES = """\
estimated, not measured: one training step with inputs 2x16 int32 on 4 x Abacus
  4.52 to 25.0 ms
    forward: 2.52 to 5.03 ms, of this communication 1.52 to 3.03 ms
    backward: 2.00 to 20.0 ms, of this no communication
  memory at the peak, backward: 2.00 GiB of 8.00 GiB
  low: the efficiencies' high ends; arithmetic, memory traffic and launches of a phase overlap wholly
  high: the efficiencies' low ends; nothing overlaps, no op is fused, nothing stays in a cache
  both: a collective waits for the ops before it and holds up those after it; rings within one node
  not counted: metrics, reading the data, and memory that allocators and libraries keep"""


def example() -> Plan:
    """A forward pass of 1 ms and an all-reduce, a backward pass of 2000 ops."""
    return plan_of(
        work("forward", {"float32": 10**9}),
        work("backward", ops=2000),
        collectives=(collective("all_reduce", 10**8),),
        peak=MemoryUse(2**30, 2**30, 0, 0, 0),
    )


def test_report_says_that_it_is_an_estimate_and_what_it_assumes() -> None:
    assert estimate_lines(example(), HARDWARE) == LINES.splitlines()


def test_report_says_what_does_not_fit() -> None:
    """Memory is compared with that of the hardware, to the byte."""
    fitting, above = (replace(HARDWARE, memory_size=Figure(size, "")) for size in (2**31, 2**31 - 1))
    plan = example()
    assert estimate_lines(plan, fitting)[4] == "  memory at the peak, backward: 2.00 GiB of 2.00 GiB"
    assert estimate_lines(plan, above)[4] == (
        "  memory at the peak, backward: 2.00 GiB of 2.00 GiB: it does not fit; "
        "take more ranks, a smaller batch or hardware with more memory"
    )


def test_report_says_what_the_plan_leaves_out() -> None:
    """That there is no update, no loss, and that a ring over more devices than a node has is slower."""
    plan = example()
    plan = replace(plan, step=replace(plan.step, optimizer="", loss=""), mesh=Mesh((("model", 16),)))
    assert estimate_lines(plan, HARDWARE)[-3:] == [
        "  no update: the plan was made without an optimizer",
        "  no loss: the plan was made without one",
        "  16 ranks are more than the 8 devices that the links connect: between nodes communication takes longer",
    ]


@pytest.mark.parametrize(
    ("ops", "line"),
    [(1, "1.00 to 10.0 µs"), (300, "0.300 to 3.00 ms"), (30_000, "30.0 to 300 ms"), (2_000_000, "2.00 to 20.0 s")],
)
def test_times_are_shown_in_the_unit_of_the_high_one(ops: int, line: str) -> None:
    assert estimate_lines(plan_of(work("forward", ops=ops)), HARDWARE)[1].strip() == line
