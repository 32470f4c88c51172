"""The benchmark's numbers as text: pure strings."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SINGLE = "(a) single device, Keras"
PLANNED = "(b) tp_planner, Keras"
REPLAYED = "(b) with jit_compile=True"
AUTOMATIC = '(b) with jit_compile="auto"'
FITTED = "(b) the same, the step of fit"
ON_STREAM = "(b) sequence parallel"
ON_STREAM_REPLAYED = "(b) sequence parallel, jit"
HANDWRITTEN = "(c) hand-written, torch"
STOCK = "(d) stock styles, torch"
DTENSORS = "(e) all DTensors, torch"
SINGLE_TORCH = "(f) single device, torch"
KERAS_SHARD = "shard only, plain Keras"
TORCH_SHARD = "shard only, plain torch"

WORKS: dict[str, str] = {
    "step": "one training step: forward, backward, AdamW",
    "forward": "the forward pass alone, without gradients",
    "token": "one more token of one sequence: a forward pass over all its tokens, for the model has no cache",
}
# The most that a version's median of paired ratios should be, by work and size.
STREAM_TARGET = 1.1  # the most that a step with the stream in shards should take of one with it whole
TARGETS: dict[tuple[str, str], float] = {("step", "tiny"): 1.5, ("step", "medium"): 1.1, ("step", "large"): 1.1}

VERSION_HEAD = ("version", "median ms", "quartiles", "ratio to (c)", "quartiles", "CPU ratio", "collectives")

FOOTNOTE = """\
Times are of the slower rank. A ratio is to (c) in the same round: the median of all rounds, and their quartiles.
CPU is processor time of the busier rank, with that of gloo's threads; its ratio is the median over the rounds too.
(a) and (f) run on rank 0 with one thread while the other rank waits at a barrier."""


def heading(facts: Mapping[str, Any]) -> str:
    """Return what the numbers depend on, in one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("size", "rows"))


def table(facts: Mapping[str, Any]) -> str:
    """Return the statistics of every version at one size, one table for each work."""
    size = ", ".join(f"{name} {value}" for name, value in facts["size"].items())
    return "\n".join(
        [f"{size}, repetitions {facts['repetitions']}", *(line for w in WORKS for line in _lines(facts, w))]
    )


def _lines(facts: Mapping[str, Any], work: str) -> Iterator[str]:
    rows = {row["version"]: row for row in facts["rows"] if row["work"] == work}
    yield f"\n  {WORKS[work]}"
    yield (
        f"  {'':30}{'median ms':>10}{'quartiles ms':>18}{'ratio':>8}{'quartiles':>16}{'CPU ms':>9}{'ratio':>7}"
        f"{'all-reduces':>13}"
    )
    reference = rows[HANDWRITTEN]
    for name, row in rows.items():
        low, median, high = _quartiles(row["times_ms"])
        least, ratio, most = _quartiles(_ratios(row, reference, "times_ms"))
        yield (
            f"  {name:30}{median:10.1f}{f'{low:.1f} to {high:.1f}':>18}{ratio:8.2f}{f'{least:.2f} to {most:.2f}':>16}"
            f"{statistics.median(row['cpu_ms']):9.1f}{statistics.median(_ratios(row, reference, 'cpu_ms')):7.2f}"
            f"{_collectives(row['collectives'])}"
        )
    if work == "step":
        for on_stream, whole in {ON_STREAM: PLANNED, ON_STREAM_REPLAYED: REPLAYED}.items():
            ratio = statistics.median(_ratios(rows[on_stream], rows[whole], "times_ms"))
            said = "within the target" if ratio <= STREAM_TARGET else "MISSED"
            yield f"  {on_stream}, to the stream whole: {ratio:.2f} of {STREAM_TARGET:g}: {said}"
    target = TARGETS.get((work, facts["size"]["name"]))
    if target is not None:
        for name in (PLANNED, REPLAYED, AUTOMATIC, FITTED):
            ratio = statistics.median(_ratios(rows[name], reference, "times_ms"))
            yield f"  {name}: {ratio:.2f} of {target:g}: {'within the target' if ratio <= target else 'MISSED'}"


def _ratios(row: Mapping[str, Any], reference: Mapping[str, Any], figure: str) -> list[float]:
    return [one / other for one, other in zip(row[figure], reference[figure], strict=True)]


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def _collectives(counts: Mapping[str, int]) -> str:
    others = sorted((kind, count) for kind, count in counts.items() if not kind.startswith("allreduce"))
    reduces = sum(counts.values()) - sum(count for _, count in others)
    return f"{reduces:13}" + "".join(f" + {count} {kind}" for kind, count in others)


def version_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the cells under ``VERSION_HEAD`` for each version of one work."""
    reference = next(row for row in rows if row["version"] == HANDWRITTEN)
    for row in rows:
        low, median, high = _quartiles(row["times_ms"])
        least, ratio, most = _quartiles(_ratios(row, reference, "times_ms"))
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(row["collectives"].items()))
        yield (
            row["version"],
            f"{median:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{ratio:.2f}",
            f"{least:.2f} to {most:.2f}",
            f"{statistics.median(_ratios(row, reference, 'cpu_ms')):.2f}",
            counts or "-",
        )
