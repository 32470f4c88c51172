"""Times of works that take turns, between two CUDA events or by the clock."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

WARM_UP = 3

Work = Callable[[], Any]
Works = Mapping[str, Work]


def timed(works: Works, repeat: int, device: str) -> dict[str, list[float]]:
    """Return the times of each work in ms; they take turns, each round beginning with another one.

    What fails while it is warmed up, as compilers may, is left out and said.
    """
    names = [name for name, work in works.items() if _warmed_up(name, work)]
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(repeat):
        for offset in range(len(names)):
            name = names[(round_number + offset) % len(names)]
            times[name].append(_time(works[name], device))
    return times


def _warmed_up(name: str, work: Work) -> bool:
    try:
        for _ in range(WARM_UP):
            work()
    except Exception:
        print(f"{name!r} failed and is left out:\n{traceback.format_exc(limit=-3)}", file=sys.stderr, flush=True)
        return False
    return True


def _time(work: Work, device: str) -> float:
    """Return the time of one call in ms: of CUDA between two events, else by the clock."""
    if device != "cuda":
        start = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed
