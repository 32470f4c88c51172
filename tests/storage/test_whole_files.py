"""The last good file survives: whatever stops a writer, no half file bears the final name."""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import tp_planner
from tests.workers import Pools, layout_map
from tp_planner.files import write_text, written_aside
from tp_planner.patches import wrapped

RULES = {"up/kernel": (None, "model"), "down/kernel": ("model", None)}
WRITES: dict[str, Callable[[keras.Model, str], Any]] = {
    "model.keras": lambda model, path: model.save(path),
    "model.h5": lambda model, path: model.save(path),
    "model.weights.h5": lambda model, path: model.save_weights(path),
    "model.weights.json": lambda model, path: model.save_weights(path, max_shard_size=2e-6),
    "function.keras": lambda model, path: keras.saving.save_model(model, path),
}


def pair() -> keras.Model:
    x = keras.Input((8,))
    up = keras.layers.Dense(32, name="up")(x)
    return keras.Model(x, keras.layers.Dense(8, name="down")(up), name="pair")


def failing(number: int, act: Callable[[], Any]) -> Callable[[Any], Any]:
    """Return what wraps h5py's creation of data sets: ``act`` comes before that of this number."""

    def wrapper(plain: Callable[..., Any]) -> Callable[..., Any]:
        left = [number]

        @functools.wraps(plain)
        def create_dataset(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                act()
            return plain(*args, **kwargs)

        return create_dataset

    return wrapper


def disk_is_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# On the ranks


def write(folder: str, name: str) -> list[str]:
    """Write, fail to write, and write again; return what is wrong with the files, which all ranks see."""
    model, path = tp_planner.parallelize(pair(), layout_map(RULES)), f"{folder}/{name}"
    WRITES[name](model, path)
    before, wrong = contents(folder), []
    assert before
    for variable in model.variables:
        variable.assign(np.ones(variable.shape, "float32"))
    for number in (1, 3):
        with (
            wrapped(h5py.Group, "create_dataset", failing(number, disk_is_full), "a disk is full"),
            pytest.raises((OSError, tp_planner.ParallelRuntimeError)),
        ):
            WRITES[name](model, path)
        if contents(folder) != before:
            wrong.append(f"after {number}: {sorted(contents(folder))}")
    WRITES[name](model, path)
    if set(contents(folder)) != wanted(folder, before):
        wrong.append(f"after all: {sorted(contents(folder))}")
    read = pair()
    read.load_weights(path)
    if not all((array == 1).all() for array in read.get_weights()):
        wrong.append("the last weights are not there")
    return wrong


def contents(folder: str) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in Path(folder).iterdir()}


def wanted(folder: str, before: dict[str, bytes]) -> set[str]:
    """Return which files should lie there when what was written before is written again."""
    index = Path(folder, "model.weights.json")
    if not index.exists():
        return set(before)
    # Keras opens the first of its own names too.
    shards = keras.tree.flatten(json.loads(index.read_text())["weight_map"])
    return {index.name, *shards, "model_00000.weights.h5"}


def kill_while_writing(folder: str) -> None:
    """Write all files once, and be killed while writing one of them anew, as the first argument says."""
    model = tp_planner.parallelize(pair(), layout_map(RULES))
    for name, each in WRITES.items():
        each(model, f"{folder}/{name}")
    print(json.dumps({name: content.hex() for name, content in contents(folder).items()}), flush=True)
    for name, each in WRITES.items():
        if os.fork() == 0:
            for variable in model.variables:
                variable.assign(np.ones(variable.shape, "float32"))
            act = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
            with wrapped(h5py.Group, "create_dataset", failing(3, act), "a process is killed"):
                each(model, f"{folder}/{name}")
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL


def kill_at_random_moments(folder: str, times: int) -> None:
    """Kill a process that writes all files again and again; each is one of those that it wrote, and none is older."""
    model, rng, number = tp_planner.parallelize(pair(), layout_map(RULES)), random.Random(0), 0.0
    for name, each in WRITES.items():
        assign(model, number)
        each(model, f"{folder}/{name}")
    before = dict.fromkeys(WRITES, number)
    for _ in range(times):
        if (writer := os.fork()) == 0:
            while True:
                number += 1
                assign(model, number)
                for name, each in WRITES.items():
                    each(model, f"{folder}/{name}")
        time.sleep(rng.uniform(0.02, 0.3))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        found = {name: read_back(f"{folder}/{name}") for name in WRITES}
        assert all(found[name] >= before[name] for name in WRITES), (before, found)
        before, number = found, max(found.values())
        for hidden in Path(folder).glob(".*"):
            shutil.rmtree(hidden)


def assign(model: keras.Model, value: float) -> None:
    for variable in model.variables:
        variable.assign(np.full(variable.shape, value, "float32"))


def read_back(path: str) -> float:
    """Return the one value that all weights in a file have."""
    model = pair()
    model.load_weights(path)
    (value,) = {float(each) for array in model.get_weights() for each in array.ravel()}
    return value


# In the parent


@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_leaves_the_file_before(pools: Pools, name: str, tmp_path: Path) -> None:
    assert pools(2).run(write, str(tmp_path), name) == [[], []]


def test_a_killed_writer_leaves_the_files_before(tmp_path: Path) -> None:
    code = (
        "import torch.distributed as dist; from tests.storage.test_whole_files import kill_while_writing; "
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1); "
        f"kill_while_writing({str(tmp_path)!r})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    hidden = [each for each in tmp_path.iterdir() if each.name.startswith(".")]
    assert all(each.is_dir() for each in hidden)
    assert len(hidden) == len(WRITES)
    before = {name: bytes.fromhex(content) for name, content in json.loads(run.stdout).items()}
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir() if each not in hidden} == before


@pytest.mark.slow
def test_writers_killed_at_random_moments(tmp_path: Path, record_property: Any) -> None:
    """Whenever a writer is killed, every file is whole."""
    times = 200
    code = (
        "import torch.distributed as dist; from tests.storage.test_whole_files import kill_at_random_moments; "
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1); "
        f"kill_at_random_moments({str(tmp_path)!r}, {times})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr
    record_property("counted", f"{times} writers of Keras's files killed at random moments: every file whole each time")


def _write_half(path: Path) -> None:
    path.write_text("half")
    disk_is_full()


def test_what_fails_changes_nothing(tmp_path: Path) -> None:
    """Neither the file, nor one that a link points to, nor its mode; and a folder has nothing else in it afterwards."""
    file, link = tmp_path / "plan.json", tmp_path / "link.json"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    with pytest.raises(OSError, match="No space left"), written_aside(link) as aside:
        _write_half(aside)
    assert file.read_text() == "old"
    write_text(link, "new")
    assert (file.read_text(), file.stat().st_mode & 0o777, link.is_symlink()) == ("new", 0o640, True)
    assert {each.name for each in tmp_path.iterdir()} == {"plan.json", "link.json"}
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "nowhere" / "plan.json", "new")
