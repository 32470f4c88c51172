"""One of the processes that step_time.py starts: measures all versions at one size, as a torchrun worker would.

Prints nothing; rank 0 writes the raw times to a JSON file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models.gpt import BLOCKS, RULES, SIZES, VOCABULARY, Size, Weights, draw_batch, draw_weights, keras_gpt, own_weights
from peers.handwritten import AdamW, Gpt, make_all_dtensors, parallelize_with_stock_styles
from showing.report import (
    AUTOMATIC,
    DTENSORS,
    FITTED,
    HANDWRITTEN,
    KERAS_SHARD,
    ON_STREAM,
    ON_STREAM_REPLAYED,
    PLANNED,
    REPLAYED,
    SINGLE,
    SINGLE_TORCH,
    STOCK,
    TORCH_SHARD,
    WORKS,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils._python_dispatch import TorchDispatchMode

import tp_planner
from tp_planner.replay import automatic

CHECKED_STEPS = 3  # steps whose losses are compared; they warm up too
TOLERANCE = 1e-4  # relative, float32
NOT_COLLECTIVE = ("waittensor", "wraptensorautograd")  # ops of the collectives' namespaces, without underscores

Batch = tuple[np.ndarray, np.ndarray]
Step = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Version:
    """One way to compute the GPT.

    ``steps`` by work: each returns a number that says whether it was computed right, such as the loss.
    ``alone``: rank 0 computes it, the others idle. ``same_numbers``: they are the single device's.
    """

    name: str
    steps: Mapping[str, Step]
    alone: bool = False
    same_numbers: bool = True


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that run inside, of c10d and of its functional ops, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # what DTensor then runs on the local tensors is counted
        name = func.__name__.split(".")[0].removesuffix("_out").replace("_", "")
        if func.namespace in ("c10d", "_c10d_functional") and name not in NOT_COLLECTIVE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def versions(size: Size, shard_floor: bool) -> Iterator[Version]:
    """Yield the versions, built from the same weights, for the same batch."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    weights, batch = draw_weights(size), draw_batch(size)
    shard, local = size.divided(processes), own_weights(weights, rank, processes)
    mesh = init_device_mesh("cpu", (processes,))
    idle = dict.fromkeys(WORKS, _nothing)
    yield Version(SINGLE, idle if rank else keras_steps(keras_gpt(size, weights), batch), alone=True)
    yield Version(PLANNED, keras_steps(planned_gpt(size, weights), batch))
    yield Version(REPLAYED, keras_steps(planned_gpt(size, weights), batch, jit_compile=True))
    yield Version(AUTOMATIC, keras_steps(planned_gpt(size, weights, of_libraries=True), batch, jit_compile="auto"))
    yield Version(FITTED, fit_steps(planned_gpt(size, weights, of_libraries=True), batch))
    for name, replayed in {ON_STREAM: False, ON_STREAM_REPLAYED: True}.items():
        on_stream = planned_gpt(size, weights, sequence_parallel=True)
        yield Version(name, keras_steps(on_stream, batch, jit_compile=replayed))
    yield Version(HANDWRITTEN, torch_steps(Gpt(shard, local, "communicating"), batch))
    yield Version(STOCK, torch_steps(parallelize_with_stock_styles(Gpt(size, weights), mesh), batch))
    yield Version(DTENSORS, torch_steps(make_all_dtensors(Gpt(size, weights), mesh), batch, implicit_replication))
    yield Version(SINGLE_TORCH, idle if rank else torch_steps(Gpt(size, weights), batch), alone=True)
    if shard_floor:
        yield Version(KERAS_SHARD, keras_steps(keras_gpt(shard, local), batch), same_numbers=False)
        yield Version(TORCH_SHARD, torch_steps(Gpt(shard, local, "silent"), batch), same_numbers=False)


def planned_gpt(
    size: Size, weights: Weights, sequence_parallel: bool = False, of_libraries: bool = False
) -> keras.Model:
    """Return the Keras GPT, parallelized over all processes."""
    processes = dist.get_world_size()
    devices = [f"cpu:{rank}" for rank in range(processes)]
    layout_map = keras.distribution.LayoutMap(keras.distribution.DeviceMesh((processes,), ("model",), devices))
    for pattern, axes in RULES.items():
        layout_map[pattern] = axes
    model = keras_gpt(size, weights, of_libraries=of_libraries)
    return tp_planner.parallelize(model, layout_map, sequence_parallel=sequence_parallel)


def keras_steps(model: keras.Model, batch: Batch, jit_compile: Any = False) -> Mapping[str, Step]:
    """Return the works of the Keras GPT, training as in Keras's guide to torch training loops."""
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(), loss_of, jit_compile=jit_compile)
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

    return {"step": step, **inference(lambda given: model(given, training=False), tokens)}


def fit_steps(model: keras.Model, batch: Batch) -> Mapping[str, Step]:
    """Return the works of the Keras GPT, training as ``fit`` does by Keras's default, with its mean loss."""
    works = keras_steps(model, batch, jit_compile="auto")
    data, numbers = tuple(map(torch.from_numpy, batch)), itertools.count()

    def step() -> torch.Tensor:
        if next(numbers) < CHECKED_STEPS:
            model.reset_metrics()  # so that the mean is this step's loss
        loss: torch.Tensor = model.train_step(data)["loss"]
        return loss

    return {**works, "step": step}


def torch_steps(
    model: Gpt, batch: Batch, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Mapping[str, Step]:
    """Return the works of the torch GPT; each runs inside ``context``."""
    optimizer = AdamW(list(model.parameters()))
    tokens, labels = (torch.from_numpy(array) for array in batch)
    targets = labels.long().flatten()

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def inside(work: Step) -> Step:
        def working() -> torch.Tensor:
            with context():
                return work()

        return working

    return {name: inside(work) for name, work in {"step": step, **inference(model, tokens)}.items()}


def inference(logits_of: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> Mapping[str, Step]:
    """Return the works that need no gradients."""
    sequence = tokens[:1]

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return logits_of(tokens)[-1, -1, -1]

    @torch.no_grad()
    def token() -> torch.Tensor:
        return logits_of(sequence)[:, -1].max(-1).values

    return {"forward": forward, "token": token}


def _nothing() -> torch.Tensor:
    return torch.tensor(0.0)


def require_equal_numbers(candidates: Sequence[Version]) -> None:
    """Run the first steps of every version; raise AssertionError if one's numbers are not the single device's."""
    numbers = {
        version.name: [_number(work()) for work in version.steps.values() for _ in range(CHECKED_STEPS)]
        for version in candidates
    }
    single = [numbers[SINGLE]]
    dist.broadcast_object_list(single, 0)
    for version in candidates:
        found, expected = numbers[version.name], single[0]
        if version.same_numbers and not version.alone and not np.allclose(found, expected, rtol=TOLERANCE, atol=0):
            raise AssertionError(
                f"{version.name}, rank {dist.get_rank()}: {CHECKED_STEPS} times each of {', '.join(WORKS)} gave "
                f"{found}, on a single device {expected}"
            )


def _number(result: torch.Tensor) -> float:
    return float(result.full_tensor() if isinstance(result, DTensor) else result)


def count_collectives(step: Step) -> Counter[str]:
    """Return how many collectives of each kind this rank runs in one step."""
    with CollectiveCounter() as counter:
        step()
        counts: Counter[str] = counter.counts
    return counts


def measure(steps: Sequence[Step], repeat: int) -> np.ndarray:
    """Return the times of each step in ms, those of the slower rank: of shape (2, steps, repeat), wall and processor.

    The steps take turns, each round beginning with another one; every step starts at a barrier.
    """
    times = np.zeros((2, len(steps), repeat))
    for round_number in range(repeat):
        for offset in range(len(steps)):
            turn = (round_number + offset) % len(steps)
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            steps[turn]()
            times[:, turn, round_number] = time.perf_counter() - start, time.process_time() - cpu_start
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, 1000 * times)
    slower: np.ndarray = np.max(everyone, axis=0)
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
    automatic.PATIENCE = 0  # else 100 calls of each work run as they are written before any is replayed
    dist.init_process_group("gloo")
    candidates = list(versions(size, options.shard_floor))
    require_equal_numbers(candidates)
    rows = []
    for work in WORKS:
        steps = [version.steps[work] for version in candidates]
        counts = [dict(count_collectives(step)) for step in steps]
        times, cpu = measure(steps, options.repeat).round(3).tolist()
        for version, count, times_ms, cpu_ms in zip(candidates, counts, times, cpu, strict=True):
            rows.append(
                {"work": work, "version": version.name, "collectives": count, "times_ms": times_ms, "cpu_ms": cpu_ms}
            )
    if dist.get_rank() == 0:
        options.result.write_text(json.dumps({**facts(size, options.repeat), "rows": rows}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
