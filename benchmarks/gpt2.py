"""Time of a training step of KerasHub's GPT-2 with 124 million parameters, on one CPU process and on two.

    python benchmarks/gpt2.py [--steps 6] [--output FOLDER]

Starts its processes itself, one thread each; see benchmarks/README.md. Its vocabulary of 50257 does not divide by 2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np
import torch.distributed as dist
from showing import machine

import tp_planner
from tests.workers import WorkerPool
from tp_planner.frontend.layout_file import find_layout_file, read_layout_file
from tp_planner.ir.mesh import Mesh

TARGET = 1.85  # times as fast on two processes as on one
BATCH, LENGTH, VOCABULARY = 2, 256, 50257
TOLERANCE = 1e-4  # of the losses, relative, in float32
RUN_S = 900.0


# On the ranks


def train(steps: int) -> dict[str, Any]:
    """Return the loss and the seconds of each step; the first builds optimizer and metrics."""
    import keras_hub

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.GPT2Backbone(VOCABULARY, 12, 12, 768, 3072, dropout=0.0, max_sequence_length=1024)
    model = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None, name="gpt2")
    tokens, targets = np.random.default_rng(0).integers(0, VOCABULARY, (2, BATCH, LENGTH)).astype("int32")
    x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-4), loss, jit_compile=False)
    sent = 0
    if dist.get_world_size() > 1:
        layout = read_layout_file(find_layout_file("gpt2")).on(Mesh((("model", dist.get_world_size()),)))
        plan = tp_planner.plan(model, layout, x)
        tp_planner.parallelize(model, plan)
        sent = sum(each.wire_bytes for each in plan.collectives)
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(float(np.ravel(model.train_on_batch(x, targets))[0]))
        seconds.append(time.perf_counter() - start)
    return {"parameters": model.count_params(), "losses": losses, "seconds": seconds, "bytes_sent": sent}


# In the parent


def run(processes: int, steps: int) -> dict[str, Any]:
    """Return what rank 0 measured, in fresh processes."""
    pool = WorkerPool(processes, timeout_s=RUN_S)
    try:
        first: dict[str, Any] = pool.run(train, steps)[0]
    finally:
        pool.stop()
    return {"processes": processes, "median_s": statistics.median(first["seconds"][1:]), **first}


def verdict(one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    """Return how much faster two processes are; raise AssertionError if they do not train alike."""
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=TOLERANCE)
    speed = one["median_s"] / two["median_s"]
    return (
        f"a step takes {one['median_s']:.2f} s on one process and {two['median_s']:.2f} s on two, which send "
        f"{two['bytes_sent'] / 2**20:.1f} MiB each: {speed:.2f} times as fast, "
        f"{'as wanted' if speed >= TARGET else f'MISSES {TARGET}'}; losses are equal to {TOLERANCE:g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="training steps, the first of which is not counted")
    parser.add_argument("--output", type=Path, help="write every figure to gpt2.json in this folder")
    options = parser.parse_args()
    one, two = (run(processes, options.steps) for processes in (1, 2))
    stated = {**machine.facts(), "batch": BATCH, "length": LENGTH, "dtype": "float32", "optimizer": "AdamW"}
    print(", ".join(f"{name} {value}" for name, value in stated.items()))
    print(verdict(one, two))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "gpt2.json").write_text(json.dumps({**stated, "rows": [one, two]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
