"""Averaging: gradients of variables that every replica stores, bucket by bucket, while the backward pass runs.

As torch's DistributedDataParallel does (https://arxiv.org/abs/2006.15704), which fails on DTensor parameters, and sees
only what is called through its wrapper, not what ``fit`` calls. A bucket's all-reduce starts when the last of its
gradients has arrived and no bucket before it waits; ``backward()`` returns when all have ended. Gradients are then
views of their bucket.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from tp_planner.regions.calls import Site
from tp_planner.regions.replicas import SAMPLES, Replicas, add_in_place, wait
from tp_planner.storage.variables import local_tensor

GRADIENTS = Site("", "gradients")


class Bucket:
    """Variables of one dtype whose gradients travel together, and behind them a mark for each that has one.

    The gradient of a single variable travels as it is. ``always`` says that the bucket travels in every backward pass;
    else it does only if one of its gradients has arrived. One that is ``late`` waits for the end of the pass, when the
    last summands of its gradients have been added.
    """

    def __init__(self, variables: Sequence[Any], site: Site, always: bool, late: bool = False) -> None:
        self.variables, self.site, self.always, self.late = tuple(variables), site, always, late
        shapes = [local_tensor(variable).shape for variable in variables]
        ends = list(itertools.accumulate(shape.numel() for shape in shapes))
        self._views = [(end - shape.numel(), end, shape) for end, shape in zip(ends, shapes, strict=True)]
        self.device = local_tensor(variables[0]).device
        self.arrived: set[int] = set()  # positions of variables
        self.flat: torch.Tensor | None = None

    @property
    def is_complete(self) -> bool:
        return len(self.arrived) == len(self.variables)

    def fill(self, replicas: Replicas) -> torch.Tensor:
        """Put the gradients that have arrived into one tensor, in which they are from now on, and return it weighed."""
        gradients = [self._gradient(position) for position in range(len(self.variables))]
        if len(gradients) == 1:
            self.flat = gradients[0].reshape(-1)
        elif self.is_complete:
            self.flat = _joined(gradients, gradients[0].new_ones(len(gradients)))
        else:
            marks = [float(position in self.arrived) for position in range(len(gradients))]
            self.flat = _joined(gradients, gradients[0].new_tensor(marks))
        if replicas.samples:
            self.flat.mul_(replicas.share(self.device))
        else:  # it may be the gradient of the mean of nothing
            self.flat.zero_()
        for position in self.arrived:
            self._place(position)
        return self.flat

    def _gradient(self, position: int) -> torch.Tensor:
        gradient = self.variables[position]._value.grad
        if gradient is None:
            return torch.zeros_like(local_tensor(self.variables[position]))
        return _local(gradient)  # of an earlier pass, where none has arrived in this one: the average goes on from it

    def _view(self, position: int) -> torch.Tensor:
        assert self.flat is not None
        start, end, shape = self._views[position]
        return self.flat[start:end].view(shape)

    def _place(self, position: int) -> None:
        parameter, view = self.variables[position]._value, self._view(position)
        parameter.grad = DTensor(view, parameter._spec, requires_grad=False) if isinstance(parameter, DTensor) else view

    def finish(self) -> None:
        """Wait for the sum; gradients that only other replicas have are this replica's too."""
        if self.flat is None:
            return
        wait(self.flat)
        missing = set(range(len(self.variables))) - self.arrived
        if missing and not isinstance(self.flat, FakeTensor):
            marks = (
                self.flat[-len(self.variables) :].tolist() if len(self.variables) > 1 else self.flat.any().reshape(1)
            )
            for position in missing:
                if marks[position] > 0:
                    self._place(position)
        self.arrived, self.flat = set(), None


def _joined(gradients: Sequence[torch.Tensor], marks: torch.Tensor) -> torch.Tensor:
    return torch.cat([*(gradient.reshape(-1) for gradient in gradients), marks])


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient._local_tensor if isinstance(gradient, DTensor) else gradient


class Averaging:
    """Watches the gradients of the buckets' variables arrive, and averages them over the replicas."""

    def __init__(self, replicas: Replicas, buckets: Sequence[Bucket]) -> None:
        self._replicas, self._buckets = replicas, buckets
        self._next = 0

    def watch(self, undo: list[Callable[[], None]]) -> None:
        """Begin; add what ends it."""
        self._replicas.at_end.append(self._end)
        for bucket in self._buckets:
            for position, variable in enumerate(bucket.variables):
                undo.append(self._watch(bucket, position).remove)
                _averaged_by[id(variable)] = self
                undo.append(functools.partial(_forget, id(variable)))

    def _watch(self, bucket: Bucket, position: int) -> Any:
        parameter = bucket.variables[position]._value

        def arrived(_: torch.Tensor) -> None:
            self._arrived(bucket, position)

        frozen = not parameter.requires_grad
        if frozen:  # it may be trained later, and hooks are taken by parameters only that need a gradient
            parameter.requires_grad = True
        handle = parameter.register_post_accumulate_grad_hook(arrived)
        if frozen:
            parameter.requires_grad = False
        return handle

    def _arrived(self, bucket: Bucket, position: int) -> None:
        self._replicas.meet(bucket.device)
        bucket.arrived.add(position)
        while self._next < len(self._buckets) and self._buckets[self._next].is_complete:
            if self._buckets[self._next].late:
                return
            self._send(self._buckets[self._next])

    def arrive(self, variable: Any) -> None:
        """Note that the gradient of a variable of a late bucket is in its parameter."""
        for bucket in self._buckets:
            if bucket.late:
                bucket.arrived.update(position for position, each in enumerate(bucket.variables) if each is variable)

    def _send(self, bucket: Bucket) -> None:
        self._next += 1
        if bucket.arrived or bucket.always:
            add_in_place(bucket.fill(self._replicas), self._replicas.axis, bucket.site)

    def mean(self, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the means over the replicas of gradients that no backward pass has left in their parameters."""
        with torch.no_grad():
            samples = self._replicas.samples
            total = gradients[0].new_full((1,), samples, dtype=torch.float64)
            add_in_place(total, self._replicas.axis, SAMPLES)
            share, means = samples / wait(total), list(gradients)
            for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
                same = [position for position, gradient in enumerate(gradients) if gradient.dtype == dtype]
                flat = torch.cat([gradients[position].reshape(-1) for position in same])
                flat = flat.mul_(share) if samples else flat.zero_()
                add_in_place(flat, self._replicas.axis, GRADIENTS)
                parts = wait(flat).split([gradients[position].numel() for position in same])
                for position, part in zip(same, parts, strict=True):
                    means[position] = part.view(gradients[position].shape)
            return means

    def _end(self) -> None:
        try:
            with torch.no_grad():
                for bucket in self._buckets[self._next :]:
                    self._send(bucket)
                for bucket in self._buckets:
                    bucket.finish()
        finally:
            self._next = 0
            for bucket in self._buckets:
                bucket.arrived, bucket.flat = set(), None


_averaged_by: dict[int, Averaging] = {}  # by id of the variable


def _forget(variable: int) -> None:
    _averaged_by.pop(variable, None)


def averaged(gradients: Sequence[Any], variables: Sequence[Any]) -> Sequence[Any]:
    """Return the gradients, those averaged that are not what a backward pass has left in the variables' parameters.

    They may come from ``torch.autograd.grad``, which no hook sees. A mean of means is what it was, so that gradients
    which a training loop has made of averaged ones may come too.
    """
    strays = [
        position
        for position, (gradient, variable) in enumerate(zip(gradients, variables, strict=False))
        if gradient is not None and id(variable) in _averaged_by and not _is_left_in(gradient, variable._value)
    ]
    if not strays:
        return gradients
    means = _averaged_by[id(variables[strays[0]])].mean([_local(gradients[position]) for position in strays])
    result = list(gradients)
    for position, mean in zip(strays, means, strict=True):
        given = gradients[position]
        result[position] = DTensor(mean, given._spec, requires_grad=False) if isinstance(given, DTensor) else mean
    return result


def _is_left_in(gradient: torch.Tensor, parameter: torch.Tensor) -> bool:
    if parameter.grad is None:
        return False
    given, left = _local(gradient), _local(parameter.grad)
    same_storage = given.untyped_storage()._cdata == left.untyped_storage()._cdata
    return same_storage and given.storage_offset() == left.storage_offset()
