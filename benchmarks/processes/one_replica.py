"""One of the processes that replicas.py starts: measures a mesh of replicas, as a torchrun worker would.

Prints nothing; rank 0 writes the raw times to a JSON file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import torch
import torch.distributed as dist
from models.gpt import RULES, SIZES, Size, draw_batch, draw_weights, keras_gpt
from peers.fully_sharded import fully_sharded
from peers.handwritten import Gpt
from processes.measure import TOLERANCE, Batch, Version, count_collectives, facts, keras_steps, measure, torch_steps
from showing.replicas import AUTOMATIC, FULLY_SHARDED, PLANNED, REPLAYED
from torch.distributed.device_mesh import init_device_mesh

import tp_planner
from tp_planner.replay import automatic

CHECKED_STEPS = 3


def _in_parts(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """Return the axes of a weight that is stored in parts over the batch axis too, where a dim is free for that."""
    if None not in axes:
        return axes
    free = axes.index(None)
    return (*axes[:free], "batch", *axes[free + 1 :])


# All weights are but the biases that the model axis cuts; FSDP's are, too.
IN_PARTS: dict[str, tuple[str | None, ...]] = {
    **{pattern: _in_parts(axes) for pattern, axes in RULES.items()},
    ".*embeddings": ("batch", None),
    ".*(gamma|beta)": ("batch",),
    "head/kernel": ("batch", None),
    "(block_[0-9]+_down|block_[0-9]+_attention/attention_output|head)/bias": ("batch",),
}


def versions(size: Size, shape: tuple[int, int]) -> Iterator[Version]:
    """Yield the versions, built from the same weights, each replica for its share of the same batch."""
    weights, names = draw_weights(size), ("batch", "model")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    devices = [f"cpu:{rank}" for rank in range(dist.get_world_size())]

    layout_map = keras.distribution.LayoutMap(keras.distribution.DeviceMesh(shape, names, devices))
    for pattern, axes in IN_PARTS.items():
        layout_map[pattern] = axes

    def planned(of_libraries: bool = False) -> keras.Model:
        model = keras_gpt(size, weights, nested=True, of_libraries=of_libraries)
        return tp_planner.parallelize(model, layout_map, batch_axis="batch")

    replica = dist.get_rank() // shape[1]
    batch: Batch = tuple(np.split(each, shape[0])[replica] for each in draw_batch(size))  # type: ignore[assignment]
    yield Version(PLANNED, keras_steps(planned(), batch))
    yield Version(REPLAYED, keras_steps(planned(), batch, jit_compile=True))
    yield Version(AUTOMATIC, keras_steps(planned(of_libraries=True), batch, jit_compile="auto"))
    yield Version(FULLY_SHARDED, torch_steps(fully_sharded(Gpt(size, weights), mesh), batch))


def require_equal_losses(candidates: list[Version]) -> None:
    """Run the first steps of every version; raise AssertionError if the mean losses differ."""
    losses = []
    for version in candidates:
        found = torch.stack([version.steps["step"]().float() for _ in range(CHECKED_STEPS)])
        dist.all_reduce(found)
        losses.append(found / dist.get_world_size())
    for version, found in zip(candidates, losses, strict=True):
        if not torch.allclose(found, losses[-1], rtol=TOLERANCE, atol=0):
            raise AssertionError(f"{version.name} has losses {found.tolist()}, torch alone {losses[-1].tolist()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--model", type=int, required=True)
    parser.add_argument("--repeat", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args()
    size = SIZES[options.size]

    torch.set_num_threads(1)
    automatic.PATIENCE = 0  # else 100 calls run as they are written before any is replayed
    dist.init_process_group("gloo")
    candidates = list(versions(size, (options.batch, options.model)))
    require_equal_losses(candidates)
    steps = [version.steps["step"] for version in candidates]
    counts = [dict(count_collectives(step)) for step in steps]
    times, cpu = measure(steps, options.repeat).round(3).tolist()
    rows = [
        {"version": version.name, "collectives": count, "times_ms": times_ms, "cpu_ms": cpu_ms}
        for version, count, times_ms, cpu_ms in zip(candidates, counts, times, cpu, strict=True)
    ]
    if dist.get_rank() == 0:
        mesh = {"batch": options.batch, "model": options.model}
        options.result.write_text(json.dumps({**facts(size, options.repeat), "mesh": mesh, "rows": rows}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
