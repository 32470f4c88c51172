"""All benchmarks that need no accelerator, one after the other, and the page of their results.

    python benchmarks/bench.py [--machine NAME]

Writes to benchmarks/results/NAME, by default a name made of the processor's and the number of cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from showing import machine

HERE = Path(__file__).resolve().parent
COMMANDS = (
    ("step_time.py", "--sizes", "tiny,medium,large", "--shard-floor"),
    ("communication.py", "--ranks", "2,4,8"),
    ("plan_time.py", "--sizes", "8b,70b,405b", "--curve", "--repeat", "3"),
    ("memory.py",),
    ("generation.py",),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default=machine.short_name(), help="names the folder of the results")
    folder = HERE / "results" / parser.parse_args().machine
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # this checkout's tp_planner first
    environment = {**os.environ, "KERAS_BACKEND": "torch", "PYTHONPATH": os.pathsep.join(paths)}
    load, seconds = os.getloadavg()[0], {}
    for script, *options in COMMANDS:
        print(f"\n{' '.join([script, *options])}\n", flush=True)
        start = time.monotonic()
        command = [sys.executable, str(HERE / script), *options, "--output", str(folder)]
        if subprocess.run(command, env=environment).returncode:
            raise SystemExit(f"{script} failed; its error is above")
        seconds[script] = round(time.monotonic() - start, 1)
        print(f"\n{script} took {seconds[script]:.0f} s", flush=True)
    (folder / "bench.json").write_text(json.dumps({"load average before": load, "seconds": seconds}, indent=1) + "\n")
    subprocess.run([sys.executable, str(HERE / "page.py"), str(folder)], env=environment, check=True)
    print(f"\nthe page is {folder / 'README.md'}")


if __name__ == "__main__":
    main()
