"""Step time of replicas that store weights in parts, against torch's ``fully_shard``, on four CPU processes.

    python benchmarks/replicas.py [--size tiny] [--meshes 2x2,4x1] [--repeat N] [--output FOLDER]

Starts its processes itself, anew for each mesh; see benchmarks/README.md for what they measure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from processes.launch import environment, free_port
from showing.replicas import FOOTNOTE, table
from step_time import wait

HERE = Path(__file__).resolve().parent
REPEAT = {"tiny": 41, "medium": 15, "large": 7}  # rounds by size


def run(size: str, mesh: tuple[int, int], repeat: int) -> dict[str, Any]:
    """Return what the processes measured on one mesh.

    Raises SystemExit if one of them fails; what it says is on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(HERE / "processes" / "one_replica.py"), "--size", size, "--repeat", str(repeat)]
        command += ["--batch", str(mesh[0]), "--model", str(mesh[1]), "--result", str(result)]
        ranks, port = mesh[0] * mesh[1], free_port()
        wait([subprocess.Popen(command, env=environment(rank, ranks, port)) for rank in range(ranks)])
        measured: dict[str, Any] = json.loads(result.read_text())
        return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=REPEAT, default="medium")
    parser.add_argument("--meshes", default="2x2,4x1", help="comma-separated, replicas x ranks of each")
    parser.add_argument("--repeat", type=int, help=f"timed rounds; by size {REPEAT}")
    parser.add_argument("--output", type=Path, help="write every single time to replicas.json in this folder")
    options = parser.parse_args()
    results = []
    for mesh in options.meshes.split(","):
        batch, model = map(int, mesh.split("x"))
        results.append(run(options.size, (batch, model), options.repeat or REPEAT[options.size]))
        print(table(results[-1]), "", sep="\n", flush=True)
    print(FOOTNOTE)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "replicas.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
