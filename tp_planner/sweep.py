"""Sweep: plan one model in several settings, and find the largest batch that fits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import keras

from tp_planner.frontend.inputs import sized_inputs
from tp_planner.frontend.recomputed_blocks import recomputing_blocks
from tp_planner.frontend.training_loss import TrainingLoss
from tp_planner.ir.degrees import Degree, Device, Setting, Sweep
from tp_planner.ir.errors import PlanError
from tp_planner.ir.figures import figures_of
from tp_planner.ir.hardware import Hardware
from tp_planner.ir.layout import BATCH, DeviceType, Layout, LayoutRule, Zero
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.plan import Plan
from tp_planner.passes.compare_plans import layer_name
from tp_planner.passes.estimate_time import estimate_time
from tp_planner.planner import make_plan

LARGEST_BATCH = 2**20  # where the search ends: a model whose memory does not grow with the batch fits any


def settings_of(
    sizes: Sequence[int],
    batches: Sequence[int] = (),
    sequences: Sequence[int] = (),
    sequence_parallel: Sequence[bool] = (False,),
    recomputed: Sequence[bool] = (False,),
    replicas: Sequence[int] = (1,),
    zero: Sequence[Zero] = (0,),
) -> tuple[Setting, ...]:
    """Return all settings of these values; without batches or sequences the sizes that the inputs say.

    One replica stores nothing in parts, so that it is planned once, whatever ``zero`` says.
    """
    values = product(sizes, replicas, zero, sequences or (None,), sequence_parallel, recomputed, batches or (None,))
    settings = (
        Setting(size, batch, length, stream, again, copies, stage if copies > 1 else 0)
        for size, copies, stage, length, stream, again, batch in values
    )
    return tuple(dict.fromkeys(settings))


def sweep(
    model: keras.Model,
    rules: Sequence[LayoutRule],
    axis: str,
    settings: Sequence[Setting],
    inputs: Any = None,
    optimizer: keras.optimizers.Optimizer | None = None,
    loss: TrainingLoss | None = None,
    device: Device | None = None,
    hardware: Hardware | None = None,
) -> Sweep:
    """Return what becomes of ``model`` under ``rules`` in each of ``settings``; the model is as before.

    Other axes that the rules name get size 1, and the axis of the batch, "batch" if they name none, that of the
    replicas. ``inputs``, ``optimizer`` and ``loss`` are those of ``make_plan``; with inputs no setting may name sizes.
    With a device and no batch in any setting, the largest batch that fits is found; with hardware steps are estimated.

    Raises:
        PlanError: if no rule names ``axis``, or if every setting is refused for the same reason.
    """
    named = _axes(rules)
    if axis not in named:
        raise PlanError(
            f"no layout rule names mesh axis {axis!r}; the rules name {', '.join(map(repr, named)) or 'none'}"
        )
    others = tuple(name for name in named if name != axis)
    planning = _Planning(
        model, tuple(rules), others, axis, inputs, optimizer, loss, None if device is None else device.kind, hardware
    )
    searched = device is not None and inputs is None and all(setting.batch is None for setting in settings)
    if searched and device is not None:
        tried = [_largest_that_fits(planning, setting, device.memory) for setting in settings]
    else:
        tried = [planning.tried(setting) for setting in settings]
    plans = [plan for _, plan in tried if isinstance(plan, Plan)]
    degrees = tuple(degree for degree, _ in tried)
    if not plans and len({degree.problems for degree in degrees}) == 1:
        raise PlanError(degrees[0].problems)
    shown = dict.fromkeys(shapes for plan in plans for shapes in ("; ".join(_shapes(plan)),))
    guessed = tuple(dict.fromkeys(each for plan in plans for each in plan.guessed))
    return Sweep(model.name, axis, others, tuple(shown), degrees, guessed, device, searched)


def _axes(rules: Sequence[LayoutRule]) -> tuple[str, ...]:
    """Return the mesh axes that the rules name, in order of first appearance."""
    entries = [entry for rule in rules for entry in rule.axes if entry]
    return tuple(dict.fromkeys(name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry)))


def _shapes(plan: Plan) -> list[str]:
    return ["x".join(map(str, shape)) + f" {dtype}" for shape, dtype in plan.inputs]


@dataclass(frozen=True)
class _Planning:
    """What all plans of a sweep have in common."""

    model: keras.Model
    rules: tuple[LayoutRule, ...]
    others: tuple[str, ...]
    axis: str
    inputs: Any
    optimizer: keras.optimizers.Optimizer | None
    loss: TrainingLoss | None
    devices: DeviceType | None
    hardware: Hardware | None

    def tried(self, setting: Setting) -> tuple[Degree, Plan | PlanError]:
        """Return the plan in a setting, or why there is none, and what it comes to."""
        try:
            layout = Layout(
                self._mesh(setting),
                self.rules,
                sequence_parallel=setting.sequence_parallel,
                devices=self.devices,
                zero=setting.zero,
            )
            inputs = self._inputs(setting)
            with recomputing_blocks(self.model) if setting.recomputed else contextlib.nullcontext():
                plan = make_plan(self.model, layout, inputs, self.optimizer, self.loss)
        except PlanError as error:
            return Degree(setting, None, (), (), (), error.problems), error
        return _degree(setting, plan, self._seconds(plan)), plan

    def _seconds(self, plan: Plan) -> float | None:
        """Return the estimate of a step; None where the hardware has no figures for it."""
        try:
            return None if self.hardware is None else estimate_time(plan, self.hardware).total.high
        except PlanError:
            return None

    def _mesh(self, setting: Setting) -> Mesh:
        """Return the mesh of a setting; layers are split over the last axis, if all are 1."""
        if setting.replicas == 1:
            return Mesh((*((name, 1) for name in self.others), (self.axis, setting.size)))
        batch = self.others[0] if len(self.others) == 1 else BATCH
        others = [(name, 1) for name in self.others if name != batch]
        return Mesh(((batch, setting.replicas), *others, (self.axis, setting.size)), batch)

    def _inputs(self, setting: Setting) -> Any:
        if setting.batch is None and setting.sequence is None:
            return self.inputs
        return sized_inputs(self.model, setting.batch, setting.sequence)


def _degree(setting: Setting, plan: Plan, seconds: float | None) -> Degree:
    gathered = [layer for layer in plan.layers if layer.style == "gathered"]
    left_early = [
        layer for layer in plan.layers if layer.output is not None and layer.output.forward.collective == "all_gather"
    ]
    return Degree(
        setting=setting,
        figures=figures_of(plan),
        gathered=tuple((layer_name(layer), layer.reason) for layer in gathered),
        left_early=tuple((layer_name(layer), layer.reason) for layer in left_early),
        notes=plan.notes,
        problems=(),
        seconds=seconds,
        samples=plan.replicas * (plan.inputs[0][0][0] if plan.inputs and plan.inputs[0][0] else 0),
    )


def _largest_that_fits(planning: _Planning, setting: Setting, memory: int) -> tuple[Degree, Plan | PlanError]:
    """Return the plan of the largest batch whose peak is within ``memory``; that of batch 1 if none is."""
    tried: dict[int, tuple[Degree, Plan | PlanError]] = {}

    def peak(batch: int) -> int | None:
        tried[batch] = planning.tried(replace(setting, batch=batch))
        figures = tried[batch][0].figures
        return None if figures is None else figures.peak_bytes

    return tried[largest_batch(peak, memory) or 1]


def largest_batch(peak: Callable[[int], int | None], memory: int) -> int:
    """Return the largest batch whose peak is within ``memory``, 0 if that of 1 is not or there is none.

    The peak is the largest of several sums that grow linearly with the batch: a line through two batches leads to the
    largest in a few steps. Halving in between bounds their number.
    """
    known = {0: 0}
    low, high, halve = 0, LARGEST_BATCH + 1, False
    while low + 1 < high:
        ends = sorted(known)[-2:] if high not in known else [low, high]
        on_the_line = _where(memory, *((batch, known[batch]) for batch in ends)) if low else 1
        batch = min(max((low + high) // 2 if halve else on_the_line, low + 1), high - 1)
        halve = high <= LARGEST_BATCH and not halve
        found = peak(batch)
        if found is not None:
            known[batch] = found
        if found is not None and found <= memory:
            low = batch
        else:
            high = batch
    return low


def _where(memory: int, first: tuple[int, int], last: tuple[int, int]) -> int:
    """Return the batch at which the line through two, each with its peak, reaches ``memory``."""
    slope = (last[1] - first[1]) / (last[0] - first[0])
    return last[0] + math.floor((memory - last[1]) / slope) if slope > 0 else LARGEST_BATCH
