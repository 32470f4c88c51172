"""Folders of ``torch.distributed.checkpoint``.

Their index, ``.metadata``, is a pickle. It is read by an unpickler that makes nothing but the plain data of which torch
builds such an index, so that no file can have code run.
"""

from __future__ import annotations

import enum
import functools
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from tp_planner.checkpoints.formats.stored import (
    Buffer,
    Chunk,
    Extent,
    RawFile,
    StoredTensor,
    Weights,
    Window,
    raw_file_in,
    require_extent,
)
from tp_planner.ir.errors import PlanError
from tp_planner.ir.placement import Shape

INDEX = ".metadata"
LARGEST_INDEX = 2**30  # bytes
_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}

Opened = Callable[[str], RawFile]  # a file of the folder by its name, opened


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib._local":  # Python 3.13
            module = "pathlib"
        if name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # before Python 3.11.4 members of enumerations are written so
            return _member
        raise PlanError(f"it asks for {module}.{name}, which is no part of such an index")


def _member(kind: Any, name: str) -> Any:
    """Return a member of an enumeration by its name, as the index has memory formats; nothing else."""
    if isinstance(kind, enum.EnumMeta) and name in kind.__members__:
        return kind[name]
    raise PlanError("it asks for builtins.getattr, which is no part of such an index")


def open_dcp(folder: Path) -> Weights:
    """Return the tensors that ``torch.distributed.checkpoint`` saved to a folder, by their names in the state dict."""
    index = _read_index(folder)
    files: dict[str, RawFile] = {}
    opened = functools.partial(raw_file_in, folder, opened=files, buffer=Buffer())
    try:
        tensors = {
            str(name): _stored(folder, str(name), entry, index.storage_data, opened)
            for name, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    except BaseException as error:
        for file in files.values():
            file.close()
        if isinstance(error, (KeyError, TypeError, AttributeError, ValueError)) and not isinstance(error, PlanError):
            raise PlanError(f"{folder}: its {INDEX} is damaged ({type(error).__name__}: {error})") from None
        raise
    return Weights(folder, tensors, [file.close for file in files.values()])


def _read_index(folder: Path) -> Any:
    path = folder / INDEX
    if path.stat().st_size > LARGEST_INDEX:
        raise PlanError(f"{path}: is larger than {LARGEST_INDEX} bytes; it is not read")
    try:
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(index.state_dict_metadata, dict) or not isinstance(index.storage_data, dict):
            raise TypeError("no index of torch.distributed.checkpoint")
        return index
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise PlanError(f"{path}: cannot be read: {error}; copy it again") from None


def _stored(folder: Path, name: str, entry: TensorStorageMetadata, where: Any, opened: Opened) -> StoredTensor:
    shape, dtype = tuple(entry.size), entry.properties.dtype
    chunks = tuple(
        Chunk(tuple(chunk.offsets), _chunk(folder, name, tuple(chunk.sizes), dtype, info, opened))
        for chunk in entry.chunks
        for info in [where[MetadataIndex(name, chunk.offsets)]]
    )
    covered = sum(_count(chunk.stored.shape) for chunk in chunks)
    for chunk in chunks:
        ends = [begin + size for begin, size in zip(chunk.offsets, chunk.stored.shape, strict=True)]
        if any(begin < 0 or end > size for begin, end, size in zip(chunk.offsets, ends, shape, strict=True)):
            raise PlanError(f"{folder}: a piece of {name!r} lies outside of its shape {shape}; the index is damaged")
    if covered != _count(shape):
        raise PlanError(f"{folder}: {name!r} has {_count(shape)} elements, its pieces have {covered}")
    return StoredTensor(shape, dtype, chunks)


def _count(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _chunk(folder: Path, name: str, shape: Shape, dtype: torch.dtype, info: Any, opened: Opened) -> _Saved:
    if getattr(info, "transform_descriptors", None):
        raise PlanError(f"{folder}: {name!r} is stored with {info.transform_descriptors}; save it without")
    file = opened(info.relative_path)
    if info.offset < 0 or info.length < 0 or info.offset + info.length > file.size:
        raise PlanError(f"{file.path}: {name!r} ends at byte {info.offset + info.length}, the file at {file.size}")
    return _Saved(file, name, info.offset, info.length, shape, dtype)


@dataclass(frozen=True)
class _Saved:
    """A piece as ``torch.save`` has put it into a file: a zip archive, in which its elements lie uncompressed."""

    file: RawFile
    name: str
    offset: int
    length: int
    shape: Shape
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._extent.read(start, stop)

    @functools.cached_property
    def _extent(self) -> Extent:
        try:
            with FakeTensorMode():  # so that only the archive's index is read
                archive: Any = Window(self.file, self.offset, self.length)
                tensor = torch.load(archive, weights_only=True)
            begin = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.element_size()
        except Exception as error:  # a damaged archive raises whatever its bytes happen to ask for
            raise PlanError(
                f"{self.file.path}: {self.name!r} is damaged ({type(error).__name__}: {error}); copy it again"
            ) from None
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype or not tensor.is_contiguous():
            raise PlanError(
                f"{self.file.path}: {self.name!r} is of shape {tuple(tensor.shape)} and {tensor.dtype} there, "
                f"{self.shape} and {self.dtype} in the index"
            )
        extent = Extent(self.file, self.offset + begin, self.shape, self.dtype)
        require_extent(self.file.path, self.name, extent, tensor.numel() * tensor.element_size())
        return extent
