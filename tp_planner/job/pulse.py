"""Pulse: each process says in the job's store again and again that it lives, so that no other waits for a dead one.

A process that is stopped, or cannot be reached, has no pulse either. One that is busy has: a thread of its own beats.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import time
from collections.abc import Iterable

import torch.distributed as dist
from torch._C._distributed_c10d import Store

BEAT_S = 2.0
SILENCE_S = 20.0  # after which a process counts as dead
SETTLE_S = 0.05  # of a process that ends, for threads that wait for the interpreter


def let_pulse_beat(store: Store, rank: int) -> None:
    """Let this process's pulse beat in the store, from the first call with it on."""
    global _beating
    if _beating is None or _beating.store is not store:
        if _beating is not None:
            _beating.stop()
        _beating = _Pulse(store, rank)


class _Pulse:
    """A thread with a connection of its own, for one that waits for an answer keeps the other threads from using it."""

    def __init__(self, store: Store, rank: int) -> None:
        self.store, self._ended = store, threading.Event()
        store.set(_key(rank), "begins")
        self._thread = threading.Thread(
            target=self._beat, args=(_connected_again(store), _key(rank)), name="tp_planner pulse", daemon=True
        )
        self._thread.start()

    def _beat(self, store: Store, key: str) -> None:
        for number in itertools.count():
            try:
                store.set(key, str(number))
            except dist.DistError:  # the store has ended, and the job with it
                return
            if self._ended.wait(BEAT_S):
                return

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(BEAT_S)


def _connected_again(store: Store) -> Store:
    clone: Store = store.clone()  # type: ignore[attr-defined]  # which torch's stubs leave out
    return clone


_beating: _Pulse | None = None


@atexit.register
def _stop() -> None:
    """End the thread before the interpreter does, which must not happen while it is in torch; let torch's finish.

    A thread of gloo lets go of a collective's tensors after whoever waited for it went on, and needs the interpreter
    for that. One that asks for it while the interpreter ends takes the process with it ("terminate called without an
    active exception", SIGABRT), and a launcher starts a job again that was done.
    """
    if _beating is not None:
        _beating.stop()
        time.sleep(SETTLE_S)  # in which others have the interpreter


class Listener:
    """Listens to the pulses of others from the moment on at which it is made."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._heard: dict[int, tuple[bytes, float]] = {}  # the last beat of a rank, and when it was new

    def silent(self, ranks: Iterable[int]) -> list[int]:
        """Return which of the ranks have had a pulse and have none any more."""
        now = time.monotonic()
        for rank in ranks:
            if self._store.check([_key(rank)]):
                beat = self._store.get(_key(rank))
                if rank not in self._heard or self._heard[rank][0] != beat:
                    self._heard[rank] = beat, now
        return [rank for rank in ranks if rank in self._heard and now - self._heard[rank][1] > SILENCE_S]


def no_sign_of_life(what: str, rank: int) -> str:
    """Return in words that a rank has ended for which others wait in a call."""
    return (
        f"{what}: rank {rank} has given no sign of life for {SILENCE_S:.0f} s; "
        f"its process has ended, or its machine is out of reach"
    )


def _key(rank: int) -> str:
    return f"tp_planner/pulse/{rank}"
