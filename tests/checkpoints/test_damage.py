"""Damage of every kind, at random: nothing is loaded wrongly, each is a clear error, what is whole stays readable."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import torch

import tp_planner
from tests.checkpoints.files import WRITERS, tensors_of, write_all
from tests.checkpoints.test_formats import sharding
from tests.checkpoints.test_nothing_is_lost import X, Y, built, values
from tests.models import CASES
from tp_planner.checkpoints.formats.opening import open_weights
from tp_planner.checkpoints.reading import Reading
from tp_planner.checkpoints.shelf import checkpoints_in
from tp_planner.checkpoints.values import tensors_for, values_of
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.ir.errors import PlanError
from tp_planner.ir.placement import Replicate

FEW, MANY = 24, 200
Damage = Callable[[Path, random.Random], None]  # of a file, or of a folder of weights


class Shell:
    def __reduce__(self) -> Any:
        return (print, ("code of the file ran",))


def flip(file: Path, rng: random.Random, first: int = 0, last: int | None = None) -> None:
    """Flip a bit in a range of bytes."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(first, len(data) if last is None else last)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut(file: Path, rng: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


def pickled(file: Path, rng: random.Random) -> None:
    file.write_bytes(pickle.dumps([Shell() for _ in range(rng.randrange(1, 4))]))


def text(file: Path, rng: random.Random) -> None:
    file.write_bytes(rng.randbytes(rng.randrange(1, 5000)))


def of_files(*kinds: Callable[[Path, random.Random], None]) -> tuple[Damage, ...]:
    """Return damage that is done to one file of those in a folder."""

    def anywhere(kind: Callable[[Path, random.Random], None]) -> Damage:
        def damage(path: Path, rng: random.Random) -> None:
            files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
            kind(rng.choice(files), rng)

        return damage

    return tuple(map(anywhere, kinds))


# What each format has of its own


def _safetensors_header(file: Path, change: Callable[[Any], None]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def swapped_shape(file: Path, rng: random.Random) -> None:
    """Swap the sizes of a kernel: it has as many bytes as before."""

    def swap(header: Any) -> None:
        name = rng.choice([each for each in header if each.endswith("kernel")])
        header[name]["shape"].reverse()

    _safetensors_header(file, swap)


def moved(file: Path, rng: random.Random) -> None:
    """Let a tensor begin elsewhere, on the bytes of others."""

    def move(header: Any) -> None:
        name = rng.choice([each for each in header if each.endswith("bias")])
        by = 4 * rng.choice([-1, 1]) * rng.randrange(1, 8)
        header[name]["data_offsets"] = [each + by for each in header[name]["data_offsets"]]

    _safetensors_header(file, move)


def upwards(index: str) -> Damage:
    def damage(path: Path, rng: random.Random) -> None:
        """Let an index name a file outside of its folder."""
        file = path / index if path.is_dir() else path
        found = json.loads(file.read_text())
        name = rng.choice(sorted(found["weight_map"]))
        found["weight_map"][name] = rng.choice(["../", "/etc/", "a/../../"]) + rng.choice(["passwd", "w.safetensors"])
        file.write_text(json.dumps(found))

    return damage


def bomb(file: Path, rng: random.Random) -> None:
    """Let a .keras file hold zeros by the gibibyte, in a few bytes."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, bytes(rng.randrange(2**24, 2**26)) if name.endswith("h5") else data)


def inflated(file: Path, rng: random.Random) -> None:
    """Let a dataset be of a tebibyte of zeros, in a few bytes."""
    with h5py.File(file, "a") as opened:
        del opened["layers/dense/vars/0"]
        size = 2**20 * rng.randrange(1, 5)
        opened["layers/dense/vars"].create_dataset("0", (size, 2**18), "f4", chunks=(64, 64), compression="gzip")


def elsewhere(file: Path, rng: random.Random) -> None:
    """Let the values of a dataset lie in another file."""
    with h5py.File(file, "a") as opened:
        shape = opened["layers/dense/vars/1"].shape
        del opened["layers/dense/vars/1"]
        external = [(rng.choice(["/etc/passwd", "../../w"]), 0, h5py.h5f.UNLIMITED)]
        opened["layers/dense/vars"].create_dataset("1", shape, "f4", external=external)


def swapped_dataset(file: Path, rng: random.Random) -> None:
    with h5py.File(file, "a") as opened:
        name = rng.choice([each for each in ("layers/dense/vars/0", "layers/dense_1/vars/0") if each in opened])
        array = opened[name][()]
        del opened[name]
        opened[name] = array.T


def among_what_is_no_value(path: Path, rng: random.Random) -> None:
    """Flip a bit that belongs to no tensor's values: these formats keep no checksums of those."""
    taken: dict[Path, list[tuple[int, int]]] = {}
    with open_weights(path) as weights:
        for tensor in weights.tensors.values():
            for chunk in tensor.chunks:
                extent: Any = getattr(chunk.stored, "_extent", chunk.stored)
                taken.setdefault(extent.file.path, []).append((extent.offset, extent.offset + extent.size))
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    file = rng.choice(files)
    spans = taken.get(file, [])
    free = [n for n in range(file.stat().st_size) if not any(begin <= n < end for begin, end in spans)]
    place = rng.choice(free)
    flip(file, rng, place, place + 1)


WHOLE = sharding(Replicate(), Replicate(), (1, 1), (0, 0))
ANY = (*of_files(cut, pickled, text), among_what_is_no_value)
DAMAGE: dict[str, tuple[Damage, ...]] = {
    "h5": (*ANY, inflated, elsewhere, swapped_dataset),
    "keras": (*ANY, bomb),
    "keras in parts": (*ANY, upwards("")),
    "safetensors": (*ANY, swapped_shape, moved),
    "safetensors in parts": (*ANY, upwards("model.safetensors.index.json")),
    "torch": ANY,
}


def copied(source: Path, folder: Path, name: str) -> Path:
    """Return a copy of what a writer wrote in a new folder, with the files that it names."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    return folder / name


def loaded(model: keras.Model, path: Path) -> dict[str, np.ndarray]:
    """Return what each variable of a model would be given."""
    found = {}
    with tensors_for(model, path, None) as tensors:
        value_of = values_of(tensors, Reading(), torch.device("cpu"))
        for key, variable in named_variables(model).items():
            found[key] = value_of(variable, WHOLE).numpy()
    return found


def wreck(times: int, folder: Path) -> dict[str, int]:
    """Damage files of weights; return how often they were refused, and how often what was asked for was as before."""
    model, rng, counts = CASES["mlp"].build("float32"), random.Random(0), {"refused": 0, "unharmed": 0}
    (folder / "whole").mkdir()
    write_all(model, folder / "whole")
    expected = {key: each.numpy() for key, each in tensors_of(model).items()}
    ways = [(kind, damage) for kind, ways in DAMAGE.items() for damage in ways]
    for number in range(times):
        kind, damage = ways[number % len(ways)]
        path = copied(folder / "whole", folder / "damaged", WRITERS[kind][0])
        damage(path, rng)
        problem = ""
        try:
            found = loaded(model, path)
        except PlanError as error:
            problem = str(error)
        if problem:
            assert str(folder / "damaged") in problem
        else:
            np.testing.assert_equal(found, expected, err_msg=f"{kind}, {damage}, {number}")
        counts["refused" if problem else "unharmed"] += 1
    return counts


def wreck_checkpoints(times: int, folder: Path) -> dict[str, int]:
    """Damage the newest of two checkpoints; return how often it was passed over."""
    model, rng, counts = built(), random.Random(0), {"passed over": 0, "unharmed": 0}
    saved = {}
    for step in (1, 2):
        model.train_on_batch(X, Y)
        tp_planner.save_checkpoint(model, folder / "whole")
        saved[step] = values(model)
    ways = of_files(flip, cut, pickled, text, lambda file, rng: file.unlink())
    for number in range(times):
        shutil.rmtree(folder / "damaged", ignore_errors=True)
        shutil.copytree(folder / "whole", folder / "damaged")
        ways[number % len(ways)](checkpoints_in(folder / "damaged")[0], rng)
        step = tp_planner.load_checkpoint(model, folder / "damaged").step
        np.testing.assert_equal(values(model), saved[step])
        counts["passed over" if step == 1 else "unharmed"] += 1
    return counts


def test_damaged_files(tmp_path: Path, capfd: Any) -> None:
    """Of files of weights what is damaged is refused, by name, unless what is asked for is as it was; no code runs."""
    assert wreck(FEW, tmp_path)["refused"] > FEW // 2
    assert "code of the file ran" not in capfd.readouterr().out


def test_damaged_checkpoints(tmp_path: Path) -> None:
    """A checkpoint has hashes of all its files: what is damaged is passed over, and the one before is loaded."""
    assert wreck_checkpoints(5, tmp_path) == {"passed over": 5, "unharmed": 0}


@pytest.mark.slow
def test_200_damaged_files(tmp_path: Path, record_property: Any, capfd: Any) -> None:
    counts = wreck(MANY, tmp_path)
    assert "code of the file ran" not in capfd.readouterr().out
    record_property("counted", f"{MANY} damaged files of weights: {counts}, none loaded wrongly")


@pytest.mark.slow
def test_200_damaged_checkpoints(tmp_path: Path, record_property: Any) -> None:
    counts = wreck_checkpoints(MANY, tmp_path)
    assert counts["passed over"] == MANY
    record_property("counted", f"{MANY} damaged checkpoints: {counts}, the one before was loaded each time")
