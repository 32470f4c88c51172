"""A demonstration: train a small GPT sharded over processes, and show that it learns what one process learns.

    python -m tp_planner.demo

starts itself through torchrun: two processes on the CPU, or one for each GPU where there are two or more. They
train on text that comes with Python. Rank 0 then trains the same model alone, from the same weights on the same
batches, and compares the loss of every step and every final weight. The exit code is 1 if they differ.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import tp_planner
from tp_planner.gpt import LENGTH, RULES, build_gpt

BATCH, STEPS, LEARNING_RATE = 16, 120, 3e-3
TOLERANCE = 1e-5  # relative, in float32
TINY = 1e-30  # keeps a weight that is all zero from dividing by zero
SHOWN = 10  # rows of the comparison

# What torch calls the collectives of a plan.
KINDS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}
# Ops of the same family that send nothing.
SILENT = ("wait_tensor", "_wrap_tensor_autograd")


@dataclass(frozen=True, slots=True)
class Run:
    """What one training gave: the loss of every step, the final weights by path, and a step's collectives."""

    losses: tuple[float, ...]
    weights: Mapping[str, np.ndarray]
    collectives: Counter[str]


def main() -> int:
    """Train on all processes, then on rank 0 alone, and return 0 if both gave the same."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    keras.utils.set_random_seed(0)
    model, batches = build_gpt(), read_batches()
    initial = model.get_weights()

    plan = tp_planner.plan(model, layout_map(size))
    if rank == 0:
        print(plan)
        print(f"training on {size} processes")
    tp_planner.parallelize(model, plan)
    losses, collectives = train(model, batches, verbose=2 if rank == 0 else 0)
    tp_planner.verify_model_parallel(model)
    sharded = Run(losses, weights_of(tp_planner.restore(model)), collectives)
    dist.destroy_process_group()
    if rank:
        return 0

    print("\ntraining the same model on one process")
    model.set_weights(initial)
    losses, collectives = train(model, batches, verbose=2)
    single = Run(losses, weights_of(model), collectives)
    return report(single, sharded, Counter(collective.kind for collective in plan.collectives))


def read_batches() -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and targets, (examples, positions) of int32: the bytes of Python's own help, shifted by one."""
    text = np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode(), "uint8")
    starts = np.random.default_rng(0).integers(0, len(text) - LENGTH - 1, BATCH * STEPS)
    windows = np.stack([text[start : start + LENGTH + 1] for start in starts]).astype("int32")
    return windows[:, :-1], windows[:, 1:]


def layout_map(size: int) -> keras.distribution.LayoutMap:
    """Return the rules on a mesh of ``size`` devices."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = keras.distribution.DeviceMesh((size,), ("model",), [f"{kind}:{number}" for number in range(size)])
    layouts = keras.distribution.LayoutMap(mesh)
    for pattern, axes in RULES.items():
        layouts[pattern] = axes
    return layouts


def train(
    model: keras.Model, batches: tuple[np.ndarray, np.ndarray], verbose: int
) -> tuple[tuple[float, ...], Counter[str]]:
    """Fit the model to every batch once; return the losses, and the collectives of one step."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(LEARNING_RATE), loss)
    watcher = StepWatcher()
    model.fit(*batches, batch_size=BATCH, shuffle=False, callbacks=[watcher], verbose=verbose)
    return tuple(watcher.losses), watcher.counter.collectives


class StepWatcher(keras.callbacks.Callback):
    """Keeps the loss of every step, where Keras shows the mean so far, and counts the second step's collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.counter = CollectiveCounter()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.reset_metrics()
        if batch == 1:
            self.counter.__enter__()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 1:
            self.counter.__exit__(None, None, None)
        self.losses.append(float(logs["loss"]))


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that really run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace in ("_c10d_functional", "c10d") and name not in SILENT:
            self.collectives[KINDS.get(name, name)] += 1
        return func(*args, **(kwargs or {}))


def weights_of(model: keras.Model) -> dict[str, np.ndarray]:
    """Return every weight by its path."""
    return {variable.path: value for variable, value in zip(model.weights, model.get_weights(), strict=True)}


def report(single: Run, sharded: Run, planned: Counter[str]) -> int:
    """Print the comparison, and return the exit code."""
    losses = [relative(np.float64(a), np.float64(b)) for a, b in zip(sharded.losses, single.losses, strict=True)]
    weights = {path: relative(sharded.weights[path], value) for path, value in single.weights.items()}
    print(f"\n{'step':>5} {'loss, single':>14} {'loss, sharded':>14} {'relative difference':>20}")
    for step in sorted({*range(0, STEPS, STEPS // SHOWN), STEPS - 1}):
        print(f"{step + 1:5} {single.losses[step]:14.6f} {sharded.losses[step]:14.6f} {losses[step]:20.1e}")
    worst = max(weights, key=lambda path: weights[path])
    print(f"\nloss fell from {sharded.losses[0]:.3f} to {sharded.losses[-1]:.3f} in {STEPS} steps")
    print(f"largest relative difference of a loss: {max(losses):.1e}")
    print(f"largest relative difference of a weight: {weights[worst]:.1e}, {worst}")
    print(f"collectives of a step: {listed(planned)} planned, {listed(sharded.collectives)} executed")
    same = max(*losses, weights[worst]) <= TOLERANCE
    print(f"sharded and single training {'agree' if same else 'DIFFER'}; tolerance {TOLERANCE:.0e}, float32")
    as_planned = planned == sharded.collectives
    if not as_planned:
        print("the collectives are NOT those of the plan")
    return 0 if same and as_planned else 1


def relative(value: Any, truth: Any) -> float:
    """Return the norm of the difference over the norm of ``truth``."""
    norm = float(np.linalg.norm(truth))
    return float(np.linalg.norm(value - truth)) / max(norm, TINY)


def listed(counts: Counter[str]) -> str:
    """Return for example ``2 all_gather, 10 all_reduce``."""
    return ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts)) or "none"


def launch() -> None:
    """Become torchrun, with this module on as many processes as there is reason for."""
    gpus = torch.cuda.device_count()
    processes = max(size for size in (1, 2, 4, 8) if size <= gpus) if gpus >= 2 else 2
    if gpus < 2:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two processes cannot share one GPU
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "tp_planner.demo"])


if __name__ == "__main__":
    if "RANK" not in os.environ:
        launch()
    sys.exit(main())
