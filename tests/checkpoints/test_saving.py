"""Checkpoints in shards: written on one mesh, read on another, by plain torch too; a damaged one is passed over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import tp_planner
from tests.models import CASES
from tests.workers import WorkerPool
from tp_planner.checkpoints.contents import contents_of
from tp_planner.storage.variables import whole_tensor

Arrays = dict[str, np.ndarray]
# The layouts, by name: rules, and the mesh (replicas, ranks of the model axis) on a number of processes.
GPT = CASES["gpt"].rules
UNEVEN = {"head/kernel": (None, "model"), "block_\\d_up/kernel": ("model", None)}
PARTS = {"token_embedding/embeddings": ("batch", "model"), "block_\\d_(up|down)/kernel": ("model", "batch")}


def mesh_map(rules: Any, replicas: int, zero: int = 0) -> keras.distribution.LayoutMap:
    size = dist.get_world_size()
    devices = [f"cpu:{rank}" for rank in range(size)]
    mesh = keras.distribution.DeviceMesh((replicas, size // replicas), ("batch", "model"), devices)
    layouts = keras.distribution.LayoutMap(mesh)
    for pattern, axes in rules.items():
        layouts[pattern] = axes
    layouts.zero = zero
    return layouts


def compiled(seed: int) -> tuple[keras.Model, Any, Any]:
    case = CASES["gpt"]
    keras.utils.set_random_seed(seed)
    model = case.build("float64", vocabulary=50, seed=seed)
    x, y = case.batch(np.random.default_rng(0), 4)
    x, y = x % 50, y % 50
    model.compile(keras.optimizers.AdamW(0.01, name=f"adamw_{seed}"), case.make_loss("float64"))
    return model, x, y


def whole(model: keras.Model) -> Arrays:
    return {name: whole_tensor(variable).numpy().copy() for name, variable in contents_of(model).items()}


def share(rows: Any, replicas: int) -> Any:
    """Return the rows of this rank's replica."""
    each = len(rows) // replicas
    place = dist.get_rank() // (dist.get_world_size() // replicas)
    return rows[place * each : (place + 1) * each]


# On the ranks


def write(folder: str, rules: Any, replicas: int) -> tuple[Arrays, list[float], Any]:
    """Train, save, and train on; return what was saved, and the losses after that."""
    model, x, y = compiled(1)
    tp_planner.parallelize(model, mesh_map(rules, replicas), batch_axis="batch" if replicas > 1 else None)
    x, y = share(x, replicas), share(y, replicas)
    for _ in range(2):
        model.train_on_batch(x, y)
    path = tp_planner.save_checkpoint(model, folder, epoch=3, batch=1)
    saved = whole(model)
    return saved, [float(model.train_on_batch(x, y)) for _ in range(2)], path.name


def read(folder: str, rules: Any, replicas: int) -> tuple[Arrays, list[float], Any]:
    """Load into a model with other values; return what it holds, and the losses of the steps after that."""
    model, x, y = compiled(2)
    tp_planner.parallelize(model, mesh_map(rules, replicas), batch_axis="batch" if replicas > 1 else None)
    progress = tp_planner.load_checkpoint(model, folder)
    loaded = whole(model)
    x, y = share(x, replicas), share(y, replicas)
    losses = [float(model.train_on_batch(x, y)) for _ in range(2)]
    return loaded, losses, (progress.step, progress.epoch, progress.batch)


def read_each(folder: str, layouts: dict[str, tuple[Any, int]]) -> dict[str, Any]:
    return {name: read(folder, *layout) for name, layout in layouts.items()}


def write_each(folder: str, layouts: dict[str, tuple[Any, int]]) -> dict[str, Any]:
    return {name: write(f"{folder}/{name}", *layout) for name, layout in layouts.items()}


# In the test's process

LAYOUTS = {
    2: {"tp": (GPT, 1), "uneven": (UNEVEN, 1)},
    4: {"tp": (GPT, 1), "2x2": (GPT, 2), "parts": (PARTS, 2)},
}
FARTHEST = {2: {"uneven": (UNEVEN, 1)}, 4: {"parts": (PARTS, 2)}}


@pytest.mark.parametrize("layouts", [FARTHEST, pytest.param(LAYOUTS, marks=pytest.mark.slow)], ids=["two", "all"])
def test_checkpoints_are_read_on_any_mesh(pools: Any, tmp_path: Path, layouts: Mapping[int, Any]) -> None:
    """What 4 processes wrote 2 read and the other way round, bit for bit; the next step's loss is the same."""
    shapes = {
        name: answer for size in (2, 4) for name, answer in _written(pools(size), tmp_path, f"of{size}", layouts[size])
    }
    for path, (saved, losses, _) in shapes.items():
        for size in (2, 4):
            for answers in pools(size).run(read_each, path, layouts[size])[:1]:
                for loaded, after, progress in answers.values():
                    np.testing.assert_equal(loaded, saved)
                    assert progress == (2, 3, 1)
                    np.testing.assert_allclose(after, losses, rtol=1e-6)  # Keras tracks losses in float32
        state = {name: torch.empty(value.shape, dtype=torch.from_numpy(value).dtype) for name, value in saved.items()}
        dcp.load(state, checkpoint_id=next(Path(path).glob("0*")), no_dist=True)
        np.testing.assert_equal({name: value.numpy() for name, value in state.items()}, saved)


def _written(pool: WorkerPool, folder: Path, name: str, layouts: Any) -> list[tuple[str, Any]]:
    answers = pool.run(write_each, str(folder / name), layouts)[0]
    return [(str(folder / name / layout), answer) for layout, answer in answers.items()]
