"""Acts that succeed on all ranks or on none: what is wrong on one, all of them hear."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tp_planner.ir.errors import PlanError
from tp_planner.job.rendezvous import exchange

Answer = TypeVar("Answer")
Telling = Callable[[str, str], list[str]]  # as ``rendezvous.exchange``


def together(what: str, act: Callable[[], Answer], tell: Telling = exchange) -> Answer:
    """Return what ``act`` returns; if it cannot on one rank, all raise PlanError. It may not communicate.

    Args:
        what: what ranks do, for errors of ranks that do not come.
        act: raises PlanError or OSError where something is wrong.
        tell: how ranks tell each other.
    """
    try:
        answer = act()
    except (OSError, PlanError) as error:
        tell(what, f"problem {error}")
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"{what}: {error}") from error
    for rank, problem in enumerate(tell(what, "")):
        if problem:
            raise PlanError(f"rank {rank}: {problem.removeprefix('problem ')}")
    return answer
