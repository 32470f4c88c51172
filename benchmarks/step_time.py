"""Step time of a parallelized Keras GPT against hand-written tensor parallelism, on two CPU processes.

    python benchmarks/step_time.py [--sizes tiny,medium,large] [--repeat 15] [--shard-floor] [--json FILE]

Starts its two processes itself. All versions run interleaved in the same processes, compute the same loss from
the same weights (checked first), and use the same AdamW formula.
"""

from __future__ import annotations

import os

os.environ |= {"KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import BLOCKS, RULES, SIZES, VOCABULARY, Size, Weights, draw_batch, draw_weights, keras_gpt, own_weights
from handwritten import AdamW, Gpt, parallelize_with_stock_styles
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import tp_planner

PROCESSES = 2
CHECKED_STEPS = 3  # steps whose losses are compared; they warm up too
TOLERANCE = 1e-4  # relative, float32
SINGLE, PLANNED, HANDWRITTEN, STOCK = "single device, Keras", "tp_planner, Keras", "hand-written", "stock styles, torch"

NOT_COLLECTIVE = ("waittensor", "wraptensorautograd")  # ops of the collectives' namespaces, without underscores

Step = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Version:
    """One way to compute a training step. ``alone``: on rank 0, the other idle; ``same_loss``: as the single device."""

    name: str
    step: Step
    alone: bool = False
    same_loss: bool = True


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one version's steps, the slower rank's each time. ``ratio`` is to the hand-written median."""

    version: str
    all_reduces: int
    other_collectives: int
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    ratio: float


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that run inside, of c10d and of its functional ops, on plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # count what DTensor runs on the local tensors instead
        name = func.__name__.split(".")[0].replace("_", "")
        if func.namespace in ("c10d", "_c10d_functional") and name not in NOT_COLLECTIVE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


# The versions


def versions(size: Size, rank: int, shard_floor: bool) -> Iterator[Version]:
    """Yield the versions of one size, built from the same weights, for the same batch."""
    weights, batch = draw_weights(size), draw_batch(size)
    shard, local = size.divided(PROCESSES), own_weights(weights, rank, PROCESSES)
    yield Version(SINGLE, keras_step(size, weights, batch) if rank == 0 else _nothing, alone=True)
    yield Version(PLANNED, keras_step(size, weights, batch, parallelized=True))
    yield Version(HANDWRITTEN, torch_step(Gpt(shard, local, "communicating"), batch))
    stock = parallelize_with_stock_styles(Gpt(size, weights), init_device_mesh("cpu", (PROCESSES,)))
    yield Version(STOCK, torch_step(stock, batch))
    if shard_floor:
        yield Version("shards without collectives, Keras", keras_step(shard, local, batch), same_loss=False)
        yield Version("shards without collectives, torch", torch_step(Gpt(shard, local, "silent"), batch), same_loss=False)


def keras_step(
    size: Size, weights: Weights, batch: tuple[np.ndarray, np.ndarray], parallelized: bool = False
) -> Step:
    """Return a training step of the Keras GPT, written as in Keras's guide to torch training loops."""
    model = keras_gpt(size, weights)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(), loss_of, jit_compile=False)
    if parallelized:
        mesh = keras.distribution.DeviceMesh((PROCESSES,), ("model",), [f"cpu:{i}" for i in range(PROCESSES)])
        layout = keras.distribution.LayoutMap(mesh)
        for pattern, axes in RULES.items():
            layout[pattern] = axes
        tp_planner.parallelize(model, layout)
    tokens, labels = (torch.from_numpy(array) for array in batch)

    def step() -> torch.Tensor:
        model.zero_grad()
        loss: torch.Tensor = loss_of(labels, model(tokens, training=True))
        loss.backward()
        variables = model.trainable_weights
        gradients = [variable.value.grad for variable in variables]
        with torch.no_grad():
            model.optimizer.apply(gradients, variables)
        return loss.detach()

    return step


def torch_step(model: Gpt, batch: tuple[np.ndarray, np.ndarray]) -> Step:
    """Return a training step of the torch GPT."""
    optimizer = AdamW(list(model.parameters()))
    tokens, labels = (torch.from_numpy(array) for array in batch)
    targets = labels.long().flatten()

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _nothing() -> torch.Tensor:
    return torch.tensor(0.0)


# Measuring


def require_equal_losses(candidates: Sequence[Version], rank: int) -> None:
    """Run a few steps of every version; raise AssertionError if one's losses are not the single device's."""
    losses = {version.name: [float(version.step()) for _ in range(CHECKED_STEPS)] for version in candidates}
    single = [losses[SINGLE]]
    dist.broadcast_object_list(single, 0)
    for version in candidates:
        found, expected = losses[version.name], single[0]
        if version.same_loss and not version.alone and not np.allclose(found, expected, rtol=TOLERANCE, atol=0):
            raise AssertionError(f"{version.name}, rank {rank}: losses {found}, on a single device {expected}")


def count_collectives(version: Version) -> Counter[str]:
    """Return how many collectives of each kind this rank runs in one step."""
    with CollectiveCounter() as counter:
        version.step()
    return counter.counts


def measure(candidates: Sequence[Version], repeat: int) -> list[list[float]]:
    """Return the times of each version's steps in ms, interleaved, each round starting with another version."""
    times: list[list[float]] = [[] for _ in candidates]
    for round_number in range(repeat):
        for offset in range(len(candidates)):
            index = (round_number + offset) % len(candidates)
            dist.barrier()
            start = time.perf_counter()
            candidates[index].step()
            times[index].append(1000 * (time.perf_counter() - start))
    return _slower_rank(times)


def _slower_rank(times: list[list[float]]) -> list[list[float]]:
    everyone: list[Any] = [None] * PROCESSES
    dist.all_gather_object(everyone, times)
    return np.max(np.array(everyone), axis=0).tolist()


def summarize(candidates: Sequence[Version], counts: Sequence[Counter[str]], times: list[list[float]]) -> list[Timing]:
    """Return the statistics of each version."""
    medians = {version.name: statistics.median(each) for version, each in zip(candidates, times, strict=True)}
    timings = []
    for version, count, each in zip(candidates, counts, times, strict=True):
        lower, median, upper = statistics.quantiles(each, n=4)
        reduces = count["allreduce"]
        ratio = median / medians[HANDWRITTEN]
        timings.append(Timing(version.name, reduces, count.total() - reduces, median, lower, upper, ratio))
    return timings


def run_size(size: Size, rank: int, repeat: int, shard_floor: bool) -> list[Timing]:
    """Return the timings of all versions at one size."""
    candidates = list(versions(size, rank, shard_floor))
    require_equal_losses(candidates, rank)
    counts = [count_collectives(version) for version in candidates]
    return summarize(candidates, counts, measure(candidates, repeat))


# Reporting


def header(repeat: int) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "keras": keras.__version__,
        "tp_planner": tp_planner.__version__,
        "cores": os.cpu_count(),
        "processes": PROCESSES,
        "threads per process": torch.get_num_threads(),
        "repetitions": repeat,
        "checked steps": CHECKED_STEPS,
        "blocks": BLOCKS,
        "vocabulary": VOCABULARY,
        "dtype": "float32",
    }


def table(size: Size, timings: Sequence[Timing]) -> str:
    """Return the timings of one size as text."""
    lines = [
        f"{size.name}: width {size.width}, length {size.length}, batch {size.batch}, "
        f"{size.heads} heads, hidden {size.hidden}",
        f"  {'':34} {'median ms':>10} {'quartiles ms':>18} {'ratio':>7} {'all-reduces':>12}",
    ]
    for row in timings:
        quartiles = f"{row.lower_quartile_ms:.1f} .. {row.upper_quartile_ms:.1f}"
        other = f" + {row.other_collectives} other" if row.other_collectives else ""
        lines.append(
            f"  {row.version:34} {row.median_ms:10.1f} {quartiles:>18} {row.ratio:7.2f} {row.all_reduces:12}{other}"
        )
    return "\n".join(lines)


FOOTNOTE = (
    "One training step: forward, backward, AdamW. Times are of the slower rank; ratio is to the hand-written median.\n"
    "The single device runs on rank 0 with one thread while the other rank waits at a barrier."
)


def work(rank: int, rendezvous: str, sizes: Sequence[str], repeat: int, shard_floor: bool, json_file: str | None) -> None:
    """What each process does; rank 0 prints and writes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES)
    facts = header(repeat)
    results = []
    if rank == 0:
        print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    for name in sizes:
        timings = run_size(SIZES[name], rank, repeat, shard_floor)
        results.append({"size": asdict(SIZES[name]), "timings": [asdict(timing) for timing in timings]})
        if rank == 0:
            print(f"\n{table(SIZES[name], timings)}", flush=True)
    if rank == 0:
        print(f"\n{FOOTNOTE}")
        if json_file:
            Path(json_file).write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,medium", help=f"comma-separated, of {', '.join(SIZES)}")
    parser.add_argument("--repeat", type=int, default=15, help="timed steps of each version, at least 2")
    parser.add_argument("--shard-floor", action="store_true", help="also time one rank's shards without collectives")
    parser.add_argument("--json", help="write the results to this file too")
    options = parser.parse_args()
    options.sizes = options.sizes.split(",")
    unknown = [name for name in options.sizes if name not in SIZES]
    if unknown:
        parser.error(f"unknown sizes {', '.join(unknown)}; there are {', '.join(SIZES)}")
    if options.repeat < 2:
        parser.error(f"--repeat is {options.repeat}; quartiles need at least 2")
    return options


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        where = (Path(folder) / "rendezvous").as_uri()
        rest = (where, options.sizes, options.repeat, options.shard_floor, options.json)
        torch.multiprocessing.spawn(work, rest, nprocs=PROCESSES)


if __name__ == "__main__":
    main()
