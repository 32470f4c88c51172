"""Training steps under Keras nightly's own ModelParallel on torch, and under tp_planner's, side by side in one run.

    python benchmarks/vs_keras_nightly.py [--sizes tiny,medium] [--models MLP,GPT] [--repeat 15] [--output FOLDER]

Looks for Keras nightly in ``.venv-nightly``; where it is absent, the comparison is skipped. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from processes.launch import ROOT, environment, free_port

NIGHTLY = ROOT / ".venv-nightly" / "bin" / "python"
INSTALL = """\
  python3 -m venv .venv-nightly
  .venv-nightly/bin/pip install torch==2.13.0
  .venv-nightly/bin/pip install keras-nightly==3.16.0.dev2026102704 networkx numpy rich typer
  .venv-nightly/bin/pip install --no-deps keras-hub-nightly==0.33.0.dev202610250352
  .venv-nightly/bin/pip install regex kagglehub tokenizers sentencepiece safetensors
  .venv-nightly/bin/pip install pytest scipy hypothesis jsonschema"""
SCRIPT = ROOT / "benchmarks" / "processes" / "one_side.py"
MODELS = ("MLP", "GPT", "Llama", "Llama, unfused", "Llama, its own map", "Gemma", "Gemma, its own map")
SINGLE, KERAS, OURS = "single", "keras", "tp_planner"
PROCESSES = {SINGLE: 1, KERAS: 2, OURS: 2}
CHECKED_STEPS = 5  # steps whose losses are compared; they warm up too
TOLERANCE = 1e-5  # relative, in float32
TARGET = 0.5  # of Keras's step time
PATIENCE_S = 300.0  # for one answer

Row = Mapping[str, Any]  # one side of one model at one size


class SideFailed(Exception):
    """A side could not do what it was asked; the message is its error."""


class Side:
    """The processes of one side. They wait for orders without using a core."""

    def __init__(self, model: str, size: str, side: str) -> None:
        command = [str(NIGHTLY), str(SCRIPT), model, size, side]
        count, port = PROCESSES[side], free_port()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # it is there as long as the processes
        self._processes = [
            subprocess.Popen(
                command,
                env=environment(rank, count, port),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
            for rank in range(count)
        ]

    def ask(self, what: str) -> list[Any]:
        """Return what every process answers, by rank. Raises SideFailed."""
        for process in self._processes:
            print(what, file=process.stdin, flush=True)
        return [self._answer(rank, what) for rank in range(len(self._processes))]

    def _answer(self, rank: int, what: str) -> Any:
        stdout = self._processes[rank].stdout
        assert stdout is not None
        if not select.select([stdout], [], [], PATIENCE_S)[0]:
            raise SideFailed(f"no answer to {what!r} in {PATIENCE_S:.0f} s")
        line = stdout.readline()
        if not line:
            self._errors.seek(0)
            raise SystemExit(f"a process ended without an answer to {what!r}:\n{self._errors.read()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise SideFailed(answer["error"])
        return answer["answer"]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def compare(model: str, size: str, repeat: int) -> Iterator[Row]:
    """Yield what was measured on each side; the sides take turns, each round beginning with another one."""
    sides = {side: Side(model, size, side) for side in PROCESSES}
    rows: dict[str, dict[str, Any]] = {side: {"model": model, "size": size, "side": side} for side in sides}
    try:
        for side, row in rows.items():
            try:
                row["losses"] = [sides[side].ask("loss")[0] for _ in range(CHECKED_STEPS)]
                row["collectives"] = sides[side].ask("collectives")[0]
                row["times_ms"] = []
            except SideFailed as failure:
                if side != KERAS:
                    raise
                row["raises"] = str(failure)
        timed = [side for side, row in rows.items() if "times_ms" in row]
        for number in range(repeat):
            for side in timed[number % len(timed) :] + timed[: number % len(timed)]:
                rows[side]["times_ms"].append(max(sides[side].ask("time")))
        rows[OURS]["facts"] = {**sides[OURS].ask("facts")[0], "cores": os.cpu_count(), "processes": PROCESSES[OURS]}
    finally:
        for each in sides.values():
            each.stop()
    yield from rows.values()


# What was measured, as text


def heading(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what the numbers of one size depend on, and the head of its table."""
    facts = next(row["facts"] for row in rows if "facts" in row)
    yield ""
    yield ", ".join(f"{name} {value}" for name, value in facts.items() if name != "size")
    yield ", ".join(f"{name} {value}" for name, value in facts["size"].items())
    yield (
        f"{'model':20}{'side':12}{'median ms':>10}{'quartiles ms':>20}{'ratio':>8}"
        f"{'all-reduces':>13}{'collectives':>13}{'losses':>12}"
    )


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of one model, the single device first."""
    by_side = {row["side"]: row for row in rows}
    for side, row in by_side.items():
        name = f"{row['model'] if side == SINGLE else '':20}{side:12}"
        if "raises" in row:
            yield f"{name}raises {textwrap.shorten(row['raises'], 120, placeholder=' ...')}"
            continue
        lower, median, upper = statistics.quantiles(row["times_ms"], n=4)
        quartiles = f"{lower:.1f} to {upper:.1f}"
        yield (
            f"{name}{median:10.1f}{quartiles:>20}{_ratio(row, by_side[KERAS]):>8}"
            f"{all_reduces(row):13}{total(row):13}{difference(row, by_side[SINGLE]):12.1e}"
        )


def _ratio(row: Row, keras: Row) -> str:
    return f"{ratio(row, keras):.2f}" if "times_ms" in keras else ""


def ratio(row: Row, keras: Row) -> float:
    """Return the step time as a share of Keras's."""
    return statistics.median(row["times_ms"]) / statistics.median(keras["times_ms"])


def total(row: Row) -> int:
    return sum(row["collectives"].values())


def all_reduces(row: Row) -> int:
    return sum(count for kind, count in row["collectives"].items() if kind.startswith("allreduce"))


def difference(row: Row, single: Row) -> float:
    """Return the largest relative difference of a loss from the single device's."""
    return max(abs(own - truth) / abs(truth) for own, truth in zip(row["losses"], single["losses"], strict=True))


def misses(rows: Sequence[Row]) -> Iterator[str]:
    """Yield in words what is not as it has to be on our side of one model."""
    by_side = {row["side"]: row for row in rows}
    ours, keras = by_side[OURS], by_side[KERAS]
    what = f"{ours['model']}, {ours['size']}"
    if difference(ours, by_side[SINGLE]) > TOLERANCE:
        yield f"{what}: losses differ from a single device's by more than {TOLERANCE:.0e}"
    if "raises" in keras:
        return
    if total(ours) > total(keras):
        yield f"{what}: {total(ours)} collectives, Keras has {total(keras)}"
    if ratio(ours, keras) > TARGET:
        yield f"{what}: {ratio(ours, keras):.2f} times Keras's step time, the target is {TARGET}"


def main() -> int:
    """Return 0 if nothing is amiss, or Keras nightly is absent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,medium", help="comma-separated, of tiny, medium and large")
    parser.add_argument("--models", default=";".join(MODELS), help=f"separated by semicolons; by default {MODELS}")
    parser.add_argument("--repeat", type=int, default=15, help="timed steps of each side, at least 2")
    parser.add_argument("--output", type=Path, help="write every single time to vs_keras_nightly.json there")
    options = parser.parse_args()
    if not NIGHTLY.exists():
        print(f"skipped: there is no Keras nightly in {NIGHTLY.parents[1].name}; to compare, run\n{INSTALL}")
        return 0
    found: list[Row] = []
    amiss: list[str] = []
    for size in options.sizes.split(","):
        for number, model in enumerate(options.models.split(";")):
            rows = list(compare(model, size, options.repeat))
            if not number:
                print(*heading(rows), sep="\n")
            print(*table(rows), sep="\n", flush=True)
            found += rows
            amiss += misses(rows)
    print("", *(amiss or ["every target is met"]), sep="\n")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "vs_keras_nightly.json").write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(amiss))


if __name__ == "__main__":
    sys.exit(main())
