"""Memory of plans for CUDA's kernels beside that for the CPU's, for KerasHub's families, without a GPU.

    python benchmarks/cuda_memory.py [--families gpt2,...] [--dtype mixed_bfloat16]

Two blocks of each family with its head, as wide as its smallest published size, on 4 ranks by its preset; a training
step with Adam. Prints a table: activations at their largest on rank 0, and the ops whose activations at the peak differ
most, in MiB.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = ("| family | CPU MiB | CUDA MiB | | most of the difference |", "|---|---|---|---|---|")
RANKS, BATCH = 4, 8
MIB = 2**20


def rows(names: list[str]) -> Iterator[str]:
    """Yield the table's line of each family."""
    import keras

    from tests.families import FAMILIES, published
    from tp_planner.frontend.training_loss import TrainingLoss
    from tp_planner.planner import make_plan

    for name in names:
        family, steps = FAMILIES[name], []
        for device in ("cpu", "cuda"):
            keras.utils.clear_session()
            model, inputs = published(name, BATCH)
            layout = replace(family.layout(RANKS), devices=device)
            loss = TrainingLoss(family.case.make_loss())
            steps.append(make_plan(model, layout, inputs, keras.optimizers.Adam(), loss).step)
        cpu, cuda = (step.memory.largest.activations for step in steps)
        figures = f"{cpu / MIB:.1f} | {cuda / MIB:.1f} | {cuda / cpu - 1:+.1%}"
        yield f"| {family.title} | {figures} | {_ops(*map(_held, steps))} |"


def _held(step: object) -> Counter[str]:
    """Return the bytes of activations at the peak by the op that made them."""
    held: Counter[str] = Counter()
    for each in step.holders:  # type: ignore[attr-defined]
        if each.kind == "activations":
            held[each.op.removeprefix("aten.").partition(".")[0]] += each.bytes
    return held


def _ops(cpu: Counter[str], cuda: Counter[str]) -> str:
    differences = {op: cuda[op] - cpu[op] for op in {*cpu, *cuda}}
    largest = sorted(differences, key=lambda op: (-abs(differences[op]), op))[:2]
    return ", ".join(f"{op} {differences[op] / MIB:+.1f}" for op in largest if abs(differences[op]) >= MIB / 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="", help="comma-separated; by default all with published sizes")
    parser.add_argument("--dtype", default="mixed_bfloat16", help="the dtype policy")
    options = parser.parse_args()
    os.environ["KERAS_BACKEND"] = "torch"
    sys.path.insert(0, str(ROOT))
    warnings.filterwarnings("ignore", module="keras")
    import keras

    from tests.families import PUBLISHED

    keras.config.set_dtype_policy(options.dtype)
    print(*HEAD, sep="\n")
    for row in rows(options.families.split(",") if options.families else list(PUBLISHED)):
        print(row, flush=True)


if __name__ == "__main__":
    main()
