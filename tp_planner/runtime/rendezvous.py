"""Meeting points: all ranks of a job do the same thing at the same time, or hear what is wrong."""

from __future__ import annotations

import itertools
import time
from datetime import timedelta

import torch.distributed as dist

from tp_planner.ir.errors import ParallelRuntimeError

PATIENCE_S = 60.0  # how long a rank waits for the others before it says that they do not come

_meetings = itertools.count()


def meet(what: str) -> None:
    """Return when every rank has come to the same ``what``.

    Raises:
        ParallelRuntimeError: if the others do not come within ``PATIENCE_S`` seconds.
    """
    world = dist.get_world_size()
    if world == 1 or dist.get_backend() == "fake":
        return
    store = dist.distributed_c10d._get_default_store()
    key = f"tp_planner/meeting/{next(_meetings)}/{what}"
    arrived = store.add(key, 1)
    if arrived == world:
        store.set(f"{key}/all", "1")
    deadline = time.monotonic() + PATIENCE_S
    try:
        store.wait([f"{key}/all"], timedelta(seconds=PATIENCE_S))
    except dist.DistStoreError as error:
        waited = PATIENCE_S - max(0.0, deadline - time.monotonic())
        raise ParallelRuntimeError(
            f"{what}: only {store.add(key, 0)} of {world} ranks came within {waited:.0f} s; "
            f"every rank has to make this call, not rank 0 alone"
        ) from error


def exchange(what: str, text: str) -> list[str]:
    """Return the texts that all ranks brought to the same ``what``, by rank.

    Raises ParallelRuntimeError as ``meet`` does.
    """
    if dist.get_world_size() == 1:
        return [text]
    store = dist.distributed_c10d._get_default_store()
    key = f"tp_planner/exchange/{next(_meetings)}/{what}"
    store.set(f"{key}/{dist.get_rank()}", text)
    keys = [f"{key}/{rank}" for rank in range(dist.get_world_size())]
    try:
        store.wait(keys, timedelta(seconds=PATIENCE_S))
    except dist.DistStoreError as error:
        raise ParallelRuntimeError(
            f"{what}: not all of {len(keys)} ranks came within {PATIENCE_S:.0f} s; every rank has to make this call"
        ) from error
    return [store.get(each).decode() for each in keys]
