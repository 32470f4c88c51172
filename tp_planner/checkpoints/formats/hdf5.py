"""Keras's files of weights: ``.weights.h5``, ``.keras``, and ``.weights.json`` with the files that it names.

A dataset that lies in its file in one piece, as Keras writes it, is read from there; any other through HDF5.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from tp_planner.checkpoints.formats.stored import (
    Buffer,
    Extent,
    RawFile,
    StoredTensor,
    Weights,
    Window,
    path_in,
    require_apart,
    require_extent,
)
from tp_planner.ir.errors import PlanError
from tp_planner.ir.placement import Shape

DEEPEST_GROUP = 200
LARGEST_INDEX = 100 * 2**20  # bytes
MEMBERS = "model.weights.h5", "model.weights.json"  # of a .keras file


def open_hdf5(path: Path) -> Weights:
    """Return the tensors of a ``.weights.h5`` file, by the paths of its datasets."""
    return _open(path, [(path, 0)])


def open_hdf5_index(path: Path) -> Weights:
    """Return the tensors of all files that Keras's ``.weights.json`` names."""
    return _open(path, [(path_in(path.parent, name), 0) for name in _files_of_index(path, path.read_bytes())])


def open_keras(path: Path) -> Weights:
    """Return the tensors of a ``.keras`` file, by the paths of their datasets. Nothing is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            if MEMBERS[1] in members:
                named = _files_of_index(path, _read_member(path, archive, members[MEMBERS[1]]))
            else:
                named = [MEMBERS[0]]
            missing = [name for name in named if name not in members]
            if missing:
                raise PlanError(f"{path}: holds no {missing[0]}; give a .keras file that Keras saved, or its weights")
            return _open(path, [(path, begin_of_member(path, members[name])) for name in named])
    except zipfile.BadZipFile as error:
        raise PlanError(f"{path}: no .keras file, or one that is cut off ({error}); copy it again") from None


def _read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.file_size > LARGEST_INDEX:
        raise PlanError(f"{path}: its {member.filename} unpacks to {member.file_size} bytes; it is not read")
    return archive.read(member)


def begin_of_member(path: Path, member: zipfile.ZipInfo) -> int:
    """Return where in the archive the bytes of a member begin, which are not compressed."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise PlanError(f"{path}: its {member.filename} is compressed; unpack it, and give that file")
    with path.open("rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)
    return member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _files_of_index(path: Path, text: bytes) -> list[str]:
    try:
        index = json.loads(text)["weight_map"]
        names = {name for files in index.values() for name in ([files] if isinstance(files, str) else files)}
        return sorted(str(name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(
            f"{path}: no index of Keras's weights ({type(error).__name__}: {error}); copy it again"
        ) from None


def _open(path: Path, parts: list[tuple[Path, int]]) -> Weights:
    tensors: dict[str, StoredTensor] = {}
    opened: list[Any] = []
    buffer = Buffer()
    try:
        for part, begin in parts:
            raw = RawFile(part, buffer)
            opened.append(raw)
            file = h5py.File(Window(raw, begin, raw.size - begin), "r") if begin else h5py.File(part, "r")
            opened.append(file)
            for name, dataset in _datasets(file, "", 0):
                if (tensor := stored_tensor(part, raw, begin, name, dataset)) is not None:
                    tensors[name] = tensor
        require_apart(path, tensors)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        _close(opened)
        if isinstance(error, PlanError | FileNotFoundError):
            raise
        raise PlanError(f"{path}: no HDF5 file, or a damaged one ({error}); copy it again") from None
    except BaseException:
        _close(opened)
        raise
    return Weights(path, tensors, [each.close for each in reversed(opened)])


def _close(opened: list[Any]) -> None:
    for each in reversed(opened):
        each.close()


def _datasets(group: h5py.Group, prefix: str, depth: int) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yield the datasets of the file itself; what links lead to elsewhere is not looked at."""
    if depth > DEEPEST_GROUP:
        raise PlanError(f"{group.file.filename}: groups lie more than {DEEPEST_GROUP} deep; it is not read")
    for key in group:
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            continue
        child = group[key]
        name = f"{prefix}/{key}" if prefix else key
        if isinstance(child, h5py.Group):
            yield from _datasets(child, name, depth + 1)
        elif isinstance(child, h5py.Dataset):
            yield name, child


def stored_tensor(path: Path, raw: RawFile, begin: int, name: str, dataset: h5py.Dataset) -> StoredTensor | None:
    """Return a dataset of numbers, in a file of HDF5 that begins at byte ``begin``; None for text and the like."""
    if dataset.external or dataset.is_virtual:
        raise PlanError(f"{path}: the values of {name!r} lie in another file; such files are not read")
    dtype = _dtype(dataset)
    if dtype is None or dataset.shape is None:
        return None
    shape = tuple(int(size) for size in dataset.shape)
    offset = dataset.id.get_offset()  # None where it is not in one piece
    if offset is None or dataset.dtype.byteorder == ">":
        return StoredTensor.of(_Dataset(dataset, shape, dtype))
    extent = Extent(raw, begin + offset, shape, dtype)
    require_extent(path, name, extent, dataset.id.get_storage_size())
    return StoredTensor.of(extent)


def _dtype(dataset: h5py.Dataset) -> torch.dtype | None:
    if dataset.attrs.get("dtype") == "bfloat16" and dataset.dtype.itemsize == 2:
        return torch.bfloat16
    try:
        return torch.from_numpy(np.empty(0, dataset.dtype.newbyteorder("="))).dtype
    except TypeError:
        return None


@dataclass(frozen=True)
class _Dataset:
    """A dataset that is chunked, compressed, or of other byte order: read through HDF5, rows at a time."""

    dataset: h5py.Dataset
    shape: Shape
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> torch.Tensor:
        try:
            return self._read(start, stop)
        except OSError as error:
            place = f"{self.dataset.file.filename}: {self.dataset.name!r}"
            raise PlanError(f"{place} cannot be read ({error}); copy it again") from None

    def _read(self, start: int, stop: int) -> torch.Tensor:
        if not self.shape:
            return self._tensor(np.asarray(self.dataset[()]).reshape(1))
        row = max(1, int(np.prod(self.shape[1:], dtype=np.int64)))
        first, last = start // row, -(-stop // row)
        return self._tensor(self.dataset[first:last].reshape(-1))[start - first * row : stop - first * row]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        if self.dtype == torch.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
