"""Stored tensors: what a file of weights holds under a name, and how a part of it is read.

Whatever the format, a tensor is one or more contiguous runs of elements in C order. A part is read in contiguous
pieces of at most ``LARGEST_READ`` bytes, whichever dims are cut: where its own runs are short, whole rows around them
are read and cut.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch

from tp_planner.ir.errors import PlanError
from tp_planner.ir.placement import Shape

LARGEST_READ = 64 * 2**20  # bytes
SHORTEST_RUN = 256 * 2**10  # bytes; shorter runs are cut from rows that are read whole, which takes less time

Span = tuple[int, int]  # the first index, and the one after the last


class Stored(Protocol):
    """Contiguous elements in a file."""

    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the elements from ``start`` to ``stop`` in C order, valid until the next read of the file."""


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor that lies in the file by itself; it begins at ``offsets`` of the whole."""

    offsets: Shape
    stored: Stored


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, in chunks that cover it."""

    shape: Shape
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    @classmethod
    def of(cls, stored: Stored) -> StoredTensor:
        """Return the tensor that lies in the file in one piece."""
        return cls(stored.shape, stored.dtype, (Chunk((0,) * len(stored.shape), stored),))

    def read(self, spans: Sequence[Span], into: torch.Tensor) -> None:
        """Copy a part into a tensor of its shape, of any dtype and device; ``spans`` are its indices, one a dim."""
        for chunk in self.chunks:
            ends = [begin + size for begin, size in zip(chunk.offsets, chunk.stored.shape, strict=True)]
            shared = [
                (max(start, begin), min(stop, end))
                for (start, stop), begin, end in zip(spans, chunk.offsets, ends, strict=True)
            ]
            if all(start < stop for start, stop in shared):
                there = [(a - begin, b - begin) for (a, b), begin in zip(shared, chunk.offsets, strict=True)]
                here = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(shared, spans, strict=True))
                _read(chunk.stored, 0, chunk.stored.shape, there, into[here])


def _read(stored: Stored, begin: int, shape: Shape, spans: Sequence[Span], into: torch.Tensor) -> None:
    """Copy a part of the subtensor of ``shape`` whose elements begin at ``begin``."""
    if not shape:
        into.copy_(stored.read(begin, begin + 1).reshape(()))
        return
    (start, stop), rest, row = spans[0], spans[1:], math.prod(shape[1:])
    own, itemsize = math.prod(b - a for a, b in rest), stored.dtype.itemsize
    whole_rows = own == row
    if row * itemsize > LARGEST_READ or (not whole_rows and own * itemsize >= SHORTEST_RUN):
        if len(shape) == 1:
            raise AssertionError("an element is no larger than a read")
        for index in range(start, stop):
            _read(stored, begin + index * row, shape[1:], rest, into[index - start])
        return
    cut = (slice(None), *(slice(a, b) for a, b in rest))
    step = max(1, LARGEST_READ // max(row * itemsize, 1))
    for first in range(start, stop, step):
        last = min(first + step, stop)
        rows = stored.read(begin + first * row, begin + last * row).reshape(last - first, *shape[1:])
        into[first - start : last - start].copy_(rows[cut])


@dataclass(frozen=True)
class Extent:
    """Elements that lie in a file as they are in memory, from byte ``offset`` on."""

    file: RawFile
    offset: int
    shape: Shape
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> torch.Tensor:
        size = self.dtype.itemsize
        return torch.from_numpy(self.file.read(self.offset + start * size, (stop - start) * size)).view(self.dtype)


class RawFile:
    """A file that is read through one bounded buffer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size
        self._buffer = np.empty(0, np.uint8)

    def read(self, offset: int, length: int) -> np.ndarray:
        """Return bytes of the file, valid until the next read. Raises PlanError where the file ends before."""
        if self._buffer.size < length:
            self._buffer = np.empty(length, np.uint8)
        wanted = self._buffer.data[:length]
        done = 0
        while done < length:
            count = os.preadv(self._descriptor, [wanted[done:]], offset + done)
            if not count:
                raise PlanError(f"{self.path}: the file ends at byte {self.size}, in the middle of a tensor")
            done += count
        return self._buffer[:length]

    def close(self) -> None:
        os.close(self._descriptor)


class Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: RawFile, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        buffer[:count] = self._file.read(self._begin + self._at, count).data
        self._at += count
        return count


class Weights:
    """An open file, or folder, of weights: its tensors by name. A context manager; closing it ends all reading."""

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor], closing: Sequence[Callable[[], None]]) -> None:
        self.path, self.tensors, self._closing = path, tensors, closing

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for close in self._closing:
            close()


def raw_file_in(folder: Path, name: str, opened: dict[str, RawFile]) -> RawFile:
    """Return a file of a folder, opened once. Raises PlanError for a name that leads elsewhere, or no such file."""
    if name not in opened:
        opened[name] = RawFile(path_in(folder, name))
    return opened[name]


def path_in(folder: Path, name: str) -> Path:
    """Return the path of a file that an index names. Raises PlanError if it is not in the folder."""
    if not name or Path(name).name != name:
        raise PlanError(f"{folder}: the index names {name!r}, which is no file of this folder; it is not read")
    if not (folder / name).is_file():
        raise PlanError(f"{folder}: the index names {name!r}, which is missing; copy it there")
    return folder / name


def require_extent(path: Path, name: str, extent: Extent, length: int) -> None:
    """Raise PlanError unless ``length`` bytes of the tensor fit its shape, and lie within its file."""
    if min(extent.shape, default=0) < 0 or length != extent.size:
        raise PlanError(
            f"{path}: tensor {name!r} of shape {extent.shape} takes {extent.size} bytes, the file has {length}"
        )
    if extent.offset < 0 or extent.offset + length > extent.file.size:
        raise PlanError(
            f"{path}: tensor {name!r} ends at byte {extent.offset + length}, the file at {extent.file.size}; "
            f"it is cut off: copy it again"
        )


def require_apart(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise PlanError if two tensors share bytes of a file, but not all of them: then a place is damaged."""
    extents = [
        (chunk.stored.offset, name, chunk.stored)
        for name, tensor in tensors.items()
        for chunk in tensor.chunks
        if isinstance(chunk.stored, Extent) and chunk.stored.size
    ]
    extents.sort(key=lambda each: (id(each[2].file), *each[:2]))
    for (begin, name, one), (other_begin, other_name, other) in itertools.pairwise(extents):
        if one.file is other.file and other_begin < begin + one.size and (begin, one.size) != (other_begin, other.size):
            raise PlanError(f"{path}: tensors {name!r} and {other_name!r} lie on the same bytes; copy it again")
