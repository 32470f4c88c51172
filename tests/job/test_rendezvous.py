"""Meeting points: ranks wait for those that live, and hear soon of one that does not."""

from __future__ import annotations

import time
from datetime import timedelta
from unittest import mock

import pytest
import torch.distributed as dist

import tp_planner
from tests.workers import Pools
from tp_planner.job import pulse, rendezvous
from tp_planner.job.rendezvous import exchange, meet

# On the ranks


def stop_pulse() -> None:
    if pulse._beating is not None:
        pulse._beating.stop()
    pulse._beating = None


def wait_for_a_rank(state: str) -> tuple[str, float]:
    """Let rank 1 come late, or not at all; return what rank 0 hears, and after how many seconds."""
    with (
        mock.patch.object(pulse, "SILENCE_S", 1.0),
        mock.patch.object(pulse, "BEAT_S", 0.1),
        mock.patch.object(rendezvous, "PATIENCE_S", 3.0),
    ):
        stop_pulse()
        meet("the beginning")  # a pulse that beats as quickly as it is listened to
        began, heard = time.monotonic(), ""
        if dist.get_rank() == 1:
            if state == "dead":
                stop_pulse()
            time.sleep(2.0)  # longer than a dead one would be waited for
        if dist.get_rank() == 0 or state == "late":
            try:
                meet("the end")
            except tp_planner.ParallelRuntimeError as error:
                heard = str(error)
        else:
            next(rendezvous._meetings)  # the ranks go on together
        waited = time.monotonic() - began
        dist.barrier()
        stop_pulse()
    return heard, waited


def exchange_ranks() -> list[str]:
    return exchange("ranks", f"rank {dist.get_rank()}")


# In the parent


@pytest.mark.parametrize(
    ("state", "least", "message"),
    [
        ("late", 2.0, ""),
        (
            "dead",
            1.0,
            "the end: rank 1 has given no sign of life for 1 s; its process has ended, or its machine is out of reach",
        ),
        (
            "elsewhere",
            3.0,
            "the end: only 1 of 2 ranks came within 3 s; every rank has to make this call, not rank 0 alone",
        ),
    ],
    ids=["late", "dead", "elsewhere"],
)
def test_waiting(pools: Pools, state: str, least: float, message: str) -> None:
    """A rank that lives is waited for with patience, one that has no pulse is not."""
    heard, waited = pools(2).run(wait_for_a_rank, state)[0]
    assert heard == message
    assert waited >= least


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
