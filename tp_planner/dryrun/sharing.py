"""Sharing: what replicas do in a simulated step who share updates, written into its log.

Buckets are of variables of many blocks, of equal ones only one runs. So gradients are noted where they arrive, and once
the log is that of all blocks it is told here what becomes of them: they are summed when a bucket is complete, and a
replica is left its part. After the update all parts are put together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

import torch

from tp_planner.dryrun.metering import StepMeter
from tp_planner.ir.placement import WHOLE, Shard, local_shape
from tp_planner.ir.plan import Plan, VariablePlan
from tp_planner.ir.step import Collective, Phase
from tp_planner.ir.step_log import Allocated, Arrived, Began, Event, Freed, Kernel, StepLog
from tp_planner.layers.apply import Applied
from tp_planner.regions.recording import REASONS
from tp_planner.training.shares import Shares, share_of, shares_in


class SimulatedShares(Shares):
    """Those of the variables that run in a simulated step; what putting together all of the plan's takes is noted."""

    def __init__(self, applied: Applied, meter: StepMeter) -> None:
        assert applied.axes.batch is not None
        variables = {key: placed.variable for key, placed in applied.placed.items()}
        super().__init__(applied.axes.batch, shares_in(applied.plan, applied.axes, variables))
        self._plan, self._meter, self._variables = applied.plan, meter, variables
        self._gradients: set[int] = set()  # storages that stand for what is left of gradients

    def watch(self, undo: list[Callable[[], None]]) -> None:
        """Let optimizers know of them, and note where gradients arrive; add what ends that."""
        super().watch(undo)
        for key, variable in self._variables.items():
            if variable._value.requires_grad:
                undo.append(variable._value.register_post_accumulate_grad_hook(self._noting(key)).remove)

    def _noting(self, key: str) -> Callable[[Any], None]:
        def arrived(parameter: Any) -> None:
            gradient = getattr(parameter.grad, "_local_tensor", parameter.grad)
            self._meter.log.events.append(Arrived(key, self._meter.storage(gradient)))

        return arrived

    def leave_parts(self, variables: Iterable[Any]) -> None:
        """Leave each variable its part of its gradient; when the whole went, and the part came, is found later."""
        for variable in variables:
            share, gradient = share_of(variable), variable._value.grad
            if share is not None:
                self._meter.lose(getattr(gradient, "_local_tensor", gradient))
                part = torch.empty(share.part.shape, dtype=gradient.dtype, device="cpu")
                variable._value.grad = share.gradient(part)
                self._gradients.add(self._meter.storage(part))

    def put_together(self, updated: Mapping[int, torch.Tensor]) -> None:
        """Note that the parts of the plan's variables are put together, bucket by bucket."""
        log, before = self._meter.log, None
        self._meter.begin("update")
        for number, bucket in _shared_buckets(self._plan).items():
            sizes = [_part_bytes(each, self._plan.replicas) for each in bucket]
            sent = log.allocate(sum(sizes) if len(bucket) > 1 else 0)
            log.events.append(_collective(self._plan, "all_gather", sum(sizes), f"weights {number}", "update"))
            arriving = log.allocate(sum(sizes) * self._plan.replicas)
            self._written(before)
            before = sent, arriving, sizes
        self._written(before)

    def _written(self, bucket: tuple[int, int, list[int]] | None) -> None:
        if bucket is not None:
            sent, arriving, sizes = bucket
            kernels = [Kernel("update", "", 0, 2 * size * self._plan.replicas) for size in sizes]
            self._meter.log.events += [Freed(sent), *kernels, Freed(arriving)]

    def reduce(self, log: StepLog, trained: Set[str], others: Mapping[str, str]) -> None:
        """Write into the log of all blocks what becomes of gradients; ``trained`` and ``others`` as for buckets."""
        with_gradients = [key for keys in self._plan.buckets for key in keys if others.get(key, key) in trained]
        reducing = _Reducing(log, self._plan, set(with_gradients))
        log.events = [
            each
            for each in reducing.run(log.events)
            if not (isinstance(each, Allocated | Freed) and each.storage in self._gradients)
        ]


class _Reducing:
    """One pass over the events of a step, in which gradients are summed and cut where their bucket is complete."""

    def __init__(self, log: StepLog, plan: Plan, with_gradients: Set[str]) -> None:
        self._log, self._plan, self._with_gradients = log, plan, with_gradients
        self._shared, self._late = _shared_buckets(plan), {key for keys in plan.sums for key in keys}
        self._in_parts = {each.key for bucket in self._shared.values() for each in bucket}
        self._next = 0  # the number of the bucket that is to be sent next
        self._gradients: dict[str, int] = {}  # storages of those that have arrived, by variable
        self._travelling: int | None = None  # the storage that was sent last

    def run(self, events: Iterable[Event]) -> Iterator[Event]:
        phase: Phase = "forward"
        for event in events:
            if isinstance(event, Arrived):
                self._gradients[event.variable] = event.storage
                if event.variable in self._in_parts:
                    self._log.kinds.pop(event.storage, None)  # gradients are what is left in the end
                while self._next < len(self._plan.buckets) and self._is_complete(self._plan.buckets[self._next]):
                    yield from self._send()
                continue
            if isinstance(event, Began):
                if phase == "backward":
                    yield from self._end()
                phase = event.phase
            yield event
        if phase == "backward":
            yield from self._end()

    def _is_complete(self, keys: Iterable[str]) -> bool:
        return all(key in self._gradients and key not in self._late for key in keys)

    def _end(self) -> Iterator[Event]:
        while self._next < len(self._plan.buckets):
            yield from self._send()
        yield from self._arrived()

    def _arrived(self) -> Iterator[Event]:
        if self._travelling is not None:
            yield Freed(self._travelling)
        self._travelling = None

    def _send(self) -> Iterator[Event]:
        number, self._next = self._next, self._next + 1
        bucket = self._shared.get(number)
        if bucket is None:
            return
        yield from self._arrived()
        replicas, itemsize = self._plan.replicas, bucket[0].itemsize
        marks = self._allocate(len(bucket) * itemsize), self._allocate(len(bucket) * itemsize * replicas)
        zeros = [self._allocate(_bytes(each)) for each in bucket if each.key not in self._gradients]
        yield from (*marks, *zeros)
        size = sum(_part_bytes(each, replicas) for each in bucket) + len(bucket) * itemsize
        sent = self._allocate(size * replicas)
        yield sent
        for variable in bucket:
            yield from self._filled_up(variable)
            yield Kernel("backward", "", 0, 2 * _bytes(variable))
        yield Kernel("backward", "", 0, 2 * size * replicas)
        yield _collective(self._plan, "reduce_scatter", size * replicas, f"gradients {number}", "backward")
        arriving = self._allocate(size)
        self._log.kinds[arriving.storage] = "gradients"
        yield arriving
        for each in (*marks, *zeros):
            yield Freed(each.storage)
        for variable in bucket:
            if variable.key in self._gradients:
                yield Freed(self._gradients.pop(variable.key))
        self._travelling = sent.storage

    def _filled_up(self, variable: VariablePlan) -> Iterator[Event]:
        """Yield what it takes to fill up the parts of a gradient that are shorter than others."""
        filled = _part_bytes(variable, self._plan.replicas) * self._plan.replicas
        if filled > _bytes(variable):
            storage = self._allocate(filled)
            yield storage
            yield Freed(storage.storage)

    def _allocate(self, size: int) -> Allocated:
        self._log.allocate(size)
        event = self._log.events.pop()
        assert isinstance(event, Allocated)
        return event


def _shared_buckets(plan: Plan) -> dict[int, list[VariablePlan]]:
    """Return the plan's buckets of variables whose updates are shared, by number."""
    variables = {each.key: each for each in plan.variables}
    buckets = {number: [variables[key] for key in keys] for number, keys in enumerate(plan.buckets)}
    return {number: bucket for number, bucket in buckets.items() if bucket[0].slot_placement != WHOLE}


def _bytes(variable: VariablePlan) -> int:
    return math.prod(variable.local_shape) * variable.itemsize


def _part_bytes(variable: VariablePlan, replicas: int) -> int:
    """Return the bytes of the largest part, as which each of them travels."""
    assert isinstance(variable.slot_placement, Shard)
    return math.prod(local_shape(variable.local_shape, variable.slot_placement, replicas)) * variable.itemsize


def _collective(plan: Plan, kind: Any, size: int, place: str, phase: Phase) -> Collective:
    return Collective(kind, plan.mesh.batch_axis or "", plan.replicas, size, "", place, phase, REASONS[kind])
