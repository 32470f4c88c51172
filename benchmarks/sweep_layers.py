"""Shard every dim of every variable of every Keras layer, and compare with a single device.

    python benchmarks/sweep_layers.py [LAYER ...]

Each layer of ``tests/layer_zoo.py`` runs on 2 and on 4 processes, in widths that divide and that do not. Prints each
case as it is done, then what failed in full, then the count. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.layer_parity import Outcome, Sharding, compare_all
from tests.layer_zoo import CASES, WIDTHS
from tests.workers import WorkerPool

PROCESSES = (2, 4)
TIMEOUT_S = 1800.0  # for all layouts of one case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layers", nargs="*", metavar="LAYER", help="names in keras.layers; by default all in the zoo")
    wanted = parser.parse_args().layers
    known = {case.layer for case in CASES.values()}
    unknown = sorted({*wanted} - known)
    if unknown:
        parser.error(f"no case for {', '.join(unknown)}; there are cases for {', '.join(sorted(known))}")
    outcomes: list[Outcome] = []
    names = [name for name, case in CASES.items() if not wanted or case.layer in wanted]
    for processes in PROCESSES:
        for each in sweep(names, processes):
            outcomes += each
            print(summary(each), flush=True)
    failures = [outcome for outcome in outcomes if not outcome.passed]
    for outcome in failures:
        print(f"\n{outcome}")
    print_refusals(outcomes)
    print(f"\n{table(outcomes)}\n\n{count(outcomes)}")
    return 1 if failures else 0


def print_refusals(outcomes: Iterable[Outcome]) -> None:
    """Print each message with which layouts are refused, as they should be, once for each case."""
    for case, detail in sorted(
        {(each.case, each.detail) for each in outcomes if each.verdict == "refused" and each.passed}
    ):
        print(f"\n{case}, some layouts: refused: {detail}")


def sweep(names: Sequence[str], processes: int) -> Iterator[list[Outcome]]:
    """Yield the outcomes of each case in each width."""
    pool = WorkerPool(processes, TIMEOUT_S)
    for name in names:
        for width in WIDTHS:
            try:
                yield [worst(each) for each in zip(*pool.run(compare_all, name, width), strict=True)]
            except Exception as error:  # of any kind, on any rank: the pool starts anew, and the sweep goes on
                detail = f"{type(error).__name__}: {error}{error.__cause__ or ''}"
                yield [Outcome(name, width, processes, Sharding("any layout", {}), "failed", detail)]
    pool.stop()


def worst(by_rank: Sequence[Outcome]) -> Outcome:
    """Return the outcome of the first rank that did not pass, or that of rank 0."""
    return next((outcome for outcome in by_rank if not outcome.passed), by_rank[0])


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return one line for one case: how many layouts, and how many of them of each verdict but "equal"."""
    first = outcomes[0]
    others = [f"{number} {verdict}" for verdict, number in verdicts(outcomes).items() if verdict != "equal" and number]
    where = f"{first.case}, width {first.width}, {first.processes} processes"
    return f"{where}: {len(outcomes)} layouts, {', '.join(others) or 'all equal'}"


def verdicts(outcomes: Iterable[Outcome]) -> dict[str, int]:
    found = [outcome.verdict for outcome in outcomes]
    return {verdict: found.count(verdict) for verdict in ("equal", "refused", "different", "failed")}


HEADER = ("layer", "cases", "variables", "dims", "on shards", "layouts", "equal", "refused", "failed")


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a row for each layer class.

    "dims" are those of its variables in all its cases, "on shards" how many of them are computed on shards where they
    divide by 2; the other columns count layouts, in both widths and on all numbers of processes.
    """
    layers = sorted({CASES[outcome.case].layer for outcome in outcomes})
    rows = [HEADER] + [row(layer, [each for each in outcomes if CASES[each.case].layer == layer]) for layer in layers]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(line(cells, widths) for cells in rows)


def line(cells: Sequence[str | int], widths: Sequence[int]) -> str:
    name, *numbers = (str(cell) for cell in cells)
    return "  ".join(
        [name.ljust(widths[0]), *(each.rjust(width) for each, width in zip(numbers, widths[1:], strict=True))]
    )


def row(layer: str, outcomes: Sequence[Outcome]) -> tuple[str | int, ...]:
    found = verdicts(outcomes)
    on_shards = [outcome for outcome in dims(outcomes) if any(use.on_shards for use in outcome.uses)]
    return (
        layer,
        len({outcome.case for outcome in outcomes}),
        len({(outcome.case, outcome.sharding.variable) for outcome in dims(outcomes)}),
        len(dims(outcomes)),
        len(on_shards),
        len(outcomes),
        found["equal"],
        found["refused"],
        sum(not outcome.passed for outcome in outcomes),
    )


def dims(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return the outcomes of single dims, each dim once."""
    return [
        outcome
        for outcome in outcomes
        if outcome.sharding.variable and outcome.width == WIDTHS[0] and outcome.processes == PROCESSES[0]
    ]


def count(outcomes: Sequence[Outcome]) -> str:
    found = verdicts(outcomes)
    passed = sum(outcome.passed for outcome in outcomes)
    return (
        f"{len({CASES[outcome.case].layer for outcome in outcomes})} layer classes, "
        f"{len({(outcome.case, outcome.sharding.variable) for outcome in dims(outcomes)})} variables, "
        f"{len(dims(outcomes))} dims; {passed} of {len(outcomes)} layouts passed "
        f"({found['equal']} equal, {found['refused']} refused with a reason)"
    )


if __name__ == "__main__":
    sys.exit(main())
