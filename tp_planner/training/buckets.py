"""Buckets: gradients that travel together over the replicas, and what each replica is left of their mean.

Of a bucket that is averaged it is the whole, of one whose update is shared the part that this replica updates.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from tp_planner.ir.placement import Shard
from tp_planner.regions.buffers import Cut, Reduced
from tp_planner.regions.calls import Site, standing_at
from tp_planner.regions.replicas import Replicas, add_in_place, wait
from tp_planner.storage.variables import local_tensor
from tp_planner.training.shares import Share


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
        self.sums: dict[int, torch.Tensor] = {}  # by position, what this replica has added up before, and not sent
        self.flat: torch.Tensor | None = None
        self.mark: torch.Tensor | None = None  # of a single variable, where what travels does not tell

    @property
    def is_complete(self) -> bool:
        return len(self.arrived) == len(self.variables)

    def expect(self, position: int) -> None:
        """Note that a gradient is about to be added to what is in its parameter."""

    def send(self, replicas: Replicas) -> None:
        """Begin to average the gradients that have arrived."""
        add_in_place(self._fill(replicas), replicas.axis, self.site)

    def _fill(self, replicas: Replicas) -> torch.Tensor:
        """Put the gradients that have arrived into one tensor, in which they are from now on, and return it weighed."""
        gradients = [self._gradient(position) for position in range(len(self.variables))]
        if len(gradients) == 1:
            self.flat = gradients[0].reshape(-1)
        else:
            self.flat = _joined(gradients, self._own_marks(gradients[0]))
        _weigh(self.flat, replicas)
        for position, before in self.sums.items():
            self._view(position).add_(before)
        self.sums = {}
        for position in self.arrived:
            self._place(position)
        return self.flat

    def _own_marks(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return 1 for each variable whose gradient has arrived, else 0, as gradients are; no host waits for it."""
        marks = gradient.new_ones(len(self.variables))
        for position in range(0 if self.is_complete else len(self.variables)):
            if position not in self.arrived:
                marks[position].zero_()
        return marks

    def weigh(self, replicas: Replicas) -> None:
        """Weigh the gradients that have arrived by samples, where they are; they are not sent in this pass.

        What was set aside is added to them.
        """
        for position in self.arrived:
            gradient = self._gradient(position)
            _weigh(gradient, replicas)
            if position in self.sums:
                gradient.add_(self.sums.pop(position))

    def set_aside(self, position: int) -> None:
        """Set aside what this replica has added up in a parameter, so that it is not weighed again."""
        parameter = self.variables[position]._value
        if parameter.grad is not None:
            self.sums[position], parameter.grad = local_gradient(parameter.grad), None

    def _gradient(self, position: int) -> torch.Tensor:
        gradient = self.variables[position]._value.grad
        if gradient is None:
            return torch.zeros_like(local_tensor(self.variables[position]))
        # Of an earlier pass, where none has arrived in this one: the average goes on from it.
        return local_gradient(gradient)

    def _view(self, position: int) -> torch.Tensor:
        assert self.flat is not None
        start, end, shape = self._views[position]
        return self.flat[start:end].view(shape)

    def _place(self, position: int) -> None:
        self._put(position, self._view(position))

    def _put(self, position: int, view: torch.Tensor) -> None:
        parameter = self.variables[position]._value
        parameter.grad = DTensor(view, parameter._spec, requires_grad=False) if isinstance(parameter, DTensor) else view

    def finish(self) -> None:
        """Wait for the sum; gradients that only other replicas have are this replica's too."""
        if self.flat is None:
            return
        wait(self.flat)
        missing = set(range(len(self.variables))) - self.arrived
        if missing and not isinstance(self.flat, FakeTensor):
            marks = self._marks(self.flat).tolist()
            for position in missing:
                if marks[position] > 0:
                    self._place(position)
        self.clear()

    def _marks(self, flat: torch.Tensor) -> torch.Tensor:
        """Return for each variable a number above 0 if any replica has a gradient of it."""
        if len(self.variables) > 1:
            return flat[-len(self.variables) :]
        return (flat.any() if self.mark is None else self.mark).reshape(1)

    def clear(self) -> None:
        """Be as before the pass."""
        for position, before in self.sums.items():  # to which nothing was added
            self._put(position, before)
        self.arrived, self.flat, self.sums, self.mark = set(), None, {}, None


class SharedBucket(Bucket):
    """Variables whose update is shared: of the mean of their gradients a replica is left its part alone.

    What a pass before has left there is set aside when a gradient arrives, and the new mean is added to it.
    """

    def __init__(self, shares: Sequence[Share], site: Site, always: bool, late: bool = False) -> None:
        super().__init__([share.variable for share in shares], site, always, late)
        self._shares = tuple(shares)
        self._before: dict[int, DTensor] = {}  # by position, what a pass before has left
        self._reduced: Reduced | None = None

    def expect(self, position: int) -> None:
        parameter = self.variables[position]._value
        left: Any = parameter.grad
        if left is not None and self._shares[position].is_part(left):
            self._before[position], parameter.grad = left, None

    def send(self, replicas: Replicas) -> None:
        """Begin to add the gradients that have arrived, of which nothing is kept here from now on."""
        gradients = [self._arrived_gradient(position) for position in range(len(self.variables))]
        marks = self._own_marks(gradients[0])
        ranks, cuts = replicas.axis.size, [share.cut for share in self._shares]
        # All marks go to each replica, for each has to know whose gradients there are.
        gradients.append(marks.repeat(ranks))
        cuts.append(Cut((ranks * len(marks),), Shard(0)))
        # Without samples they may be the gradients of the mean of nothing.
        weight = replicas.share(self.device) if replicas.samples else None
        with standing_at(self.site):
            self._reduced = Reduced(gradients, cuts, replicas.axis, weight)
        for position in self.arrived:
            self.variables[position]._value.grad = None

    def _arrived_gradient(self, position: int) -> torch.Tensor:
        variable = self.variables[position]
        if position in self.arrived:
            return local_gradient(variable._value.grad)
        self.expect(position)
        return torch.zeros_like(local_tensor(variable))

    def finish(self) -> None:
        """Wait for the sum, and leave this replica's parts in the parameters."""
        if self._reduced is None:
            return
        *parts, marks = self._reduced.parts()
        missing = set(range(len(self.variables))) - self.arrived
        arrived = self.arrived | ({place for place in missing if marks[place] > 0} if missing else set())
        for position in arrived:
            self._leave(position, parts[position])
        self.clear()

    def _leave(self, position: int, part: torch.Tensor) -> None:
        before = self._before.pop(position, None)
        if before is not None:
            part = before._local_tensor.add_(part)
        self.variables[position]._value.grad = self._shares[position].gradient(part)

    def clear(self) -> None:
        for position, before in self._before.items():  # to which nothing was added
            self.variables[position]._value.grad = before
        self._before, self._reduced = {}, None
        super().clear()


def _weigh(gradient: torch.Tensor, replicas: Replicas) -> None:
    if replicas.samples:
        gradient.mul_(replicas.share(gradient.device))
    else:  # it may be the gradient of the mean of nothing
        gradient.zero_()


def _joined(gradients: Sequence[torch.Tensor], marks: torch.Tensor) -> torch.Tensor:
    return torch.cat([*(gradient.reshape(-1) for gradient in gradients), marks])


def local_gradient(gradient: torch.Tensor) -> torch.Tensor:
    """Return what this rank has of a gradient."""
    return gradient._local_tensor if isinstance(gradient, DTensor) else gradient
