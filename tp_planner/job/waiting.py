"""Collectives on the host that are waited for as meetings are: whoever waits says so, and not for one that is dead."""

from __future__ import annotations

import contextlib
import pickle
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tp_planner.ir.errors import ParallelRuntimeError, in_one_line
from tp_planner.job import pulse
from tp_planner.job.rendezvous import NO_STORE, PATIENCE_S, SOON_S, say_that_it_waits


def finish(what: str, work: Any) -> None:
    """Return once a collective of all ranks, which was begun, is done.

    Args:
        what: the call, for errors.
        work: what torch returned for tensors on the host and ``async_op=True``.

    Raises:
        ParallelRuntimeError: if another rank has ended, within half a minute.
    """
    listener = pulse.Listener(dist.distributed_c10d._get_default_store())
    others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    began, has_said = time.monotonic(), False
    while not _is_done(work):
        _raise_for_silent(what, listener, others)
        if not has_said and time.monotonic() - began > PATIENCE_S - SOON_S:
            say_that_it_waits(what, dist.get_rank())
            has_said = True
    try:
        work.wait()
    except RuntimeError as problem:
        _say_who_has_ended(what, problem, listener, others)


def _is_done(work: Any) -> bool:
    """Wait for some time; return whether a collective is done, or has failed."""
    with contextlib.suppress(RuntimeError):  # torch's, that it is not done
        work.wait(timedelta(seconds=SOON_S))
    done: bool = work.is_completed()
    return done


def _say_who_has_ended(what: str, problem: RuntimeError, listener: pulse.Listener, others: list[int]) -> None:
    """Raise ParallelRuntimeError; torch knows that a connection was lost before it is known whose pulse has ended."""
    began = time.monotonic()
    while time.monotonic() - began < pulse.SILENCE_S + 2 * pulse.BEAT_S:
        _raise_for_silent(what, listener, others)
        time.sleep(pulse.BEAT_S / 4)
    raise ParallelRuntimeError(f"{what}: ranks have lost each other ({in_one_line(problem)})") from problem


def _raise_for_silent(what: str, listener: pulse.Listener, others: list[int]) -> None:
    try:
        silent = listener.silent(others)
    except dist.DistError as error:
        raise ParallelRuntimeError(NO_STORE.format(what)) from error
    if silent:
        raise ParallelRuntimeError(pulse.no_sign_of_life(what, silent[0]))


def gather_values(what: str, value: Any, group: Any) -> list[Any]:
    """Return what each rank gives, by rank; ``group`` is of all ranks, for tensors on the host.

    Raises ParallelRuntimeError as ``finish`` does.
    """
    own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    finish(what, dist.all_gather(sizes, torch.tensor([own.numel()]), group=group, async_op=True))
    longest = max(int(size) for size in sizes)
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    padded = torch.nn.functional.pad(own, (0, longest - own.numel()))
    finish(what, dist.all_gather(texts, padded, group=group, async_op=True))
    return [pickle.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)]
