"""Meeting points: all ranks of a job do the same thing at the same time, or hear what is wrong.

A rank that waits says for whom and in which call. It waits on for one that lives, unless that one waits for it in
another call; one without a pulse is not waited for.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from tp_planner.ir.errors import ParallelRuntimeError
from tp_planner.job import pulse

logger = logging.getLogger("tp_planner")

PATIENCE_S = 20.0  # after which a rank that waits says so; and again each time it has waited twice as long
SOON_S = 1.0  # after which it is looked at where the others wait
LONGEST_NAP_S = 0.2  # between two looks
_HELLO = "tp_planner/hello"  # where in the store of a job a process says that it has come
NO_STORE = "{}: the store where ranks meet cannot be reached; the process that keeps it has ended"
STAY_S = 3.0  # of a process that ends, for others to read what it brought last

_begun: Counter[tuple[int, ...]] = Counter()  # meetings, by who takes part


def meet(what: str, ranks: Sequence[int] | None = None) -> None:
    """Return when every rank, or each of ``ranks``, has come to the same ``what``.

    Raises:
        ParallelRuntimeError: if another rank has ended, within half a minute; or if two wait for each other in
            different calls.
    """
    if dist.get_world_size() > 1 and dist.get_backend() != "fake":
        _meeting(what, ranks).bring("")


def exchange(what: str, text: str, ranks: Sequence[int] | None = None) -> list[str]:
    """Return the texts that all ranks, or ``ranks``, brought to the same ``what``, by rank.

    Raises ParallelRuntimeError as ``meet`` does.
    """
    return [text] if dist.get_world_size() == 1 else _meeting(what, ranks).bring(text)


def meet_before_start(store: Store, rank: int, size: int) -> Store:
    """Return a store for this start alone, once all ranks of a job have come to the one that is given.

    torchrun keeps that one when it starts all processes again, with what the processes before have left in it. So rank
    0 makes a name for this start, and tells it to each process that comes, by a name of that process's own.

    Raises ParallelRuntimeError as ``meet`` does.
    """
    what, own = "starting the process group", uuid.uuid4().hex
    told: set[bytes] = set()

    def tell() -> None:
        keys = [f"{_HELLO}/{other}" for other in range(1, size)]
        for name in [store.get(key) for key in keys if store.check([key])]:
            if name not in told:
                store.set(f"{_HELLO}/{name.decode()}", own)
                told.add(name)

    try:
        start = own if rank == 0 else _told_by_rank_zero(store, rank, own, what)
    except dist.DistError as error:
        raise ParallelRuntimeError(NO_STORE.format(what)) from error
    fresh = PrefixStore(start, store)
    Meeting(fresh, rank, tuple(range(size)), "tp_planner/start", what, tell if rank == 0 else _do_nothing).bring("")
    return fresh


def _told_by_rank_zero(store: Store, rank: int, own: str, what: str) -> str:
    store.set(f"{_HELLO}/{rank}", own)
    nap, key = 0.001, f"{_HELLO}/{own}"
    with saying_that_it_waits(what, rank):
        while not store.check([key]):
            time.sleep(nap)
            nap = min(2 * nap, LONGEST_NAP_S)
    return store.get(key).decode()


def _do_nothing() -> None:
    """Do nothing."""


@contextlib.contextmanager
def saying_that_it_waits(what: str, rank: int | str) -> Iterator[None]:
    """Inside, where torch waits for other ranks, say so after ``PATIENCE_S`` seconds."""
    timer = threading.Timer(PATIENCE_S, say_that_it_waits, [what, rank])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def say_that_it_waits(what: str, rank: int | str) -> None:
    """Say that a rank has waited ``PATIENCE_S`` seconds where it is not known for whom."""
    logger.warning(
        "[ModelParallel] %s: rank %s has waited %.0f s for the others, and waits on; start all ranks of the job",
        *(what, rank, PATIENCE_S),
    )


def _meeting(what: str, ranks: Sequence[int] | None) -> Meeting:
    store = dist.distributed_c10d._get_default_store()
    who = tuple(range(dist.get_world_size())) if ranks is None else tuple(ranks)
    number = _begun[who]
    _begun[who] += 1
    group = "all" if ranks is None else ",".join(map(str, who))
    return Meeting(store, dist.get_rank(), who, f"tp_planner/meeting/{group}/{number}/{what}", what)


_given_up: set[str] = set()  # meetings of others for which this rank has raised


@dataclass(frozen=True, slots=True)
class Meeting:
    """One meeting, as the process of ``rank`` takes part in it. ``key`` is its place in the store."""

    store: Store
    rank: int
    ranks: tuple[int, ...]
    key: str
    what: str
    do_meanwhile: Callable[[], None] = _do_nothing

    def bring(self, text: str) -> list[str]:
        """Return what all brought, by rank, once all have come."""
        keys = [self._place(rank) for rank in self.ranks]
        try:
            pulse.let_pulse_beat(self.store, self.rank)
            self.store.set(self._place(self.rank), text)
            self._wait(keys)
            brought = [self.store.get(key).decode() for key in keys]
        except dist.DistError as error:
            raise ParallelRuntimeError(NO_STORE.format(self.what)) from error
        with contextlib.suppress(dist.DistError):
            self.store.set(self._heard(self.rank), "")
        _stay_for(self)
        return brought

    def stay(self, seconds: float) -> None:
        """Return when all have read what was brought, or after some seconds."""
        keys, began = [self._heard(rank) for rank in self.ranks], time.monotonic()
        with contextlib.suppress(dist.DistError):
            while not self.store.check(keys) and time.monotonic() - began < seconds:
                time.sleep(0.01)

    def _place(self, rank: int) -> str:
        return f"{self.key}/{rank}"

    def _heard(self, rank: int) -> str:
        return f"{self.key}/heard/{rank}"

    def _wait(self, keys: list[str]) -> None:
        """Return when all keys are there; who looks often and sleeps between is not told of every look by torch."""
        began, nap, listener = time.monotonic(), 0.001, pulse.Listener(self.store)
        told, next_word = False, PATIENCE_S
        while not self.store.check(keys):
            self.do_meanwhile()
            waited = time.monotonic() - began
            absent = [rank for rank in self.ranks if not self.store.check([self._place(rank)])]
            if silent := listener.silent(absent):
                self._leave(told)
                raise ParallelRuntimeError(pulse.no_sign_of_life(self.what, silent[0]))
            if waited > SOON_S:
                told = told or self._tell_where()
                self._refuse_to_wait_for_each_other(absent)
            if waited > next_word and absent:
                self._say(waited, absent)
                next_word *= 2
            time.sleep(nap)
            nap = min(2 * nap, LONGEST_NAP_S)
        self._leave(told)

    def _leave(self, told: bool) -> None:
        """Let the others know that this rank waits here no more, if they were told that it does."""
        if told:
            self.store.set(_where(self.rank), "")

    def _say(self, waited: float, absent: list[int]) -> None:
        """Say for whom this rank waits, if it is the first of those that do."""
        if self.rank == min(rank for rank in self.ranks if rank not in absent):
            others = ", ".join(map(str, absent))
            logger.warning(
                "[ModelParallel] %s: rank %d has waited %.0f s for %s %s, and waits on; "
                "every rank has to make this call",
                *(self.what, self.rank, waited, "ranks" if len(absent) > 1 else "rank", others),
            )

    def _tell_where(self) -> bool:
        """Let the other ranks know where this one waits."""
        self.store.set(_where(self.rank), json.dumps([self.key, self.what, self.ranks]))
        return True

    def _refuse_to_wait_for_each_other(self, absent: list[int]) -> None:
        """Raise ParallelRuntimeError if an absent rank waits for this one in another call."""
        for rank in absent:
            text = self.store.get(_where(rank)).decode() if self.store.check([_where(rank)]) else ""
            if not text:
                continue
            key, what, ranks = json.loads(text)
            waits_for_this_one = self.rank in ranks and not self.store.check([f"{key}/{self.rank}"])
            if key not in _given_up and key != self.key and waits_for_this_one:
                _given_up.add(key)
                raise ParallelRuntimeError(
                    f"{self.what}: rank {rank} waits in {what} instead; "
                    f"every rank has to make the same calls in the same order"
                )


_last: Meeting | None = None


def _stay_for(meeting: Meeting) -> None:
    global _last
    _last = meeting


@atexit.register
def _stay() -> None:
    """Let the others read why rank 0 ends: the store often ends with its process."""
    if _last is not None and _last.rank == 0:
        _last.stay(STAY_S)


def _where(rank: int) -> str:
    return f"tp_planner/where/{rank}"
