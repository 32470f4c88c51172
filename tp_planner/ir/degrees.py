"""One model in several settings, as plain data: degrees of tensor parallelism, sizes, and ways to save memory."""

from __future__ import annotations

from dataclasses import dataclass

from tp_planner.ir.figures import Figures
from tp_planner.ir.layout import DeviceType, Zero
from tp_planner.ir.plan import GuessedDim


@dataclass(frozen=True, slots=True)
class Setting:
    """What one plan of a sweep is made for.

    ``size`` is that of the mesh axis. ``batch`` and ``sequence`` are sizes of open dims, None for what the inputs say;
    the batch is that of each of so many ``replicas``, which store in parts what ``zero`` says (see ``Layout``).
    ``recomputed`` says that the backward pass runs equal blocks again, which leave nothing else for it.
    """

    size: int
    batch: int | None = None
    sequence: int | None = None
    sequence_parallel: bool = False
    recomputed: bool = False
    replicas: int = 1
    zero: Zero = 0


@dataclass(frozen=True, slots=True)
class Degree:
    """The plan in one setting, in figures.

    ``gathered`` are (layer, reason) of the layers whose weights are stored sharded and gathered at use,
    ``left_early`` of those whose sharded output is gathered behind them. Where the layout is refused, ``figures``
    is None and ``problems`` says why. ``seconds`` is the high end of what a step is estimated to take, None without
    hardware that has figures for it, and ``samples`` what all replicas train on in it.
    """

    setting: Setting
    figures: Figures | None
    gathered: tuple[tuple[str, str], ...]
    left_early: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    seconds: float | None = None
    samples: int = 0

    def fits(self, memory: int) -> bool:
        """Whether the plan is not refused and its peak is within these bytes."""
        return self.figures is not None and self.figures.peak_bytes <= memory


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan has to fit: one device, the bytes of its memory, and whose kernels it runs."""

    name: str
    memory: int
    kind: DeviceType = "cpu"


@dataclass(frozen=True, slots=True)
class Sweep:
    """The plans of one model in several settings.

    ``axis`` is the mesh axis whose size is varied, ``other_axes`` those that the rules name besides, each of size 1 but
    for the one of replicas.
    ``device`` is None where it was not asked what fits; ``searched`` says that batches were looked for, and each
    degree is that of the largest batch that fits, or of 1 where none does.
    """

    model: str
    axis: str
    other_axes: tuple[str, ...]
    inputs: tuple[str, ...]
    degrees: tuple[Degree, ...]
    guessed: tuple[GuessedDim, ...] = ()
    device: Device | None = None
    searched: bool = False
