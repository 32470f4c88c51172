"""Prices: what work, boundaries and stored variables cost, by the same figures as the estimate of a whole plan.

It is the high end of the estimate, for that is a sum over all ops and collectives: nothing overlaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from tp_planner.dryrun.loss_work import LossWork
from tp_planner.dryrun.op_work import OpWork
from tp_planner.ir.graph import VariableInfo
from tp_planner.ir.hardware import Hardware
from tp_planner.ir.placement import Partial, Placement, Shard, local_shape
from tp_planner.ir.plan import Boundary, Plan, Transition
from tp_planner.ir.step import Collective, Work
from tp_planner.passes.estimate_time import collective_time, compute_time, estimate_time, transfer_time
from tp_planner.search.ways import Crossing, transitions


def seconds_of(plan: Plan, hardware: Hardware) -> float:
    """Return what a plan's training step costs."""
    return estimate_time(plan, hardware).total.high


@dataclass(frozen=True)
class Prices:
    """Seconds, and bytes of memory; ``base`` is the plan of the model with nothing sharded, on the same mesh.

    ``unread`` are variables that no op reads: they have no gradient, and no update.
    """

    base: Plan
    hardware: Hardware
    unread: frozenset[str] = frozenset()

    def of_work(self, work: OpWork) -> float:
        """Return the time of ops."""
        return compute_time(Work("forward", work.matmul_flops, work.memory_bytes, work.ops), self.hardware).high

    def of_crossing(self, crossing: Crossing) -> float:
        """Return the time of a boundary, in all blocks that have it."""
        if crossing.is_copy:
            return crossing.times * self._of_copy(crossing.boundary)
        changes = [self._of_change(change, crossing.boundary) for change, _ in transitions(crossing)]
        return crossing.times * sum(changes)

    def _of_copy(self, boundary: Boundary) -> float:
        """Return the time of copying a gradient inside of a boundary."""
        inside = math.prod(local_shape(boundary.shape, boundary.forward.target, self.base.axis_size))
        return self.of_work(OpWork((), 2 * inside * boundary.itemsize, 1))

    def _of_change(self, change: Transition, boundary: Boundary) -> float:
        """Return the time of a collective and the copies around it; see ``regions/boundaries.py``."""
        parts, whole = self.base.axis_size, math.prod(boundary.shape) * boundary.itemsize
        shard, kind = whole // parts, change.collective
        if kind is None:
            if change.source == change.target or isinstance(change.target, Partial):
                return 0.0
            return self.of_work(OpWork((), 2 * shard, 1))  # the shard is copied out of the whole
        sent = shard if kind == "all_gather" else whole
        made = shard if kind == "reduce_scatter" else whole
        work = OpWork((), sent + made, 1)
        dims = [each.dim for each in (change.source, change.target) if isinstance(each, Shard)]
        if dims and dims[0] != 0:  # chunks are put together along their dim
            work += OpWork((), 2 * whole, 1)
        collective = Collective(kind, self.base.axis, parts, sent, "", "", "forward", "")
        return collective_time(collective, self.base.mesh, self.hardware).high + self.of_work(work)

    def of_loss(self, loss: LossWork) -> float:
        """Return the time of a loss, forward and backward."""
        sent = sum(collective_time(each, self.base.mesh, self.hardware).high for each in loss.collectives)
        return sent + sum(compute_time(work, self.hardware).high for work in loss.work)

    # --- variables -------------------------------------------------------------------------------------

    def local_bytes(self, variable: VariableInfo, placement: Placement) -> int:
        """Return the bytes of a variable on rank 0."""
        return math.prod(local_shape(variable.shape, placement, self.base.axis_size)) * variable.itemsize

    def of_storing(self, variable: VariableInfo, placement: Placement) -> float:
        """Return the time of the update of a variable, and of averaging its gradient over replicas."""
        updated = variable.trainable and variable.key not in self.unread
        return self.local_bytes(variable, placement) * self._per_updated_byte if updated else 0.0

    @cached_property
    def _per_updated_byte(self) -> float:
        """The seconds that a step takes for each byte of a variable that it updates, once gradients are there."""
        update = sum(work.memory_bytes for work in self.base.step.work if work.phase == "update")
        seconds = self.of_work(OpWork((), update, 0))
        for each in self.base.collectives:
            if each.axis == self.base.mesh.batch_axis:
                seconds += transfer_time(each, self.base.mesh, self.hardware).high
        return seconds / max(self._trained_bytes - self._unread_bytes, 1) + self._per_averaged_byte

    @cached_property
    def _per_averaged_byte(self) -> float:
        """The seconds that replicas compute for each byte of gradients that they average: joined first, if several."""
        sizes = {each.key: math.prod(each.local_shape) * each.itemsize for each in self.base.variables}
        buckets = [(sum(map(sizes.__getitem__, keys)), 1 + (len(keys) > 1)) for keys in self.base.buckets]
        moved = sum(2 * size * kernels for size, kernels in buckets)
        return self.of_work(OpWork((), moved, 0)) / max(sum(size for size, _ in buckets), 1)

    def memory_of_storing(self, variable: VariableInfo, placement: Placement) -> float:
        """Return the bytes of a variable on rank 0, with its gradient and the optimizer's slots."""
        slots = self.base.step.memory.largest.optimizer / max(self._trained_bytes, 1)
        return self.local_bytes(variable, placement) * (2 + slots if variable.trainable else 1)

    @cached_property
    def _trained_bytes(self) -> int:
        return sum(math.prod(each.local_shape) * each.itemsize for each in self.base.variables if each.trainable)

    @cached_property
    def _unread_bytes(self) -> int:
        unread = (each for each in self.base.variables if each.trainable and each.key in self.unread)
        return sum(math.prod(each.local_shape) * each.itemsize for each in unread)
