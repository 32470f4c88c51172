"""Meeting points: all ranks of a job do the same thing at the same time, or hear what is wrong."""

from __future__ import annotations

import itertools
import time

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from tp_planner.ir.errors import ParallelRuntimeError
from tp_planner.job import pulse

PATIENCE_S = 60.0  # how long a rank waits for others that live before it says that they do not come
LONGEST_NAP_S = 0.2  # between two looks

_meetings = itertools.count()


def meet(what: str) -> None:
    """Return when every rank has come to the same ``what``.

    Raises:
        ParallelRuntimeError: if another rank has ended, within half a minute; or if one that lives does not come within
            ``PATIENCE_S`` seconds.
    """
    if dist.get_world_size() > 1 and dist.get_backend() != "fake":
        _bring(what, "")


def exchange(what: str, text: str) -> list[str]:
    """Return the texts that all ranks brought to the same ``what``, by rank.

    Raises ParallelRuntimeError as ``meet`` does.
    """
    return [text] if dist.get_world_size() == 1 else _bring(what, text)


def _bring(what: str, text: str) -> list[str]:
    store = dist.distributed_c10d._get_default_store()
    pulse.let_pulse_beat(store, dist.get_rank())
    key = f"tp_planner/meeting/{next(_meetings)}/{what}"
    keys = [f"{key}/{rank}" for rank in range(dist.get_world_size())]
    try:
        store.set(keys[dist.get_rank()], text)
        _wait(what, keys, store)
        return [store.get(each).decode() for each in keys]
    except dist.DistError as error:
        raise ParallelRuntimeError(
            f"{what}: the store where ranks meet cannot be reached; the process that keeps it has ended"
        ) from error


def _wait(what: str, keys: list[str], store: Store) -> None:
    """Return when all keys are there; who looks often and sleeps between is not told of every look by torch."""
    began, nap, listener = time.monotonic(), 0.001, pulse.Listener(store)
    while not store.check(keys):
        absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if silent := listener.silent(absent):
            raise ParallelRuntimeError(
                f"{what}: rank {silent[0]} has given no sign of life for {pulse.SILENCE_S:.0f} s; "
                f"its process has ended, or its machine is out of reach"
            )
        if absent and time.monotonic() > began + PATIENCE_S:
            raise ParallelRuntimeError(
                f"{what}: only {len(keys) - len(absent)} of {len(keys)} ranks came within {PATIENCE_S:.0f} s; "
                f"every rank has to make this call, not rank {dist.get_rank()} alone"
            )
        time.sleep(nap)
        nap = min(2 * nap, LONGEST_NAP_S)
