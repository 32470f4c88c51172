"""Files of weights: any part of any format is read as it is in the whole; damaged and hostile files are refused."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata

from tests.checkpoints.files import WRITERS, save_dcp, save_safetensors_in_two, tensors_of, write_all
from tests.models import CASES
from tp_planner.checkpoints.formats import stored
from tp_planner.checkpoints.formats.opening import open_weights
from tp_planner.ir.errors import PlanError
from tp_planner.ir.placement import Replicate, Shard
from tp_planner.job.axes import Axes, Axis
from tp_planner.storage.sharding import Sharding


def sharding(placement: Any, batch_placement: Any, sizes: tuple[int, int], places: tuple[int, int]) -> Sharding:
    mesh: Any = None
    model, batch = (Axis(mesh, name, size, rank) for name, size, rank in zip("mb", sizes, places, strict=True))
    return Sharding(Axes(mesh, model, batch), placement, batch_placement)


PLACEMENTS = st.sampled_from([Replicate(), Shard(0), Shard(1), Shard(2)])


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(0, 7)] * 3), PLACEMENTS, PLACEMENTS, st.tuples(*[st.integers(1, 4)] * 2), st.data())
def test_pieces_are_what_a_rank_stores(
    shape: Any, placement: Any, batch: Any, sizes: tuple[int, int], data: Any
) -> None:
    """Copied piece by piece, a part is what ``own`` cuts from the whole, of equal and unequal shards."""
    places = tuple(data.draw(st.integers(0, size - 1)) for size in sizes)
    own = sharding(placement, batch, sizes, places)
    whole = torch.arange(int(np.prod(shape))).reshape(shape)
    part = torch.full(own.local_shape(shape), -1)
    for piece in own.pieces(shape):
        part[tuple(slice(*span) for span in piece.of_part)] = whole[tuple(slice(*span) for span in piece.of_whole)]
    assert torch.equal(part, own.own(whole))


def tensors() -> dict[str, torch.Tensor]:
    """Return tensors of many shapes and dtypes."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (12, 10), "vector": (9,), "scalar": (), "cube": (4, 6, 5), "empty": (0, 3)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    found |= {"half": found["matrix"].to(torch.bfloat16), "integers": torch.arange(24).reshape(4, 6)}
    return found


def save_hdf5(values: dict[str, torch.Tensor], path: Path) -> None:
    """Write datasets in one piece, in chunks, compressed, and big-endian."""
    with h5py.File(path, "w") as file:
        for name, value in values.items():
            if value.dtype == torch.bfloat16:
                file.create_dataset(name, data=value.view(torch.int16).numpy().view("V2")).attrs["dtype"] = "bfloat16"
            elif name != "cube":
                file[name] = value.numpy()
        file.create_dataset("cube", data=values["cube"].numpy(), chunks=(2, 2, 2), compression="gzip")
        del file["matrix"]
        file["matrix"] = values["matrix"].numpy().astype(">f4")


SAVE: dict[str, tuple[str, Callable[..., None]]] = {
    "h5": ("w.weights.h5", save_hdf5),
    "safetensors in parts": ("safe", save_safetensors_in_two),
    "torch": ("dcp", save_dcp),
}


@pytest.mark.parametrize("kind", SAVE)
@pytest.mark.parametrize(("largest", "shortest"), [(64, 8), (64, 1000), (2**26, 2**18)])
def test_every_part_is_read(
    kind: str, largest: int, shortest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the part, and however it is cut into reads, it is that of the whole; no read is larger than allowed."""
    monkeypatch.setattr(stored, "LARGEST_READ", largest)
    monkeypatch.setattr(stored, "SHORTEST_RUN", shortest)
    values, (name, save) = tensors(), SAVE[kind]
    save(values, tmp_path / name)
    rng, reads = np.random.default_rng(0), []
    with open_weights(tmp_path / name) as weights:
        plain = stored.Extent.read
        monkeypatch.setattr(
            stored.Extent,
            "read",
            lambda self, a, b: (reads.append((b - a) * self.dtype.itemsize), plain(self, a, b))[1],
        )
        for key, value in values.items():
            assert weights.tensors[key].shape == tuple(value.shape)
            for _ in range(8):
                spans = [sorted(rng.integers(0, size + 1, 2).tolist()) for size in value.shape]
                expected = value[tuple(slice(*span) for span in spans)]
                part = torch.full(expected.shape, -7, dtype=value.dtype)
                weights.tensors[key].read(spans, part)
                assert torch.equal(part, expected)
    assert max(reads) <= largest


def test_files_of_one_folder_are_read_into_the_same_memory(tmp_path: Path) -> None:
    """However many there are, one read's bytes are held at a time."""
    save_safetensors_in_two(tensors(), tmp_path / "safe")
    with open_weights(tmp_path / "safe") as weights:
        chunks: Any = [weights.tensors[name].chunks[0].stored for name in ("matrix", "integers")]
        assert len({str(each.file.path) for each in chunks}) == 2
        assert len({each.read(0, 2).data_ptr() for each in chunks}) == 1


class Shell:
    def __reduce__(self) -> Any:
        return (print, ("code of the file ran",))


def _rewrite(path: Path, change: Callable[[bytearray], Any]) -> None:
    data = bytearray(path.read_bytes())
    changed = change(data)
    path.write_bytes(data if changed is None else changed)


def _header(path: Path, change: Callable[[Any], None]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _index(path: Path, name: str) -> None:
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    path.write_text(json.dumps(index))


def _external(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["layers/dense/vars/0"]
        file["layers/dense/vars"].create_dataset("0", (4, 3), "f4", external=[("/etc/passwd", 0, 48)])


def _compressed(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


# What is done to a file, by the format, and how the error about it begins after its path.
HARM: dict[str, tuple[str, str, Callable[[Path], None], str]] = {
    "cut in data": ("safetensors", "", lambda p: _rewrite(p, lambda d: d[:-3]), "tensor "),
    "cut in header": ("safetensors", "", lambda p: _rewrite(p, lambda d: d[:40]), "no safetensors file"),
    "empty": ("safetensors", "", lambda p: p.write_bytes(b"") and None, "no safetensors file"),
    "endless header": ("safetensors", "", lambda p: _rewrite(p, lambda d: b"\xff" * 8 + d[8:]), "no safetensors file"),
    "shorter header": (
        "safetensors",
        "",
        lambda p: _rewrite(p, lambda d: bytes([d[0] - 9]) + d[1:]),
        "its header",
    ),
    "swapped shape": (
        "safetensors",
        "",
        lambda p: _header(p, lambda h: h["up/kernel"].update(shape=[1, 1])),
        "tensor 'up/kernel' of shape (1, 1) takes 4 bytes",
    ),
    "offset before": (
        "safetensors",
        "",
        lambda p: _header(p, lambda h: h["up/bias"].update(data_offsets=[-256, 0])),
        "tensor 'up/bias' begins before",
    ),
    "path of an index": (
        "safetensors in parts",
        "model.safetensors.index.json",
        lambda p: _index(p, "../w.safetensors"),
        "the index names '../w.safetensors', which is no file of this folder",
    ),
    "missing file": (
        "safetensors in parts",
        "model.safetensors.index.json",
        lambda p: _index(p, "c.safetensors"),
        "the index names 'c.safetensors', which is missing",
    ),
    "cut h5": ("h5", "", lambda p: _rewrite(p, lambda d: d[: len(d) // 2]), "no HDF5 file, or a damaged one"),
    "h5 that is text": ("h5", "", lambda p: p.write_bytes(b"text" * 1000) and None, "no HDF5 file, or a damaged one"),
    "values of another file": ("h5", "", _external, "the values of 'layers/dense/vars/0' lie in another file"),
    "compressed": ("keras", "", _compressed, "its model.weights.h5 is compressed"),
    "cut keras": ("keras", "", lambda p: _rewrite(p, lambda d: d[:-30]), "no .keras file, or one that is cut off"),
    "pickle": (
        "torch",
        ".metadata",
        lambda p: p.write_bytes(pickle.dumps(Shell())) and None,
        "cannot be read: it asks for builtins.print",
    ),
    "cut index": ("torch", ".metadata", lambda p: _rewrite(p, lambda d: d[:-9]), "cannot be read"),
    "cut data of torch": ("torch", "__0_0.distcp", lambda p: _rewrite(p, lambda d: d[:-200]), ""),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return all files of every format, by their paths."""
    folder = tmp_path_factory.mktemp("written")
    write_all(CASES["mlp"].build("float32"), folder)
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def read_all(path: Path) -> int:
    """Read every tensor of a file; return how many there are."""
    with open_weights(path) as weights:
        for tensor in weights.tensors.values():
            tensor.read([(0, size) for size in tensor.shape], torch.empty(tensor.shape, dtype=tensor.dtype))
        return len(weights.tensors)


@pytest.mark.parametrize("harm", HARM)
def test_damaged_files_are_refused(harm: str, written: dict[str, bytes], tmp_path: Path, capfd: Any) -> None:
    """Each kind of damage is an error that names the file, and nothing in it runs."""
    for name, data in written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    kind, inside, do, expected = HARM[harm]
    path = tmp_path / WRITERS[kind][0]
    do(path / inside if inside else path)
    with pytest.raises(PlanError) as refusal:
        read_all(path)
    assert str(refusal.value).startswith(str(tmp_path))
    assert f": {expected}" in str(refusal.value)
    assert "code of the file ran" not in capfd.readouterr().out


def test_undamaged_files_are_read(written: dict[str, bytes], tmp_path: Path) -> None:
    """The files of the test above are whole before they are damaged."""
    model = CASES["mlp"].build("float32")
    for path in write_all(model, tmp_path).values():
        assert read_all(Path(path)) >= len(tensors_of(model))


class Attribute:
    """What is pickled as an attribute of something else, by its name."""

    def __init__(self, of: Any, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.of, self.name)


def test_indices_that_early_pythons_wrote(tmp_path: Path) -> None:
    """Before Python 3.11.4 members of enumerations were pickled by getattr; it gives nothing else."""

    def by_name(self: Any, protocol: int) -> tuple[Any, ...]:
        return getattr, (type(self), self.name)

    with mock.patch.object(metadata._MEM_FORMAT_ENCODING, "__reduce_ex__", by_name):
        save_dcp({"w": torch.ones(2)}, tmp_path / "written")
    assert b"getattr" in (tmp_path / "written" / ".metadata").read_bytes()
    with open_weights(tmp_path / "written") as weights:
        assert list(weights.tensors) == ["w"]
    (tmp_path / "written" / ".metadata").write_bytes(pickle.dumps(Attribute(torch.Size, "count")))
    with pytest.raises(PlanError, match=r"it asks for builtins\.getattr, which is no part of such an index"):
        open_weights(tmp_path / "written")
