"""Patterns that would be matched for ever are refused, and what a process does with its alarms stays as it was."""

from __future__ import annotations

import re
import signal
import threading

import pytest

from tests.models import CASES
from tp_planner.frontend import quick_rules
from tp_planner.frontend.quick_rules import require_quick_rules
from tp_planner.frontend.survey import survey
from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import LayoutRule


@pytest.mark.parametrize("pattern", [r"(\w+)+/x", r"(.|\w)*x", ".*.*.*.*.*.*.*.*.*.*.*.*x"])
def test_pattern_that_takes_for_ever_is_refused(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_rules, "SECONDS", 0.2)
    layers, variables = survey(CASES["gpt"].build(blocks=1))
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(PlanError) as refused:
        require_quick_rules([LayoutRule(".*kernel", ()), LayoutRule(pattern, ())], layers, variables)
    paths = len(layers) + len(variables)
    assert str(refused.value) == (
        f"layout rule {pattern!r} has not been matched against the model's {paths} paths within 0.2 s; "
        "repeat nothing that repeats itself: write a+ for (a+)+, and .* once"
    )
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)) == (before, (0.0, 0.0))


def test_only_patterns_that_match_nothing_are_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search is for what is near; for a pattern that begins with .* it takes longer than all else."""
    searched: list[str] = []
    real = re.compile

    def compiled(pattern: str) -> re.Pattern[str]:
        searched.append(pattern)
        return real(pattern)

    monkeypatch.setattr(re, "compile", compiled)
    layers, variables = survey(CASES["gpt"].build(blocks=1))
    rules = [LayoutRule(".*a rule/kernel", ()), LayoutRule(".*kernel", ())]
    require_quick_rules(rules, layers, variables)
    assert searched == [".*a rule/kernel"]


def test_alarms_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an alarm is set, and in other threads, rules are matched for as long as they take."""
    monkeypatch.setattr(quick_rules, "SECONDS", 1e-6)
    layers, variables = survey(CASES["gpt"].build(blocks=1))
    rules = [LayoutRule(".*kernel", ())] * 100
    signal.setitimer(signal.ITIMER_REAL, 600)
    try:
        require_quick_rules(rules, layers, variables)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 500
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    thread = threading.Thread(target=require_quick_rules, args=(rules, layers, variables))
    thread.start()
    thread.join()
