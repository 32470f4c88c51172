"""Averaging: gradients of variables that every replica stores, bucket by bucket, while the backward pass runs.

As torch's DistributedDataParallel does (https://arxiv.org/abs/2006.15704), which fails on DTensor parameters, and sees
only what is called through its wrapper, not what ``fit`` calls. A bucket's all-reduce starts when the last of its
gradients has arrived and no bucket before it waits; ``backward()`` returns when all have ended. Gradients are then
views of their bucket. A bucket whose update is shared is waited for when the next one starts, so that what was sent is
not kept for longer. In a micro-step whose gradients an optimizer adds up, no bucket is sent before the last, nor in a
pass that puts it off.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tp_planner.ir.errors import ParallelRuntimeError
from tp_planner.regions.calls import Site
from tp_planner.regions.replicas import SAMPLES, Replicas, add_in_place, add_together, wait
from tp_planner.training.accumulation import MicroStep
from tp_planner.training.buckets import Bucket, SharedBucket, local_gradient
from tp_planner.training.shares import share_of

GRADIENTS = Site("", "gradients")
MARKS = Site("", "gradients that there are")


class Averaging:
    """Watches the gradients of the buckets' variables arrive, and averages them over the replicas."""

    def __init__(self, replicas: Replicas, buckets: Sequence[Bucket]) -> None:
        self._replicas, self._buckets = replicas, buckets
        self._next = 0
        self._travelling: SharedBucket | None = None
        self._micro_step: MicroStep | None = None
        self._put_off: list[Bucket] = []  # those of the running pass whose gradients are to be weighed, and no more
        self._alone: list[Bucket] = []  # of one variable, with what micro-steps before have added up
        self._puts_off = False  # whether backward passes send nothing
        self._own: dict[int, Any] = {}  # variables in whose parameters such passes have left gradients, by id
        self._undo: list[Callable[[], None]] = []
        self._is_told = False  # whether it is told before gradients are added to what is in parameters

    @contextlib.contextmanager
    def putting_off(self) -> Iterator[None]:
        """Inside, backward passes leave each replica its own gradients, weighed by samples, and send none.

        What they add up to travels with the gradients of the next pass outside.
        """
        self._be_told()
        before, self._puts_off = self._puts_off, True
        try:
            yield
        finally:
            self._puts_off = before

    def _be_told(self) -> None:
        if self._is_told:
            return
        self._is_told = True
        for bucket in self._buckets:
            if not isinstance(bucket, SharedBucket):
                for position in range(len(bucket.variables)):
                    expected = functools.partial(self._expected, bucket, position)
                    self._undo += [handle.remove for handle in _hooked(bucket, position, expected, None)]

    def _expected(self, bucket: Bucket, position: int, _: Any = None) -> None:
        variable = bucket.variables[position]
        if id(variable) not in self._own or position in bucket.sums:
            return
        if variable._value.grad is None:  # which somebody has set to nothing
            del self._own[id(variable)]
        else:
            bucket.set_aside(position)

    @property
    def own_variables(self) -> tuple[Any, ...]:
        """Those whose gradients were put off, and not sent since."""
        return tuple(self._own.values())

    def is_own(self, variable: Any) -> bool:
        """Whether the gradient in a variable's parameter is this replica's alone."""
        return self.has_put_off(variable) and variable._value.grad is not None

    def has_put_off(self, variable: Any) -> bool:
        """Whether the last pass that had a gradient of a variable has left it to this replica."""
        return id(variable) in self._own

    @contextlib.contextmanager
    def micro_step_of(self, optimizer: Any) -> Iterator[None]:
        """Inside, one training step runs whose gradients go to this optimizer, and to nothing else.

        If it puts averaging off, gradients that are not averaged are gone afterwards.
        """
        if not getattr(optimizer, "puts_averaging_off", False):
            yield
            return
        self._micro_step = optimizer.__dict__["_micro_step"] = MicroStep(optimizer)
        try:
            yield
        finally:
            for variable in self._micro_step.own.values():
                variable._value.grad = None
            self._micro_step = None
            del optimizer.__dict__["_micro_step"]

    def watch(self, undo: list[Callable[[], None]]) -> None:
        """Begin; add what ends it."""
        self._undo = undo
        self._replicas.at_end.append(self._end)
        for bucket in self._buckets:
            for position, variable in enumerate(bucket.variables):
                undo += [handle.remove for handle in self._watch(bucket, position)]
                _averaged_by[id(variable)] = self
                undo.append(functools.partial(_forget, id(variable)))

    def _watch(self, bucket: Bucket, position: int) -> list[Any]:
        def arrived(_: torch.Tensor) -> None:
            self._arrived(bucket, position)

        expected = (lambda _: bucket.expect(position)) if isinstance(bucket, SharedBucket) else None
        return _hooked(bucket, position, expected, arrived)

    def _arrived(self, bucket: Bucket, position: int) -> None:
        self._replicas.meet(bucket.device)
        bucket.arrived.add(position)
        while self._next < len(self._buckets) and self._buckets[self._next].is_complete:
            if self._buckets[self._next].late:
                return
            self._send(self._buckets[self._next])

    def expect(self, variable: Any) -> None:
        """Note that the gradient of a variable of a late bucket is about to be added to what is in its parameter."""
        for bucket, position in self._late_places(variable):
            bucket.expect(position)
            self._expected(bucket, position)

    def arrive(self, variable: Any) -> None:
        """Note that the gradient of a variable of a late bucket is in its parameter."""
        for bucket, position in self._late_places(variable):
            bucket.arrived.add(position)

    def _late_places(self, variable: Any) -> Iterator[tuple[Bucket, int]]:
        for bucket in self._buckets:
            if bucket.late:
                yield from ((bucket, place) for place, each in enumerate(bucket.variables) if each is variable)

    def _send(self, bucket: Bucket) -> None:
        self._next += 1
        if not self._puts_off:
            self._take_own(bucket)
        if not (bucket.arrived or bucket.always):
            return
        if isinstance(bucket, SharedBucket):
            if self._travelling is not None:
                self._travelling.finish()
            self._travelling = bucket
        elif self._puts_off:
            self._own |= {id(each): each for each in map(bucket.variables.__getitem__, bucket.arrived)}
            self._put_off.append(bucket)
            return
        elif self._micro_step is not None:
            if self._micro_step.puts_off(bucket.variables):
                self._put_off.append(bucket)
                return
            bucket.sums = self._micro_step.sums_of(bucket.variables)
            if bucket.sums and bucket.always and len(bucket.variables) == 1:
                self._alone.append(bucket)
        bucket.send(self._replicas)

    def _take_own(self, bucket: Bucket) -> None:
        """Let what passes before have put off travel with a bucket."""
        for position, variable in enumerate(bucket.variables if self._own else ()):
            if self._own.pop(id(variable), None) is not None:
                if position not in bucket.arrived:
                    bucket.set_aside(position)
                if position in bucket.sums:
                    bucket.arrived.add(position)

    def mean(self, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the means over the replicas of gradients that no backward pass has left in their parameters."""
        with torch.no_grad():
            samples = self._replicas.samples
            total = gradients[0].new_full((1,), samples, dtype=torch.float64)
            add_in_place(total, self._replicas.axis, SAMPLES)
            share = samples / wait(total)
            weighed = [each * share.to(each.dtype) if samples else torch.zeros_like(each) for each in gradients]
            return add_together(weighed, self._replicas.axis, GRADIENTS)

    def _end(self) -> None:
        try:
            with torch.no_grad():
                for bucket in self._buckets[self._next :]:
                    self._send(bucket)
                marked = self._mark_those_alone()
                for bucket in self._put_off:
                    bucket.weigh(self._replicas)
                for bucket, mark in zip(self._alone, wait(marked) if self._alone else (), strict=True):
                    bucket.mark = mark
                for bucket in self._buckets:
                    bucket.finish()
        finally:
            self._next, self._travelling = 0, None
            self._put_off.clear()
            self._alone.clear()
            for bucket in self._buckets:
                bucket.clear()

    def _mark_those_alone(self) -> torch.Tensor:
        """Begin to count on how many replicas a gradient has arrived, for each that travels without a mark.

        What was added up before travels with a gradient that is not there, too, and does not tell.
        """
        marked = torch.ones(len(self._alone), device=self._alone[0].device) if self._alone else torch.empty(0)
        for number, bucket in enumerate(self._alone):
            if not bucket.is_complete:
                marked[number].zero_()
        if self._alone:
            add_in_place(marked, self._replicas.axis, MARKS)
        return marked


def _hooked(bucket: Bucket, position: int, expected: Any, arrived: Any) -> list[Any]:
    """Let functions be called before and after a gradient is added to what is in a parameter, and return the hooks."""
    parameter = bucket.variables[position]._value
    frozen = not parameter.requires_grad
    if frozen:  # it may be trained later, and hooks are taken by parameters only that need a gradient
        parameter.requires_grad = True
    handles = [] if arrived is None else [parameter.register_post_accumulate_grad_hook(arrived)]
    if expected is not None:
        handles.append(parameter.register_hook(expected))
    if frozen:
        parameter.requires_grad = False
    return handles


_averaged_by: dict[int, Averaging] = {}  # by id of the variable


def _forget(variable: int) -> None:
    _averaged_by.pop(variable, None)


def averaging_of(variables: Iterable[Any]) -> Averaging | None:
    """Return what averages the gradients of these variables; None if nothing does."""
    return next((_averaged_by[id(each)] for each in variables if id(each) in _averaged_by), None)


def require_averaged(variables: Iterable[Any]) -> None:
    """Raise ParallelRuntimeError if gradients of the variables are this replica's alone."""
    for variable in variables:
        averaging = _averaged_by.get(id(variable))
        if averaging is not None and averaging.is_own(variable):
            raise _its_own(variable)


def _its_own(variable: Any) -> ParallelRuntimeError:
    return ParallelRuntimeError(
        f"the gradient of {variable.path!r} is this replica's alone; make the last backward pass before an "
        f"update outside of tp_planner.no_sync, which sends what all of them have added up"
    )


def require_averaged_gradients(gradients: Iterable[torch.Tensor]) -> None:
    """Raise ParallelRuntimeError if gradients that are read where parameters have them are this replica's alone."""
    asked = set(map(id, gradients))
    for averaging in set(_averaged_by.values()):
        require_averaged(each for each in averaging.own_variables if id(each._value.grad) in asked)


def require_averaged_in(parameters: Iterable[torch.Tensor]) -> None:
    """Raise ParallelRuntimeError if gradients in the parameters are this replica's alone."""
    asked = set(map(id, parameters))
    for averaging in set(_averaged_by.values()):
        require_averaged(each for each in averaging.own_variables if id(each._value) in asked)


def averaged(gradients: Sequence[Any], variables: Sequence[Any]) -> Sequence[Any]:
    """Return the gradients, those averaged that are not what a backward pass has left in the variables' parameters.

    They may come from ``torch.autograd.grad``, which no hook sees. A mean of means is what it was, so that gradients
    which a training loop has made of averaged ones may come too. Of a variable whose update is shared it is this
    replica's part. Raises ParallelRuntimeError for gradients that were put off.
    """
    require_averaged(variables)
    strays = [
        position
        for position, (gradient, variable) in enumerate(zip(gradients, variables, strict=False))
        if gradient is not None and id(variable) in _averaged_by and _is_stray(gradient, variable)
    ]
    if not strays:
        return gradients
    for position in strays:
        if _averaged_by[id(variables[position])].has_put_off(variables[position]):
            raise _its_own(variables[position])  # or a copy of what was in its parameter
    means = _averaged_by[id(variables[strays[0]])].mean([local_gradient(gradients[position]) for position in strays])
    result = list(gradients)
    for position, mean in zip(strays, means, strict=True):
        given, share = gradients[position], share_of(variables[position])
        if share is not None:
            result[position] = share.of_gradient(mean)
            continue
        result[position] = DTensor(mean, given._spec, requires_grad=False) if isinstance(given, DTensor) else mean
    return result


def _is_stray(gradient: torch.Tensor, variable: Any) -> bool:
    share = share_of(variable)
    if share is not None:  # the part is shorter than the whole on all ranks
        return local_gradient(gradient).shape != share.part.shape
    return not _is_left_in(gradient, variable._value)


def _is_left_in(gradient: torch.Tensor, parameter: torch.Tensor) -> bool:
    if parameter.grad is None:
        return False
    given, left = local_gradient(gradient), local_gradient(parameter.grad)
    same_storage = given.untyped_storage()._cdata == left.untyped_storage()._cdata
    return same_storage and given.storage_offset() == left.storage_offset()
