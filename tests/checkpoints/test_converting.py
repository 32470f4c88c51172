"""Weights go from format to format as they are, and what is inside is listed without loading it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from typer.testing import CliRunner

import tp_planner
from tests.checkpoints.files import tensors_of
from tests.models import CASES
from tp_planner.cli import app
from tp_planner.patches import wrapped


def small() -> keras.Model:
    return CASES["mlp"].build("float32", seed=1)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_round_trip(tmp_path: Path) -> None:
    """From Keras's file to safetensors, to torch's folder, and back, all is bit for bit as it was, also for Keras."""
    model, other = small(), CASES["mlp"].build("float32", seed=2)
    steps = ["first.weights.h5", "second.safetensors", "third", "fourth.safetensors", "fifth.weights.h5"]
    paths = [str(tmp_path / name) for name in steps]
    model.save_weights(paths[0])
    file = tmp_path / "model.keras"
    model.save(file)
    for source, destination in itertools.pairwise(paths):
        run("convert", source, destination, "--model", str(file))
    other.load_weights(paths[-1])
    np.testing.assert_equal(
        {key: each.numpy() for key, each in tensors_of(other).items()},
        {key: each.numpy() for key, each in tensors_of(model).items()},
    )
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([*steps, "model.keras"])


@pytest.mark.parametrize(
    ("destination", "expected"),
    [
        ("there.safetensors", "exists already; remove it first, or give another name"),
        ("new.txt", "cannot be written; give a name that ends in .safetensors or .weights.h5, or a folder's"),
    ],
)
def test_refusals(destination: str, expected: str, tmp_path: Path) -> None:
    """Nothing is overwritten, and a format that cannot be written is named."""
    tp_planner.save_checkpoint(small(), tmp_path / "checkpoints")
    (tmp_path / "there.safetensors").write_text("kept")
    source = str(next((tmp_path / "checkpoints").glob("0*")))
    result = CliRunner().invoke(app, ["convert", source, str(tmp_path / destination)])
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path / destination}: {expected}\n"
    assert (tmp_path / "there.safetensors").read_text() == "kept"


@pytest.mark.parametrize("destination", ["new.safetensors", "new.weights.h5", "new"])
def test_names_are_given_to_what_is_on_the_disk(destination: str, tmp_path: Path) -> None:
    """What is converted, or checkpointed, is synced, then named; then the folder that has the name is synced."""
    events: list[tuple[str, int]] = []

    def synced(plain: Any) -> Any:
        return lambda file: (events.append(("synced", os.fstat(file).st_ino)), plain(file))

    def named(plain: Any) -> Any:
        return lambda old, new: (events.append(("named", os.stat(old).st_ino)), plain(old, new))

    why, file = "it is noted", tmp_path / "model.keras"
    small().save(file)
    with wrapped(os, "fsync", synced, why), wrapped(os, "rename", named, why), wrapped(os, "replace", named, why):
        path = tp_planner.save_checkpoint(small(), tmp_path / "checkpoints")
        run("convert", str(path), str(tmp_path / destination), "--model", str(file))
    for place in (path, tmp_path / destination):
        name = events.index(("named", place.stat().st_ino))
        for each in (place, *place.rglob("*")):
            assert ("synced", each.stat().st_ino) in events[:name], each
        assert ("synced", place.parent.stat().st_ino) in events[name:]


def test_show(tmp_path: Path) -> None:
    """Of a folder of checkpoints each is named, and the newest complete one listed."""
    model = small()
    tp_planner.save_checkpoint(model, tmp_path, epoch=2)
    tp_planner.save_checkpoint(model, tmp_path, epoch=3, batch=5)
    (tmp_path / "000002-step-0" / "manifest.json").unlink()
    lines = run("checkpoint", "show", str(tmp_path)).splitlines()
    assert lines == [
        "000001-step-0  complete",
        "000002-step-0  incomplete",
        "000001-step-0: step 0, epoch 2, batch 0",
        "model mlp, float32, optimizer none",
        "written by one process",
        "  model/down/bias  (32,)  float32  128 bytes",
        "  model/down/kernel  (64, 32)  float32  8192 bytes",
        "  model/head/bias  (8,)  float32  32 bytes",
        "  model/head/kernel  (32, 8)  float32  1024 bytes",
        "  model/up/bias  (64,)  float32  256 bytes",
        "  model/up/kernel  (16, 64)  float32  4096 bytes",
        "6 tensors, 13728 bytes",
    ]
