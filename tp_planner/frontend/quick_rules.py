"""Quick rules: patterns are tried on a model's paths before any pass does, for some would be matched for ever."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from tp_planner.ir.errors import PlanError
from tp_planner.ir.graph import LayerInfo, VariableInfo
from tp_planner.ir.layout import LayoutRule

SECONDS = 10.0  # for one rule and all paths of a model, which take most rules some microseconds each


def require_quick_rules(
    rules: Iterable[LayoutRule], layers: Mapping[str, LayerInfo], variables: Mapping[str, VariableInfo]
) -> None:
    """Raise PlanError for a rule that takes Python longer than ``SECONDS`` to match against what it could name.

    Keras asks for Python's expressions, which backtrack: ``(a+)+/x`` tries all ways to cut a path, more than there is
    time for. Matching is interrupted by SIGALRM, so only in the main thread, and not where somebody else waits for one.
    """
    paths = [*(variable.path for variable in variables.values()), *(f"{each.path}/output" for each in layers.values())]
    for rule in rules:
        try:
            with _at_most(SECONDS):
                matches = [rule.matches(path) for path in paths]  # each of which may be the one that takes for ever
                if not any(matches):
                    search = re.compile(rule.pattern).search  # which is done to say what is near
                    for path in paths:
                        search(path)
        except re.error:
            continue  # which is said with all else that is wrong with the rules
        except TimeoutError:
            raise PlanError(
                f"layout rule {rule.pattern!r} has not been matched against the model's {len(paths)} paths within "
                f"{SECONDS:g} s; repeat nothing that repeats itself: write a+ for (a+)+, and .* once"
            ) from None


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where the block takes longer and can be interrupted."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
