"""Pictures of the results, as SVG: the same picture from the same numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from memory import KINDS, MIB
from showing.report import HANDWRITTEN, WORKS

Row = Mapping[str, Any]


def draw_step_time(results: Sequence[Row], path: Path) -> None:
    """Draw each version's median ratio to the hand-written one, with the quartiles as bars, one panel for each work."""
    figure, panels = pyplot.subplots(1, len(WORKS), figsize=(14, 4.5), sharey=True, layout="constrained")
    versions = [row["version"] for row in results[0]["rows"] if row["work"] == next(iter(WORKS))]
    width = 0.9 / len(versions)
    for axes, work in zip(panels, WORKS, strict=True):
        for number, version in enumerate(versions):
            quartiles = [_ratio_quartiles(sizes["rows"], work, version) for sizes in results]
            places = [place + (number - len(versions) / 2) * width for place in range(len(results))]
            spread = [[q[1] - q[0] for q in quartiles], [q[2] - q[1] for q in quartiles]]
            axes.bar(places, [q[1] for q in quartiles], width, yerr=spread, label=version, error_kw={"lw": 0.8})
        axes.axhline(1.0, color="black", lw=0.8)
        axes.set(title=work, xticks=range(len(results)), xticklabels=[sizes["size"]["name"] for sizes in results])
    panels[0].set(ylabel=f"time over that of {HANDWRITTEN}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    _save(figure, path)


def _ratio_quartiles(rows: Sequence[Row], work: str, version: str) -> list[float]:
    times = {row["version"]: row["times_ms"] for row in rows if row["work"] == work}
    pairs = zip(times[version], times[HANDWRITTEN], strict=True)
    return statistics.quantiles([one / other for one, other in pairs], n=4, method="inclusive")


def draw_communication(rows: Sequence[Row], path: Path) -> None:
    """Draw what each family sends inside and outside of its blocks, over the formula's, on the most ranks."""
    most = max(row["ranks"] for row in rows)
    shown = [row for row in rows if row["ranks"] == most]
    titles = [row["title"] for row in shown]
    inside, outside = (
        [row[part]["sent_bytes"] / row["formula"]["sent_bytes"] for row in shown] for part in ("inside", "outside")
    )
    figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
    axes.bar(titles, inside, label="in the blocks")
    axes.bar(titles, outside, bottom=inside, label="embedding, head, encoder's output (tiny models)")
    axes.axhline(1.0, color="black", lw=0.8, label="Megatron-LM's formula for the blocks")
    axes.set(ylabel="sent bytes over the formula's", title=f"One training step on {most} ranks")
    pyplot.setp(axes.get_xticklabels(), rotation=30, ha="right")
    axes.legend(loc="lower right")
    _save(figure, path)


def draw_memory(rows: Sequence[Row], path: Path) -> None:
    """Draw the memory at the peak by kinds: predicted, measured in the same step, and in training by Keras.

    Of the last, activations and gradients are not told from temporaries.
    """
    figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
    bars = [(row, what) for row in rows for what in ("predicted", "measured", "by_keras")]
    places = [position + 0.7 * (position // 3) for position in range(len(bars))]
    floor = [0.0] * len(bars)
    for kind in KINDS:
        heights = [row["ranks"][0][what]["peak"][kind] / MIB for row, what in bars]
        axes.bar(places, heights, bottom=floor, label=kind)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    for place, (_, what) in zip(places, bars, strict=True):
        axes.text(place, 0, f" {what.replace('_', ' ')}", rotation=90, ha="center", va="bottom", fontsize="x-small")
    axes.set(xticks=places[1::3], xticklabels=[row["model"] for row in rows], ylabel="MiB at the peak, rank 0 of 2")
    pyplot.setp(axes.get_xticklabels(), rotation=15)
    axes.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    matplotlib.rcParams["svg.hashsalt"] = path.stem
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
