"""Summands: gradients of whole variables that are used on shards of the residual stream.

Each rank has a summand of them. They are set aside as the backward pass meets them, added over the model axis in a few
buckets when it ends, and are in the variables' gradients when ``backward()`` returns: beside what came there by other
ways (regularizers, another pass before), which is whole on every rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tp_planner.job.axes import Axis
from tp_planner.regions.calls import Site
from tp_planner.regions.replicas import Replicas, add_in_place, wait

ALONE = Site("", "summand that was asked for by name")


def site_of(number: int) -> Site:
    """Return where the plan has the sum of its ``number``-th bucket."""
    return Site("", f"summands {number}")


class Summands:
    """The summands of one parallel model.

    ``waiting`` says that they are set aside; before that, in a simulated step, they pass as they are. ``before_sum`` is
    called with each variable to whose gradient its sum is about to be added, ``at_sum`` when it is.
    """

    def __init__(self, axis: Axis, replicas: Replicas | None) -> None:
        self.axis, self._replicas = axis, replicas
        self.waiting = False
        self.before_sum: Callable[[Any], None] = lambda variable: None
        self.at_sum: Callable[[Any], None] = lambda variable: None
        self._buckets: list[tuple[Site, Sequence[Any]]] = []
        self._set_aside: dict[int, dict[int, torch.Tensor]] = {}  # by pass, then by id of the variable

    def wait(self, buckets: Sequence[tuple[Site, Sequence[Any]]]) -> None:
        """From now on set summands aside; ``buckets`` are the variables whose summands are added together."""
        self._buckets, self.waiting = list(buckets), True
        if self._replicas is not None:
            self._replicas.at_end.insert(0, self._add_all)  # replicas average what was added

    def read(self, variable: Any) -> torch.Tensor:
        """Return the value of a variable that is stored whole; what flows back to it is a summand."""
        if self._set_aside and torch._C._current_graph_task_id() == -1:
            self._set_aside.clear()  # of a backward pass that failed
        parameter: torch.nn.Parameter = variable._value
        if not (parameter.requires_grad and torch.is_grad_enabled()):
            return parameter
        value: torch.Tensor = _Read.apply(parameter, variable, self)
        return value

    def take(self, variable: Any, summand: torch.Tensor, parameter: Any) -> torch.Tensor | None:
        """Return the gradient that goes on to the parameter now; None if that is in the end.

        Args:
            variable: the variable.
            summand: this rank's.
            parameter: the node of autograd at which gradients are left in the parameter.
        """
        if not self.waiting:
            return summand
        try:
            wanted = torch._C._will_engine_execute_node(parameter)
        except RuntimeError:  # torch.autograd.grad was called with this parameter
            total = summand.clone(memory_format=torch.contiguous_format)
            add_in_place(total, self.axis, ALONE)
            return wait(total)
        if wanted:
            self._keep(variable, summand)
        return None

    def _keep(self, variable: Any, summand: torch.Tensor) -> None:
        here = self._of_running_pass(summand.device)
        before = here.get(id(variable))
        here[id(variable)] = summand if before is None else before + summand

    def _of_running_pass(self, device: torch.device) -> dict[int, torch.Tensor]:
        """Return what the running backward pass has set aside; it is added when the pass ends."""
        if self._replicas is not None:
            self._replicas.meet(device)
        running = torch._C._current_graph_task_id()
        if running not in self._set_aside:
            self._set_aside[running] = {}
            if self._replicas is None:
                add = functools.partial(self._add, running)
                torch.autograd.Variable._execution_engine.queue_callback(add)
        return self._set_aside[running]

    def _add_all(self) -> None:
        for each in list(self._set_aside):
            self._add(each)

    def _add(self, ended: int) -> None:
        summands = self._set_aside.pop(ended)
        with torch.no_grad():
            begun = []
            for site, bucket in self._buckets:
                if here := [variable for variable in bucket if id(variable) in summands]:
                    flat = torch.cat([summands.pop(id(variable)).reshape(-1) for variable in here])
                    add_in_place(flat, self.axis, site)
                    begun.append((here, flat))
            for variables, flat in begun:
                self._hand_out(variables, wait(flat))

    def _hand_out(self, variables: Sequence[Any], flat: torch.Tensor) -> None:
        sums = flat.split([math.prod(variable.shape) for variable in variables])
        for variable, each in zip(variables, sums, strict=True):
            self.before_sum(variable)
            parameter, total = variable._value, each.view(variable._value.shape)
            if parameter.grad is None:
                parameter.grad = total
            else:
                parameter.grad.add_(total)
            self.at_sum(variable)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, variable: Any, summands: Summands) -> torch.Tensor:
        ctx.variable, ctx.summands = variable, summands
        return parameter.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (parameter, _), *_ = ctx.next_functions
        return ctx.summands.take(ctx.variable, gradient, parameter), None, None
