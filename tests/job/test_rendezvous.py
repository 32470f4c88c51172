"""Meeting points: ranks wait for those that live, and hear soon of one that does not."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from unittest import mock

import pytest
import torch.distributed as dist

import tp_planner
from tests.workers import Pools
from tp_planner.job import pulse, rendezvous
from tp_planner.job.rendezvous import Meeting, exchange, meet

# On the ranks


def stop_pulse() -> None:
    if pulse._beating is not None:
        pulse._beating.stop()
    pulse._beating = None


def wait_for_a_rank(state: str) -> tuple[str, list[str]]:
    """Let rank 1 come late, not at all, or to another call; return what rank 0 hears, and what it says."""
    said: list[str] = []
    with (
        mock.patch.object(pulse, "SILENCE_S", 1.0),
        mock.patch.object(pulse, "BEAT_S", 0.1),
        mock.patch.object(rendezvous, "PATIENCE_S", 0.5),
        mock.patch.object(rendezvous, "SOON_S", 0.1),
        mock.patch.object(rendezvous.logger, "warning", lambda text, *args: said.append(text % args)),
    ):
        stop_pulse()
        meet("the beginning")  # a pulse that beats as quickly as it is listened to
        heard = ""
        if dist.get_rank() == 1:
            if state == "dead":
                stop_pulse()
            if state != "elsewhere":
                time.sleep(2.0)  # longer than a dead one would be waited for
        if dist.get_rank() == 0 or state != "dead":
            try:
                meet("another" if state == "elsewhere" and dist.get_rank() == 1 else "the end")
            except tp_planner.ParallelRuntimeError as error:
                heard = str(error)
        else:
            rendezvous._begun[0, 1] += 1  # the ranks go on together
        dist.barrier()
        meet("after it")
        stop_pulse()
    return heard, said


def meet_in_pairs() -> list[list[str]]:
    """Exchange among some ranks only, those of each pair at their own times; then among all."""
    rank = dist.get_rank()
    pair = (0, 1) if rank < 2 else (2, 3)
    texts = [exchange("pairs", f"{rank} {number}", pair) for number in range(1 + rank // 2)]
    return [*texts, exchange("all", str(rank))]


def exchange_ranks() -> list[str]:
    return exchange("ranks", f"rank {dist.get_rank()}")


# In the parent


@pytest.mark.parametrize(
    ("state", "messages"),
    [
        ("late", [""] * 2),
        (
            "dead",
            [
                "the end: rank 1 has given no sign of life for 1 s; its process has ended, "
                "or its machine is out of reach",
                "",
            ],
        ),
        (
            "elsewhere",
            [
                "the end: rank 1 waits in another instead; every rank has to make the same calls in the same order",
                "another: rank 0 waits in the end instead; every rank has to make the same calls in the same order",
            ],
        ),
    ],
    ids=["late", "dead", "elsewhere"],
)
def test_waiting(pools: Pools, state: str, messages: list[str]) -> None:
    """A rank that lives is waited for, unless it waits itself in another call; one that has no pulse is not."""
    answers = pools(2).run(wait_for_a_rank, state)
    assert [heard for heard, _ in answers] == messages
    says = "[ModelParallel] the end: rank 0 has waited 1 s for rank 1, and waits on; every rank has to make this call"
    assert state != "late" or [said[:1] for _, said in answers] == [[says], []]


def test_some_ranks_meet(pools: Pools) -> None:
    answers = pools(4).run(meet_in_pairs)
    assert answers[0] == answers[1] == [["0 0", "1 0"], ["0", "1", "2", "3"]]
    assert answers[2] == answers[3] == [["2 0", "3 0"], ["2 1", "3 1"], ["0", "1", "2", "3"]]


def test_exchange(pools: Pools) -> None:
    assert pools(2).run(exchange_ranks) == [["rank 0", "rank 1"]] * 2


def test_a_store_that_has_ended() -> None:
    """A rank hears at once where the process that keeps the store is gone."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))
    del server
    with (
        mock.patch("torch.distributed.get_world_size", return_value=2),
        mock.patch("torch.distributed.get_rank", return_value=0),
        mock.patch("torch.distributed.get_backend", return_value="gloo"),
        mock.patch("torch.distributed.distributed_c10d._get_default_store", return_value=client),
        mock.patch.object(pulse, "let_pulse_beat"),
        pytest.raises(tp_planner.ParallelRuntimeError) as error,
    ):
        meet("saving")
    assert str(error.value) == (
        "saving: the store where ranks meet cannot be reached; the process that keeps it has ended"
    )


def test_the_store_stays_until_all_have_read() -> None:
    """What rank 0 says last is heard, though its process ends at once and the store with it."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meetings = [
        Meeting(dist.TCPStore("127.0.0.1", server.port, is_master=False), rank, (0, 1), "here", "planning")
        for rank in range(2)
    ]
    with (
        mock.patch.object(pulse, "let_pulse_beat"),
        mock.patch.object(rendezvous, "_last", None),
        ThreadPoolExecutor() as others,
    ):
        meetings[1].store.set("here/1", "fine")  # rank 1 has come, and looks again a while later
        assert meetings[0].bring("problem") == ["problem", "fine"]
        staying = others.submit(meetings[0].stay, 60.0)
        assert not staying.done()
        heard = others.submit(meetings[1].bring, "fine")
        staying.result()
        assert (heard.result(), rendezvous._last) == (["problem", "fine"], meetings[1])


def test_a_job_that_starts_says_who_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    """Before there is a process group a rank that waits says for whom, and goes on once they are there."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [dist.TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(2)]
    with (
        mock.patch.object(pulse, "let_pulse_beat"),
        mock.patch.object(rendezvous, "PATIENCE_S", 0.1),
        mock.patch.object(rendezvous, "_last", None),
        ThreadPoolExecutor() as threads,
    ):
        first = threads.submit(rendezvous.meet_before_start, stores[0], 0, 2)
        while not caplog.messages:
            time.sleep(0.01)
        rendezvous.meet_before_start(stores[1], 1, 2)
        first.result(timeout=10)
    assert caplog.messages[0] == (
        "[ModelParallel] starting the process group: rank 0 has waited 0 s for rank 1, and waits on; "
        "every rank has to make this call"
    )


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_job_that_starts_again_has_a_store_of_its_own(order: tuple[int, ...]) -> None:
    """Whoever comes first, nobody reads what the processes before have left in the store that torchrun keeps."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with (
        mock.patch.object(pulse, "let_pulse_beat"),
        mock.patch.object(rendezvous, "_last", None),
        ThreadPoolExecutor() as threads,
    ):
        for attempt in ("first", "second"):
            ranks = {}
            for rank in order:
                store = dist.TCPStore("127.0.0.1", server.port, is_master=False)
                ranks[rank] = threads.submit(rendezvous.meet_before_start, store, rank, 3)
                time.sleep(0.05)
            stores = [ranks[rank].result(timeout=10) for rank in range(3)]
            assert not any(store.check(["said"]) for store in stores)
            stores[1].set("said", attempt)
            assert [store.get("said").decode() for store in stores] == [attempt] * 3


def test_waiting_where_torch_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with mock.patch.object(rendezvous, "PATIENCE_S", 0.01), rendezvous.saying_that_it_waits("starting", 1):
        while not caplog.messages:
            time.sleep(0.01)
    with rendezvous.saying_that_it_waits("starting", 1):
        pass
    assert caplog.messages == [
        "[ModelParallel] starting: rank 1 has waited 0 s for the others, and waits on; start all ranks of the job"
    ]
