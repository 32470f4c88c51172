"""Reports: what would have failed on a machine with GPUs, where the host would have waited, and where in whose code."""

from __future__ import annotations

import traceback
from collections import Counter

OF_INTEREST = ("/tp_planner/", "/keras/", "/keras_hub/", "/tests/")
FRAMES = 6

reports: Counter[tuple[str, str]] = Counter()  # (what, where), and how often


waiting: Counter[tuple[str, str]] = Counter()  # for what the host waits, and where


def report(what: str) -> None:
    reports[what, _where()] += 1


def waits(what: str) -> None:
    waiting[what, _where()] += 1


def _where() -> str:
    """Return the innermost places in code of interest, this room's left out."""
    frames = [
        f"{frame.filename.rpartition('site-packages/')[2].rpartition('/tp_planner/')[2]}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_stack()
        if any(part in frame.filename for part in OF_INTEREST) and "/pretended/" not in frame.filename
    ]
    return " < ".join(frames[::-1][:FRAMES])
