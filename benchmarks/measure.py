"""One of the processes that step_time.py starts: measures all versions at one size, as a torchrun worker would.

Prints nothing; rank 0 writes the raw times to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import BLOCKS, RULES, SIZES, VOCABULARY, Size, Weights, draw_batch, draw_weights, keras_gpt, own_weights
from handwritten import AdamW, Gpt, parallelize_with_stock_styles
from report import HANDWRITTEN, PLANNED, SINGLE, STOCK
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import tp_planner

CHECKED_STEPS = 3  # steps whose losses are compared; they warm up too
TOLERANCE = 1e-4  # relative, float32
NOT_COLLECTIVE = ("waittensor", "wraptensorautograd")  # ops of the collectives' namespaces, without underscores

Batch = tuple[np.ndarray, np.ndarray]
Step = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Version:
    """One way to compute a training step; ``step`` returns its loss.

    ``alone``: rank 0 computes it, the others idle. ``same_loss``: it computes the single device's loss.
    """

    name: str
    step: Step
    alone: bool = False
    same_loss: bool = True


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that run inside, of c10d and of its functional ops, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # what DTensor then runs on the local tensors is counted
        name = func.__name__.split(".")[0].replace("_", "")
        if func.namespace in ("c10d", "_c10d_functional") and name not in NOT_COLLECTIVE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def versions(size: Size, shard_floor: bool) -> Iterator[Version]:
    """Yield the versions, built from the same weights, for the same batch."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    weights, batch = draw_weights(size), draw_batch(size)
    shard, local = size.divided(processes), own_weights(weights, rank, processes)
    yield Version(SINGLE, keras_step(keras_gpt(size, weights), batch) if rank == 0 else _nothing, alone=True)
    yield Version(PLANNED, keras_step(planned_gpt(size, weights), batch))
    yield Version(HANDWRITTEN, torch_step(Gpt(shard, local, "communicating"), batch))
    stock = parallelize_with_stock_styles(Gpt(size, weights), init_device_mesh("cpu", (processes,)))
    yield Version(STOCK, torch_step(stock, batch))
    if shard_floor:
        yield Version("shard only, plain Keras", keras_step(keras_gpt(shard, local), batch), same_loss=False)
        yield Version("shard only, plain torch", torch_step(Gpt(shard, local, "silent"), batch), same_loss=False)


def planned_gpt(size: Size, weights: Weights) -> keras.Model:
    """Return the Keras GPT, parallelized over all processes."""
    processes = dist.get_world_size()
    devices = [f"cpu:{rank}" for rank in range(processes)]
    layout_map = keras.distribution.LayoutMap(keras.distribution.DeviceMesh((processes,), ("model",), devices))
    for pattern, axes in RULES.items():
        layout_map[pattern] = axes
    return tp_planner.parallelize(keras_gpt(size, weights), layout_map)


def keras_step(model: keras.Model, batch: Batch) -> Step:
    """Return a training step of the Keras GPT, written as in Keras's guide to torch training loops."""
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(), loss_of, jit_compile=False)
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


def torch_step(model: Gpt, batch: Batch) -> Step:
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


def require_equal_losses(candidates: Sequence[Version]) -> None:
    """Run the first steps of every version; raise AssertionError if one's losses are not the single device's."""
    losses = {version.name: [float(version.step()) for _ in range(CHECKED_STEPS)] for version in candidates}
    single = [losses[SINGLE]]
    dist.broadcast_object_list(single, 0)
    for version in candidates:
        found, expected = losses[version.name], single[0]
        if version.same_loss and not version.alone and not np.allclose(found, expected, rtol=TOLERANCE, atol=0):
            raise AssertionError(
                f"{version.name}, rank {dist.get_rank()}: the losses of {CHECKED_STEPS} steps are {found}, "
                f"on a single device {expected}"
            )


def count_collectives(version: Version) -> Counter[str]:
    """Return how many collectives of each kind this rank runs in one step."""
    with CollectiveCounter() as counter:
        version.step()
        counts: Counter[str] = counter.counts
    return counts


def measure(candidates: Sequence[Version], repeat: int) -> list[list[float]]:
    """Return the times of each version's steps in ms, the slower rank's.

    The versions take turns, each round beginning with another one; every step starts at a barrier.
    """
    times: list[list[float]] = [[] for _ in candidates]
    for round_number in range(repeat):
        for offset in range(len(candidates)):
            turn = (round_number + offset) % len(candidates)
            dist.barrier()
            start = time.perf_counter()
            candidates[turn].step()
            times[turn].append(1000 * (time.perf_counter() - start))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, times)
    slower: list[list[float]] = np.max(np.array(everyone), axis=0).tolist()
    return slower


def facts(size: Size, repeat: int) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "keras": keras.__version__,
        "tp_planner": tp_planner.__version__,
        "processes": dist.get_world_size(),
        "threads per process": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "repetitions": repeat,
        "dtype": "float32",
        "blocks": BLOCKS,
        "vocabulary": VOCABULARY,
        "size": asdict(size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--repeat", type=int, required=True)
    parser.add_argument("--shard-floor", action="store_true")
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args()
    size = SIZES[options.size]

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    candidates = list(versions(size, options.shard_floor))
    require_equal_losses(candidates)
    counts = [count_collectives(version) for version in candidates]
    times = measure(candidates, options.repeat)
    if dist.get_rank() == 0:
        rows = [
            {"version": version.name, "collectives": dict(count), "times_ms": each}
            for version, count, each in zip(candidates, counts, times, strict=True)
        ]
        options.result.write_text(json.dumps({**facts(size, options.repeat), "rows": rows}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
