"""Step time of a parallelized Keras GPT against hand-written tensor parallelism, on two CPU processes.

    python benchmarks/step_time.py [--sizes tiny,medium,large] [--repeat N] [--shard-floor] [--output FOLDER]

Starts its two processes itself, anew for each size; see benchmarks/README.md for what they measure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from processes.launch import environment, free_port
from showing.report import FOOTNOTE, heading, table

HERE = Path(__file__).resolve().parent
PROCESSES = 2
REPEAT = {"tiny": 61, "medium": 25, "large": 9}  # rounds by size


def run(size: str, repeat: int, shard_floor: bool) -> dict[str, Any]:
    """Return what the processes measured at one size.

    Raises SystemExit if one of them fails; what it says is on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(HERE / "processes" / "measure.py"), "--size", size, "--repeat", str(repeat)]
        command += ["--result", str(result), *(["--shard-floor"] if shard_floor else [])]
        port = free_port()
        workers = [subprocess.Popen(command, env=environment(rank, PROCESSES, port)) for rank in range(PROCESSES)]
        wait(workers)
        measured: dict[str, Any] = json.loads(result.read_text())
        return measured


def wait(workers: list[subprocess.Popen[bytes]]) -> None:
    """Wait for the workers; if one fails, stop the others, which would wait for it."""
    try:
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers):
                break
            time.sleep(0.2)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
    failed = [rank for rank, worker in enumerate(workers) if worker.wait()]
    if failed:
        raise SystemExit(f"the process of rank {failed[0]} failed; its error is above")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(REPEAT), help=f"comma-separated, of {', '.join(REPEAT)}")
    parser.add_argument("--repeat", type=int, help=f"timed rounds of each work, at least 2; by size {REPEAT}")
    parser.add_argument("--shard-floor", action="store_true", help="also time one rank's shard without collectives")
    parser.add_argument("--output", type=Path, help="write every single time to step_time.json in this folder")
    options = parser.parse_args()
    if options.repeat is not None and options.repeat < 2:
        parser.error(f"--repeat is {options.repeat}; quartiles need at least 2")
    unknown = [name for name in options.sizes.split(",") if name not in REPEAT]
    if unknown:
        parser.error(f"--sizes has {unknown[0]!r}; sizes are {', '.join(REPEAT)}")
    return options


def main() -> None:
    options = arguments()
    results = []
    for size in options.sizes.split(","):
        results.append(run(size, options.repeat or REPEAT[size], options.shard_floor))
        if len(results) == 1:
            print(heading(results[0]))
        print(f"\n{table(results[-1])}", flush=True)
    print(f"\n{FOOTNOTE}")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "step_time.json").write_text(_with_a_line_for_each_row(results))


def _with_a_line_for_each_row(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as JSON in which every measured version is one line."""
    texts = []
    for result in results:
        rows = ",\n  ".join(map(json.dumps, result["rows"]))
        texts.append(json.dumps({**result, "rows": "ROWS"}).replace('"ROWS"', f"[\n  {rows}\n]"))
    return "[\n" + ",\n".join(texts) + "\n]\n"


if __name__ == "__main__":
    main()
