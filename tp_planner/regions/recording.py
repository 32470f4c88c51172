"""Recording: which collectives run, and where they stand in the plan.

A dispatch mode sees every communicating op, whoever calls it: a boundary of the plan, DTensor, Keras, or the
model's own code. What runs at a site of the plan is planned; everything else is implicit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import keras
import torch
from torch.distributed.tensor import DTensor

from tp_planner.frontend.dispatch import WatchingMode, tensors_in
from tp_planner.frontend.layer_tree import named_layers
from tp_planner.ir.step import Collective, CollectiveKind, Phase
from tp_planner.job.axes import Axes
from tp_planner.regions.calls import METRICS, running

# By the names of torch's functional collectives, and of the older ones that work in place.
KINDS: dict[str, CollectiveKind] = {
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "broadcast_": "broadcast",
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "all_reduce_coalesced": "all_reduce",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "allreduce_coalesced_": "all_reduce",
}
LOCAL_OPS = {"wait_tensor", "_wrap_tensor_autograd"}  # of the same namespaces, but they send nothing
REASONS: dict[str, str] = {
    "all_reduce": "summands of the ranks are added",
    "all_gather": "shards of the ranks are put together",
    "reduce_scatter": "summands of the ranks are added, and each rank keeps its shard",
}


class CollectiveRecorder(WatchingMode):
    """Records the collectives that run on these axes, and elsewhere, while it is entered, in order."""

    def __init__(self, axes: Axes) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self._axes = {axis.mesh.get_group().group_name: axis for axis in axes.all}
        # Older collectives do not say their group; of one axis they are taken to be on it.
        self._only = axes.model if axes.batch is None else None
        self.phase: Phase = "forward"
        self._calling: list[str] = []  # the layers whose calls are running
        self.asked = ""  # the op on DTensors that is running: what communicates in it does so for this op

    def watch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() != -1:  # autograd runs
            self.phase = "backward"
        elif self.phase == "backward":
            self.phase = "update"
        if any(issubclass(kind, DTensor) for kind in types):
            return self._run_on_dtensors(func, args, kwargs)
        if func.namespace in ("_c10d_functional", "c10d"):
            name = func.__name__.partition(".")[0]
            if name not in LOCAL_OPS and running.site != METRICS:
                self.note(self._collective(str(func), name, args))
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def naming_layers(self, model: keras.Model) -> Iterator[None]:
        """Inside, what communicates without a site is known by the layer that is running."""
        with contextlib.ExitStack() as stack:
            for name, layer in named_layers(model).items():
                enter = functools.partial(self._enter, name)
                stack.callback(layer.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(layer.register_forward_hook(self._leave, always_call=True).remove)
            yield

    def _enter(self, name: str, layer: keras.Layer, args: Any) -> None:
        self._calling.append(name)

    def _leave(self, layer: keras.Layer, args: Any, output: Any) -> None:
        self._calling.pop()

    def note(self, collective: Collective) -> None:
        """Keep a collective that is about to run."""
        self.collectives.append(collective)

    def _run_on_dtensors(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.asked:
            return NotImplemented  # DTensor runs the op on local tensors, under this mode again
        self.asked = str(func)
        try:
            with self:
                return func(*args, **kwargs)
        finally:
            self.asked = ""

    def _collective(self, op: str, name: str, args: tuple[Any, ...]) -> Collective:
        kind = KINDS.get(name, "other")
        site = running.site
        sent = _input_of(kind, name, args)
        layer = site.layer if site else (self._calling[-1] if self._calling else "")
        functional = op.startswith("_c10d_functional")
        axis = self._axes.get(args[-1]) if functional else self._only
        return Collective(
            kind=kind,
            axis="" if axis is None else axis.name,
            group_size=torch.distributed.get_world_size() if axis is None else axis.size,
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in sent),
            layer=layer,
            place=site.place if site else "",
            phase=self.phase,
            reason=REASONS.get(kind, "") if site else "no boundary of the plan asks for it",
            cause="" if site else self.asked or op,
            early=site is not None and site.early,
        )


def _input_of(kind: str, name: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """Return the tensors that a rank sends; the ops that work in place take outputs first, where these differ."""
    in_place = name in ("allgather_", "_allgather_base_", "reduce_scatter_", "_reduce_scatter_base_", "alltoall_")
    given = args[1] if in_place or name == "alltoall_base_" else args[0]
    return list(tensors_in(given))
