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
Block = Sequence[Span]  # a part of a tensor, a span for each dim


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

    @property
    def of_whole(self) -> Block:
        """Which part of the tensor it is."""
        return [(begin, begin + size) for begin, size in zip(self.offsets, self.stored.shape, strict=True)]

    def shared(self, block: Block) -> tuple[Block, Block] | None:
        """Return what it has of a block of the tensor, as that of the tensor and as that of the chunk, if anything."""
        if (of_whole := overlap(block, self.of_whole)) is None:
            return None
        return of_whole, [(a - begin, b - begin) for (a, b), begin in zip(of_whole, self.offsets, strict=True)]


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

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, block: Block, into: torch.Tensor) -> None:
        """Copy a part into a tensor of its shape, of any dtype and device."""
        for chunk in self.chunks:
            if (shared := chunk.shared(block)) is not None:
                _read(chunk.stored, 0, chunk.stored.shape, shared[1], into[indices_in(block, shared[0])])

    def bytes_read(self, block: Block) -> int:
        """Return how many bytes of the file are read for a part."""
        shared = [(chunk.stored.shape, chunk.shared(block)) for chunk in self.chunks]
        return sum(_bytes_read(shape, each[1], self.dtype.itemsize) for shape, each in shared if each is not None)


def overlap(one: Block, other: Block) -> Block | None:
    """Return what two blocks of a tensor have in common, if anything."""
    common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True)]
    return common if all(start < stop for start, stop in common) else None


def indices_in(outer: Block, inner: Block) -> tuple[slice, ...]:
    """Return where a block lies in one that it is part of."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(inner, outer, strict=True))


def _read(stored: Stored, begin: int, shape: Shape, block: Block, into: torch.Tensor) -> None:
    """Copy a part of the subtensor of ``shape`` whose elements begin at ``begin``."""
    if not shape:
        into.copy_(stored.read(begin, begin + 1).reshape(()))
        return
    (start, stop), rest, row = block[0], block[1:], math.prod(shape[1:])
    if _is_read_row_by_row(shape, block, stored.dtype.itemsize):
        for index in range(start, stop):
            _read(stored, begin + index * row, shape[1:], rest, into[index - start])
        return
    cut = (slice(None), *(slice(a, b) for a, b in rest))
    step = max(1, LARGEST_READ // max(row * stored.dtype.itemsize, 1))
    for first in range(start, stop, step):
        last = min(first + step, stop)
        rows = stored.read(begin + first * row, begin + last * row).reshape(last - first, *shape[1:])
        into[first - start : last - start].copy_(rows[cut])


def _is_read_row_by_row(shape: Shape, block: Block, itemsize: int) -> bool:
    """Whether of each row its part is read by itself, not rows whole."""
    row, own = math.prod(shape[1:]) * itemsize, math.prod(stop - start for start, stop in block[1:]) * itemsize
    return row > LARGEST_READ or (own != row and own >= SHORTEST_RUN)


def _bytes_read(shape: Shape, block: Block, itemsize: int) -> int:
    """Return how many bytes ``_read`` reads."""
    if not shape:
        return itemsize
    (start, stop), rest = block[0], block[1:]
    if _is_read_row_by_row(shape, block, itemsize):
        return (stop - start) * _bytes_read(shape[1:], rest, itemsize)
    return (stop - start) * math.prod(shape[1:]) * itemsize


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


class Buffer:
    """Memory for what is read, which the next read overwrites."""

    def __init__(self) -> None:
        self._bytes = np.empty(1, np.uint8)  # of an array of none, torch views no other dtype, not of its slices

    def of(self, length: int) -> np.ndarray:
        """Return room for so many bytes."""
        if self._bytes.size < length:
            self._bytes = np.empty(1, np.uint8)  # before there is more
            self._bytes = np.empty(length, np.uint8)
        return self._bytes[:length]


class RawFile:
    """A file that is read through one bounded buffer, which files of the same weights share."""

    def __init__(self, path: Path, buffer: Buffer) -> None:
        self.path, self._buffer = path, buffer
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, length: int) -> np.ndarray:
        """Return bytes of the file, valid until the next read. Raises PlanError where the file ends before."""
        room = self._buffer.of(length)
        wanted = room.data
        done = 0
        while done < length:
            count = os.preadv(self._descriptor, [wanted[done:]], offset + done)
            if not count:
                raise PlanError(f"{self.path}: the file ends at byte {self.size}, in the middle of a tensor")
            done += count
        return room

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


def raw_file_in(folder: Path, name: str, opened: dict[str, RawFile], buffer: Buffer) -> RawFile:
    """Return a file of a folder, opened once. Raises PlanError for a name that leads elsewhere, or no such file."""
    if name not in opened:
        opened[name] = RawFile(path_in(folder, name), buffer)
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
