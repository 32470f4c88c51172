"""The two errors a user of tp_planner meets, raised before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Iterable


class TpPlannerError(Exception):
    """Base of every error tp_planner raises on purpose."""


class PlanError(TpPlannerError, ValueError):
    """A layout, mesh, model or plan cannot be planned or applied; lists every problem found.

    ``problems`` holds one sentence per problem: what is wrong, where, and what to do next.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            lines = "".join(f"\n  - {problem}" for problem in self.problems)
            super().__init__(f"{len(self.problems)} problems:{lines}")


class ParallelRuntimeError(TpPlannerError, RuntimeError):
    """The ranks of a job disagree, or a parallelized model is used in a way that cannot be right."""


class ContractError(ParallelRuntimeError):
    """A training step communicated other than its plan says."""


def in_one_line(error: BaseException) -> str:
    """Return an error of somebody else's code as "Type: message", without Keras's wrapping, colours and arguments."""
    text = re.sub(r"\x1b\[\d*m", "", str(error)).partition("\n\nArguments received")[0]
    text = re.sub(r" at 0x[0-9a-f]+", "", text)  # ranks compare plans, in which this may stand
    text = re.sub(r"^Exception encountered when calling .*\(\)\.", "", text)
    return f"{type(error).__name__}: {' '.join(text.split())}"
