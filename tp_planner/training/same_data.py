"""Same data: the first batches of a parallel model are compared over the ranks that hold parts of one replica."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import keras
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from tp_planner.frontend.calling import leaves_no_trace
from tp_planner.ir.errors import ParallelRuntimeError
from tp_planner.ir.placement import Shard
from tp_planner.job.same_data import differing_data
from tp_planner.layers.apply import Applied

FIRST_CALLS = 2  # of a kind, which are compared


class SameData:
    """Compares what the ranks of one replica call a model on, and what they compute its loss of.

    Args:
        model: a parallel model.
        applied: its plan.
    """

    def __init__(self, model: keras.Model, applied: Applied) -> None:
        self._model = model.name
        self._ranks = dist.get_process_group_ranks(applied.axis.mesh.get_group())
        self._calls: Counter[tuple[str, bool]] = Counter()

    def before_call(self, model: keras.Model, args: Any, kwargs: Any) -> None:
        """Compare the arguments of a call; a hook of the model."""
        self.compare(f"a call of model {self._model!r}", (args, kwargs))

    def of_losses(self, model: keras.Model, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``compute_loss``, its targets and weights compared before."""
        signature = inspect.signature(type(model).compute_loss)

        @functools.wraps(compute_loss)
        def compared(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(model, *args, **kwargs).arguments
            what = f"the loss of model {self._model!r}"
            self.compare(what, [given.get(name) for name in ("y", "sample_weight")])
            return compute_loss(*args, **kwargs)

        return compared

    def compare(self, what: str, data: Any) -> None:
        """Raise ParallelRuntimeError on all ranks of the replica if they have different data, in the first calls."""
        kind = what, torch.is_grad_enabled()
        if self._calls[kind] >= FIRST_CALLS or leaves_no_trace() or not _is_data(data):
            return
        self._calls[kind] += 1
        if difference := differing_data(what, data, self._ranks):
            ranks = ", ".join(map(str, self._ranks))
            raise ParallelRuntimeError(
                f"{what}: ranks {ranks} hold parts of one replica, and were given different data ({difference}); "
                f"give them the same. If each is to have a share of its own, name the mesh axis of the shares: "
                f"batch_axis= of tp_planner.parallelize, batch_dim_name= of keras.distribution.ModelParallel"
            )


def has_to_be_fed_alike(applied: Applied) -> bool:
    """Whether ranks hold parts of one replica, which compute together."""
    return applied.axis.size > 1 and any(isinstance(each.placement, Shard) for each in applied.plan.variables)


def _is_data(data: Any) -> bool:
    leaves = [leaf for leaf in keras.tree.flatten(data) if leaf is not None]
    return bool(leaves) and not any(
        isinstance(leaf, keras.KerasTensor | FakeTensor | DTensor) or getattr(leaf, "is_meta", False) for leaf in leaves
    )
