"""Hardware in figures with their sources, and the time that a training step is estimated to take on it."""

from __future__ import annotations

from dataclasses import dataclass

from tp_planner.ir.layout import DeviceType
from tp_planner.ir.step import Phase


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure and where it is from; its unit is that of the field that holds it."""

    value: float
    source: str


@dataclass(frozen=True, slots=True)
class FigureRange:
    """A figure that differs from case to case, from its lowest to its highest, and where it is from."""

    low: float
    high: float
    source: str


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of device as a rank uses it, the links between the devices of a node, and those between nodes.

    Rates and bandwidths are peaks, efficiencies the fractions of them that are reached in practice. Rates are in
    FLOP/s by dtype name, sizes in bytes, bandwidths in bytes/s (of links: in one direction), times in seconds.
    """

    name: str
    matmul_rate: tuple[tuple[str, Figure], ...]
    matmul_efficiency: FigureRange
    memory_size: Figure
    memory_bandwidth: Figure
    memory_efficiency: FigureRange
    link_bandwidth: Figure
    link_efficiency: FigureRange
    collective_latency: FigureRange  # of a collective of no bytes
    ring_step_latency: FigureRange  # of each step around the ring on top of that
    launch_overhead: FigureRange  # of the host for each op
    node_size: Figure  # devices that the links connect
    node_bandwidth: Figure  # a device's share of what its node sends to others
    node_efficiency: FigureRange
    node_step_latency: FigureRange  # of each step around the ring that goes to another node
    device: DeviceType = "cpu"  # whose kernels run on it


@dataclass(frozen=True, slots=True)
class TimeRange:
    """Seconds, from a low to a high estimate."""

    low: float
    high: float

    def __add__(self, other: TimeRange) -> TimeRange:
        return TimeRange(self.low + other.low, self.high + other.high)


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """The estimated time of one phase: of its ops, and of the collectives that they wait for."""

    phase: Phase
    compute: TimeRange
    communication: TimeRange

    @property
    def total(self) -> TimeRange:
        return self.compute + self.communication


@dataclass(frozen=True, slots=True)
class TimeEstimate:
    """The estimated time of one training step on one rank, by phase, in order, and what was assumed."""

    phases: tuple[PhaseTime, ...]
    assumptions: tuple[str, ...]

    @property
    def total(self) -> TimeRange:
        return sum((phase.total for phase in self.phases), TimeRange(0.0, 0.0))
