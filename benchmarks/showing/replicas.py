"""The numbers of replicas as text: pure strings."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

PLANNED = "tp_planner, Keras"
REPLAYED = "tp_planner, Keras, jit_compile=True"
AUTOMATIC = 'tp_planner, Keras, jit_compile="auto"'
FULLY_SHARDED = "fully_shard (FSDP2), torch"

FOOTNOTE = """\
Times are of the slowest rank; CPU is processor time of the busiest one, with that of gloo's threads. A ratio is to
torch alone in the same round: the median of all rounds."""


def table(measured: Mapping[str, Any]) -> str:
    """Return the statistics of every version on one mesh."""
    mesh, rows = measured["mesh"], measured["rows"]
    reference = next(row for row in rows if row["version"] == FULLY_SHARDED)
    lines = [f"{mesh['batch']} replicas of {mesh['model']} ranks, {measured['size']['name']}, step"]
    lines.append(f"  {'':38}{'median ms':>10}{'ratio':>8}{'CPU ms':>9}{'ratio':>7}  collectives")
    for row in rows:
        ratio, cpu = (_ratio(row, reference, figure) for figure in ("times_ms", "cpu_ms"))
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(row["collectives"].items()))
        lines.append(
            f"  {row['version']:38}{statistics.median(row['times_ms']):10.1f}{ratio:8.2f}"
            f"{statistics.median(row['cpu_ms']):9.1f}{cpu:7.2f}  {counts}"
        )
    return "\n".join(lines)


def _ratio(row: Mapping[str, Any], reference: Mapping[str, Any], figure: str) -> float:
    return statistics.median(one / other for one, other in zip(row[figure], reference[figure], strict=True))
