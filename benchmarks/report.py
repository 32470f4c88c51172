"""The benchmark's numbers as text: pure strings."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

SINGLE = "(a) single device, Keras"
PLANNED = "(b) tp_planner, Keras"
HANDWRITTEN = "(c) hand-written, torch"
STOCK = "(d) stock styles, torch"

FOOTNOTE = """\
One step is forward, backward and AdamW. Its time is the slower rank's; ratios are to the median of (c).
(a) runs on rank 0 with one thread while the other rank waits at a barrier."""


def heading(facts: Mapping[str, Any]) -> str:
    """Return what the numbers depend on, in one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("size", "rows"))


def table(facts: Mapping[str, Any]) -> str:
    """Return the statistics of every version at one size."""
    return "\n".join(_lines(facts))


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{name} {value}" for name, value in facts["size"].items())
    yield f"  {'':26}{'median ms':>10}{'quartiles ms':>20}{'ratio':>8}{'all-reduces':>13}"
    by_name = {row["version"]: row for row in facts["rows"]}
    reference = statistics.median(by_name[HANDWRITTEN]["times_ms"])
    for row in facts["rows"]:
        lower, median, upper = statistics.quantiles(row["times_ms"], n=4)
        quartiles = f"{lower:.1f} to {upper:.1f}"
        yield (
            f"  {row['version']:26}{median:10.1f}{quartiles:>20}{median / reference:8.2f}"
            f"{_collectives(row['collectives'])}"
        )


def _collectives(counts: Mapping[str, int]) -> str:
    others = sorted((kind, count) for kind, count in counts.items() if not kind.startswith("allreduce"))
    reduces = sum(counts.values()) - sum(count for _, count in others)
    return f"{reduces:13}" + "".join(f" + {count} {kind}" for kind, count in others)
