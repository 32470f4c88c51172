"""Everything that one GPU can tell: tests on it, memory against plans, one rank against hand-written code, kernels.

    python benchmarks/gpu.py [--only tests,memory,...] [--repeat 20] [--output FOLDER] [--device cpu]

Parts run in processes of their own, the most important first; each writes its JSON as soon as it is done, and one that
fails loses none of the others. What was not reached is run with ``--only``. With ``--device cpu`` everything but CUDA's
own figures is tried at tiny sizes. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from showing import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
RANKS = (1, 8, 2, 4)  # the ends first


# The parts, each in its process: it imports what it needs


def tests(device: str, repeat: int) -> dict[str, Any]:
    """Return how the tests marked ``gpu`` ended, which run on the CPU where there is no GPU."""
    import xml.etree.ElementTree as ET

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", f"--junit-xml={report}"]
        code = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT).returncode
        cases = list(ET.parse(report).iter("testcase"))
    outcome = {each.attrib["name"]: next((child.tag for child in each), "passed") for each in cases}
    return {"exit_code": code, "tests": outcome}


def memory(device: str, repeat: int) -> dict[str, Any]:
    """Return planned and measured memory of GPTs and Llamas."""
    from on_gpu import planned_memory

    return planned_memory.measure(device)


def rank_of(ranks: int) -> Callable[[str, int], dict[str, Any]]:
    """Return the part that is one rank of so many."""

    def part(device: str, repeat: int) -> dict[str, Any]:
        from on_gpu import one_rank

        return one_rank.measure(ranks, repeat, device)

    return part


def kernels(device: str, repeat: int) -> dict[str, Any]:
    """Return the attention that is taken for shapes, and the times of Adam's update."""
    from on_gpu import kernels

    return kernels.measure(device, repeat)


# In the order of importance.
PARTS: Mapping[str, Callable[[str, int], dict[str, Any]]] = {
    "tests": tests,
    "memory": memory,
    **{f"rank-of-{ranks}": rank_of(ranks) for ranks in RANKS},
    "kernels": kernels,
}


# The parent


def run(name: str, options: argparse.Namespace, facts: Mapping[str, Any], left: float) -> bool:
    """Run a part in a fresh process, and return whether it left its JSON in the folder of results."""
    print(f"{name}: at most {left:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--part", name, "--result", str(result)]
        command += ["--repeat", str(options.repeat), "--device", options.device]
        start = time.monotonic()
        try:
            code = subprocess.run(command, timeout=left).returncode
        except subprocess.TimeoutExpired:
            code = -1
        if code or not result.exists():
            print(f"{name}: {'out of time' if code == -1 else 'failed; its error is above'}", flush=True)
            return False
        measured = json.loads(result.read_text())
    seconds = round(time.monotonic() - start, 1)
    data = {"facts": facts, "seconds": seconds, name: measured}
    _write(options.output / f"{name}.json", json.dumps(data, indent=1) + "\n")
    print(f"{name}: {seconds} s", flush=True)
    return True


def _write(path: Path, text: str) -> None:
    """Write a file that is whole or not there."""
    beside = path.with_suffix(".partial")
    beside.write_text(text)
    beside.replace(path)


def page(folder: Path, device: str) -> Iterator[str]:
    """Yield what the JSON files of a folder say, as text."""
    from on_gpu import kernels, one_rank, planned_memory

    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in PARTS if _is_there(folder, name)}
    for name, data in found.items():
        yield f"{name}: {', '.join(f'{key} {value}' for key, value in data['facts'].items())}"
    if "tests" in found:
        outcomes = found["tests"]["tests"]["tests"]
        yield f"\ntests: {len(outcomes)}, passed {sum(each == 'passed' for each in outcomes.values())}"
        yield from (f"  {name}: {each}" for name, each in outcomes.items() if each != "passed")
    if "memory" in found:
        yield "\nmemory of a training step"
        yield from planned_memory.table(found["memory"]["memory"]["rows"])
    ranks = [found[name][name] for name in (f"rank-of-{number}" for number in sorted(RANKS)) if name in found]
    if ranks:
        yield f"\n{', '.join(f'{key} {value}' for key, value in asdict(one_rank.SHAPES[device]).items())}"
        yield from one_rank.table(ranks)
        yield from one_rank.verdicts(ranks) if device == "cuda" else ()
    if "kernels" in found:
        yield "\nkernels"
        yield from kernels.table(found["kernels"]["kernels"], device)


def _is_there(folder: Path, name: str) -> bool:
    return (folder / f"{name}.json").exists()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts; by default all")
    parser.add_argument("--repeat", type=int, default=20, help="timed calls of each work, at least 2")
    parser.add_argument("--limit", type=float, default=520, help="seconds after which no part goes on")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries it at tiny sizes")
    parser.add_argument("--output", type=Path, help="folder of the results; by default results/DEVICE")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what the processes are started with
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repeat < 2:
        parser.error(f"--repeat is {options.repeat}; quartiles need at least 2")
    unknown = set(options.only.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--only names {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing is measured; --device cpu tries the script at tiny sizes")
    return options


def main() -> int:
    options = arguments()
    if options.part:
        options.result.write_text(json.dumps(PARTS[options.part](options.device, options.repeat)))
        return 0
    name = torch.cuda.get_device_name() if options.device == "cuda" else machine.processor()
    facts = {**machine.facts(), "device": name, "repetitions": options.repeat}
    print(*(f"{key} {value}" for key, value in facts.items()), sep=", ", flush=True)
    options.output = options.output or RESULTS / machine.in_short(name)
    options.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.limit
    wanted = [part for part in PARTS if part in options.only.split(",")]
    missing = [part for part in wanted if not run(part, options, facts, max(end - time.monotonic(), 1))]
    text = list(page(options.output, options.device))
    print("", *text, sep="\n")
    _write(options.output / "gpu.md", "\n".join([f"# {name}", "", "```", *text, "```"]) + "\n")
    if missing:
        print(f"\nnot measured: go on with --only {','.join(missing)}")
    failed = "tests" in wanted and "tests" not in missing and _exit_code_of_tests(options.output) != 0
    if failed:
        print("\ntests failed; which of them, and why, is said above")
    return 1 if missing or failed else 0


def _exit_code_of_tests(folder: Path) -> int:
    code: int = json.loads((folder / "tests.json").read_text())["tests"]["exit_code"]
    return code


if __name__ == "__main__":
    sys.exit(main())
