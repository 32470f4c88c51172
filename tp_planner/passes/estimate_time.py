"""Estimate time: from what a training step computes and communicates, how long it takes on given hardware.

Compute is bounded by a roofline: arithmetic at the matmul rate, traffic at the memory bandwidth, and the host's time
to launch the ops (Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", 2009). Where all three overlap, the longest of them is the time of a phase; where nothing does, their
sum. Collectives follow the alpha-beta model of a ring: a latency, another for each step, and bytes over bandwidth
(Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", 2005). A ring over
several nodes goes from each to the next once; it is as fast as its slowest link, and the ranks that it has on a node
send together to the next, each over its own network adapter, as the channels of NCCL do.
"""

from __future__ import annotations

from collections.abc import Iterable

from tp_planner.ir.errors import PlanError
from tp_planner.ir.hardware import Hardware, PhaseTime, TimeEstimate, TimeRange
from tp_planner.ir.mesh import Mesh, OnNodes
from tp_planner.ir.plan import Plan
from tp_planner.ir.step import Collective, Phase, Work

_PHASES: tuple[Phase, ...] = ("forward", "backward", "update")
_NO_TIME = TimeRange(0.0, 0.0)
_ASSUMPTIONS = (
    "low: the efficiencies' high ends; arithmetic, memory traffic and launches of a phase overlap wholly",
    "high: the efficiencies' low ends; nothing overlaps, no op is fused, nothing stays in a cache",
    "both: a collective is a ring, waits for the ops before it and holds up those after it",
    "not counted: metrics, reading the data, and memory that allocators and libraries keep",
)


def estimate_time(plan: Plan, hardware: Hardware) -> TimeEstimate:
    """Return the time of one training step of ``plan``, with the inputs it was traced with, on ``hardware``.

    Raises PlanError if the plan has no simulated step, or the hardware has no matmul rate for a dtype of the plan.
    """
    if not plan.step.work:
        raise PlanError(f"the plan of {plan.model!r} has no simulated step to estimate from; plan the model again")
    _require_rates(plan, hardware)
    running = {work.phase for work in plan.step.work} | {collective.phase for collective in plan.collectives}
    phases = tuple(_phase_time(phase, plan, hardware) for phase in _PHASES if phase in running)
    return TimeEstimate(phases, _ASSUMPTIONS + _assumptions_of(plan, hardware))


def _require_rates(plan: Plan, hardware: Hardware) -> None:
    known = dict(hardware.matmul_rate)
    missing = sorted({dtype for work in plan.step.work for dtype, _ in work.matmul_flops} - set(known))
    if missing:
        raise PlanError(
            f"{hardware.name!r} has no matmul rate for {dtype}; add [matmul_rate.{dtype}] to a copy of its profile"
            for dtype in missing
        )


def _assumptions_of(plan: Plan, hardware: Hardware) -> tuple[str, ...]:
    """Return what is assumed of this plan in particular."""
    assumptions = []
    if not plan.step.optimizer:
        assumptions.append("no update: the plan was made without an optimizer")
    if any(each.early for each in plan.collectives):
        assumptions.append(
            "low: collectives that start early run behind what their phase computes, or behind the products that the "
            "plan has between start and wait, as long as these do"
        )
    if plan.step.micro_steps > 1:
        assumptions.append(
            f"of the {plan.step.micro_steps} micro-steps of an update this is the last: the others do not update, "
            f"nor make the collectives that are made once"
        )
    if not plan.step.loss:
        assumptions.append("no loss: the plan was made without one")
    assumptions += [_across_nodes(axis, plan, hardware) for axis in _axes_across_nodes(plan, hardware)]
    return tuple(assumptions)


def _axes_across_nodes(plan: Plan, hardware: Hardware) -> list[str]:
    """Return the axes over which ranks communicate that are on several nodes."""
    used = dict.fromkeys(each.axis for each in plan.collectives if each.axis in plan.mesh.names)
    return [axis for axis in used if plan.mesh.on_nodes(axis, int(hardware.node_size.value)).nodes > 1]


def _across_nodes(axis: str, plan: Plan, hardware: Hardware) -> str:
    size = int(hardware.node_size.value)
    lie = plan.mesh.on_nodes(axis, size)
    together = f"{lie.neighbours} ranks together" if lie.neighbours > 1 else "each rank alone"
    return f"rings over {axis!r} go around {lie.nodes} nodes of {size} devices, and send on {together}"


def _phase_time(phase: Phase, plan: Plan, hardware: Hardware) -> PhaseTime:
    compute = [compute_time(work, hardware) for work in plan.step.work if work.phase == phase]
    here = [each for each in plan.collectives if each.phase == phase]
    in_turn = sum(
        (collective_time(each, plan.mesh, hardware) for each in here if each.early and not each.behind), _NO_TIME
    )
    others = sum((_seen_time(each, plan.mesh, hardware) for each in here if not each.early or each.behind), _NO_TIME)
    computed = sum(compute, _NO_TIME)
    seen = TimeRange(max(in_turn.low - computed.low, 0.0), in_turn.high)
    return PhaseTime(phase, computed, others + seen)


def _seen_time(collective: Collective, mesh: Mesh, hardware: Hardware) -> TimeRange:
    """Return for how long a rank waits for a collective, at best only once the products behind which it runs end."""
    whole = collective_time(collective, mesh, hardware)
    hidden = _products_time(collective.behind, hardware) / hardware.matmul_efficiency.high
    return TimeRange(max(whole.low - hidden, 0.0), whole.high)


def _products_time(flops: Iterable[tuple[str, int]], hardware: Hardware) -> float:
    """Return the time of matrix products at the hardware's highest rates."""
    rates = dict(hardware.matmul_rate)
    return sum(number / rates[dtype].value for dtype, number in flops)


def compute_time(work: Work, hardware: Hardware) -> TimeRange:
    """Return the time of what is computed in one phase."""
    efficiency, traffic, launch = hardware.matmul_efficiency, hardware.memory_efficiency, hardware.launch_overhead
    matmul = _products_time(work.matmul_flops, hardware)
    memory = work.memory_bytes / hardware.memory_bandwidth.value
    return TimeRange(
        low=max(matmul / efficiency.high, memory / traffic.high, work.ops * launch.low),
        high=matmul / efficiency.low + memory / traffic.low + work.ops * launch.high,
    )


def collective_time(collective: Collective, mesh: Mesh, hardware: Hardware) -> TimeRange:
    """Return the time of one collective on a mesh whose ranks are on nodes of ``hardware.node_size`` devices."""
    if collective.group_size == 1:
        return _NO_TIME
    latency, step, far = hardware.collective_latency, hardware.ring_step_latency, hardware.node_step_latency
    turns = 2 if collective.kind == "all_reduce" else 1  # it is a reduce-scatter and an all-gather
    between = turns * (_on_nodes(collective, mesh, hardware).nodes - 1)
    within = turns * (collective.group_size - 1) - between
    transfer = transfer_time(collective, mesh, hardware)
    return TimeRange(
        low=latency.low + within * step.low + between * far.low + transfer.low,
        high=latency.high + within * step.high + between * far.high + transfer.high,
    )


def transfer_time(collective: Collective, mesh: Mesh, hardware: Hardware) -> TimeRange:
    """Return the time that the bytes of a collective take on the slowest link of its ring."""
    lie, near, far = _on_nodes(collective, mesh, hardware), hardware.link_efficiency, hardware.node_efficiency
    slow, fast = (hardware.link_bandwidth.value * efficiency for efficiency in (near.low, near.high))
    if lie.nodes > 1:
        # In an all-to-all each rank has something of its own for every other.
        together = 1 if collective.kind == "all_to_all" else lie.neighbours
        share = hardware.node_bandwidth.value * together
        slow, fast = min(slow, share * far.low), min(fast, share * far.high)
    return TimeRange(collective.wire_bytes / fast, collective.wire_bytes / slow)


def _on_nodes(collective: Collective, mesh: Mesh, hardware: Hardware) -> OnNodes:
    """Return how the groups of a collective lie on nodes; those over no axis of the mesh are of all ranks."""
    axis, ranks = collective.axis, mesh
    if axis not in mesh.names:
        axis, ranks = "all", Mesh((("all", mesh.size),))
    return ranks.on_nodes(axis, int(hardware.node_size.value))
