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
    node_bandwidth=Figure(1e10, ""),
    node_efficiency=FigureRange(0.5, 1.0, ""),
    node_step_latency=FigureRange(1e-5, 2e-5, ""),
)
NO_MEMORY = MemoryUse(0, 0, 0, 0, 0)
NO_TIME = TimeRange(0.0, 0.0)


def plan_of(
    *work: Work,
    collectives: tuple[Collective, ...] = (),
    mesh: tuple[tuple[str, int], ...] = (("model", 4),),
    peak: MemoryUse = NO_MEMORY,
) -> Plan:
    return Plan(
        model="m",
        fingerprint="",
        mesh=Mesh(mesh),
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


# A mesh, whose ranks are on nodes of eight devices; the axis; what is sent; low and high: a latency, steps within a
# node and between nodes, and the bytes that a rank sends over the slowest link: 100 GB/s within a node at best and half
# of that at worst, or those ranks' shares of the network that are together on a node, 10 GB/s and half of it each.
NODES: dict[str, tuple[tuple[tuple[str, int], ...], str, CollectiveKind, int, tuple[float, float]]] = {
    "8 on a node": (
        (("batch", 8), ("model", 8)),
        "model",
        "all_reduce",
        8 * 10**6,
        (1e-5 + 14e-6 + 14e6 / 1e11, 2e-5 + 28e-6 + 14e6 / 5e10),
    ),
    "8, each on its node": (
        (("batch", 8), ("model", 8)),
        "batch",
        "all_reduce",
        8 * 10**6,
        (1e-5 + 14e-5 + 14e6 / 1e10, 2e-5 + 28e-5 + 14e6 / 5e9),
    ),
    "the same of a mesh in the other order": (
        (("model", 8), ("batch", 8)),
        "model",
        "all_reduce",
        8 * 10**6,
        (1e-5 + 14e-5 + 14e6 / 1e10, 2e-5 + 28e-5 + 14e6 / 5e9),
    ),
    "64, 8 to a node": (
        (("batch", 64), ("model", 1)),
        "batch",
        "all_gather",
        10**6,
        (1e-5 + 56e-6 + 7e-5 + 63e6 / 8e10, 2e-5 + 112e-6 + 14e-5 + 63e6 / 4e10),
    ),
    "32, 4 to a node": (
        (("batch", 32), ("model", 2)),
        "batch",
        "all_reduce",
        32 * 10**6,
        (1e-5 + 48e-6 + 14e-5 + 62e6 / 4e10, 2e-5 + 96e-6 + 28e-5 + 62e6 / 2e10),
    ),
    "16, 8 to a node": (
        (("batch", 4), ("model", 16)),
        "model",
        "reduce_scatter",
        16 * 10**6,
        (1e-5 + 14e-6 + 1e-5 + 15e6 / 8e10, 2e-5 + 28e-6 + 2e-5 + 15e6 / 4e10),
    ),
    "64 of 512, each on its node": (
        (("batch", 64), ("model", 8)),
        "batch",
        "reduce_scatter",
        64 * 10**6,
        (1e-5 + 63e-5 + 63e6 / 1e10, 2e-5 + 126e-5 + 63e6 / 5e9),
    ),
    "512, to each something of its own": (
        (("batch", 512), ("model", 1)),
        "batch",
        "all_to_all",
        512 * 10**6,
        (1e-5 + 448e-6 + 63e-5 + 511e6 / 1e10, 2e-5 + 896e-6 + 126e-5 + 511e6 / 5e9),
    ),
    "12, of which a node has 4": (
        (("model", 12),),
        "model",
        "all_gather",
        10**6,
        (1e-5 + 10e-6 + 1e-5 + 11e6 / 4e10, 2e-5 + 20e-6 + 2e-5 + 11e6 / 2e10),
    ),
}


@pytest.mark.parametrize(("mesh", "axis", "kind", "size", "expected"), NODES.values(), ids=NODES)
def test_rings_over_several_nodes(
    mesh: tuple[tuple[str, int], ...], axis: str, kind: CollectiveKind, size: int, expected: tuple[float, float]
) -> None:
    """A ring goes once from each node to the next, where the ranks that it has there send together."""
    sent = Collective(kind, axis, dict(mesh)[axis], size, "layer", "output", "forward", "")
    (phase,) = estimate_time(plan_of(work("forward", ops=1), collectives=(sent,), mesh=mesh), HARDWARE).phases
    assert (phase.communication.low, phase.communication.high) == pytest.approx(expected)


@pytest.mark.parametrize("devices", [8, 64, 512])
def test_meshes_are_ranked_by_what_crosses_nodes(devices: int) -> None:
    """Of what layers send the least is sent fastest within a node, and of gradients by many on a node together."""

    def seconds(model: int) -> float:
        replicas = devices // model
        mesh = (("batch", replicas), ("model", model))
        sent = [Collective("all_reduce", "model", model, 8 * 10**7, "layer", "output", "forward", "")] * 8
        sent += [Collective("all_reduce", "batch", replicas, 12 * 10**8 // model, "", "gradients 0", "forward", "")]
        return estimate_time(plan_of(work("forward", ops=1), collectives=tuple(sent), mesh=mesh), HARDWARE).total.low

    found = {model: seconds(model) for model in (1, 2, 4, 8, 16, 32) if model <= devices}
    # By hand, but for latencies. Over the axis "model" 1.28 GB (m - 1) / m at 100 GB/s, above 8 at min(100, 80) GB/s.
    # Over "batch" 2.4 GB (r - 1) / r / m: on one node at 100 GB/s, over several at (8 / m) * 10 GB/s.
    expected = {}
    for model in found:
        replicas, together = devices // model, max(8 // model, 1)
        of_layers = 1.28e9 * (model - 1) / model / (1e11 if model <= 8 else 8e10)
        of_gradients = 2.4e9 / model * (replicas - 1) / replicas / (1e11 if devices == 8 else together * 1e10)
        expected[model] = of_layers + of_gradients
    assert found == pytest.approx(expected, rel=0.1)
    assert sorted(found, key=found.__getitem__) == sorted(expected, key=expected.__getitem__)


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
  both: a collective is a ring, waits for the ops before it and holds up those after it
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
    """That there is no update, no loss, and what of it goes from node to node."""
    plan = example()
    plan = replace(plan, step=replace(plan.step, optimizer="", loss=""), mesh=Mesh((("model", 16),)))
    assert estimate_lines(plan, HARDWARE)[-3:] == [
        "  no update: the plan was made without an optimizer",
        "  no loss: the plan was made without one",
        "  rings over 'model' go around 2 nodes of 8 devices, and send on 8 ranks together",
    ]


@pytest.mark.parametrize(
    ("ops", "line"),
    [(1, "1.00 to 10.0 µs"), (300, "0.300 to 3.00 ms"), (30_000, "30.0 to 300 ms"), (2_000_000, "2.00 to 20.0 s")],
)
def test_times_are_shown_in_the_unit_of_the_high_one(ops: int, line: str) -> None:
    assert estimate_lines(plan_of(work("forward", ops=ops)), HARDWARE)[1].strip() == line
