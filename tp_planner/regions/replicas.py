"""Replicas: copies of the model along the batch axis, each of which sees its own share of the batch.

What they compute together is what one process computes on all of the batch. The loss is taken for a mean over
samples, so that the gradient of all of them is the mean of the replicas' gradients, weighed by their samples. Losses
that are no such means are made ones (``losses.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch

from tp_planner.job.axes import Axis
from tp_planner.regions.calls import Site, standing_at

SAMPLES = Site("", "samples of each replica")


class Replicas:
    """The batch axis of a parallel model: this process's place on it, and how much its replica counts.

    ``samples`` is how many samples the replica was last called on; set it to count otherwise, 0 for rows that only
    fill up a batch. ``rows`` is the length of that call's inputs.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.samples: float = 1.0
        self.rows = 1
        self.at_end: list[Callable[[], None]] = []  # called when a backward pass ends in which replicas met
        self.on_its_way: Callable[[], None] | None = None  # takes a sum of gradients that was sent and not waited for
        self._finish: list[Callable[[], None]] = []  # called when the running backward pass ends
        self._pass = -1
        self._total: torch.Tensor | None = None
        self._share: torch.Tensor | None = None

    def see(self, model: keras.Model, args: Any, kwargs: Any) -> None:
        """Note how many samples the model is called on; a hook of the model."""
        if not torch.is_grad_enabled():
            return
        for leaf in keras.tree.flatten((args, kwargs)):
            if hasattr(leaf, "shape") and len(leaf.shape):
                self.rows = int(leaf.shape[0])
                self.samples = float(self.rows)
                return

    def meet(self, device: torch.device) -> None:
        """Note that a backward pass runs; the first time in it, ask all replicas for their samples."""
        running = torch._C._current_graph_task_id()
        if running == self._pass:
            return
        self.take_what_is_on_its_way()  # of a pass that failed, or of one in which this one runs
        self._pass, self._share = running, None
        self._total = torch.full((1,), self.samples, dtype=torch.float64, device=device)
        add_in_place(self._total, self.axis, SAMPLES)
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def finish_with(self, finish: Callable[[], None]) -> None:
        """Call something when the running backward pass ends, in which replicas meet."""
        self._finish.append(finish)

    def take_what_is_on_its_way(self) -> None:
        """Wait for the sum of gradients that is on its way, and leave it where it belongs."""
        take, self.on_its_way = self.on_its_way, None
        if take is not None:
            take()

    def share(self, device: torch.device) -> torch.Tensor:
        """Return this replica's share of the samples of the running backward pass, a number of float64."""
        self.meet(device)
        if self._share is None:
            assert self._total is not None
            self._share = (self.samples / wait(self._total)).reshape(())
        return self._share

    def _end(self) -> None:
        try:
            for each in (self.take_what_is_on_its_way, *self._finish, *self.at_end):
                each()
            if self._share is None and self._total is not None:  # a replica without samples has not asked
                wait(self._total)
        finally:
            self._pass, self._total, self._share = -1, None, None
            self._finish.clear()


def add_in_place(tensor: torch.Tensor, axis: Axis, site: Site | None) -> None:
    """Begin to replace a contiguous tensor by the sum over the axis; ``wait`` for it before it is read."""
    with standing_at(site):
        torch.ops._c10d_functional.all_reduce_(tensor, "sum", axis.mesh.get_group().group_name)


def wait(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor once what was begun on it has ended."""
    result: torch.Tensor = torch.ops._c10d_functional.wait_tensor(tensor)
    return result


def add_together(tensors: Sequence[torch.Tensor], axis: Axis, site: Site) -> list[torch.Tensor]:
    """Return the sums of tensors over the axis, those of one dtype added in one collective."""
    sums = list(tensors)
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        same = [position for position, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[position].reshape(-1) for position in same])
        add_in_place(flat, axis, site)
        parts = wait(flat).split([tensors[position].numel() for position in same])
        for position, part in zip(same, parts, strict=True):
            sums[position] = part.view(tensors[position].shape)
    return sums
