"""What PyTorch's caching allocator reserves of a CUDA device for the storages of a step.

As its notes and source say (https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management and
c10/cuda/CUDACachingAllocator.cpp, default settings): sizes are multiples of 512 bytes; storages up to 1 MiB lie in
segments of 2 MiB, those under 10 MiB in segments of 20 MiB, larger ones in one of their own, a multiple of 2 MiB; the
smallest free block that is large enough is taken, and split where enough is left; segments are kept.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

from tp_planner.ir.step_log import Allocated, Event, Freed

BLOCK = 512
_MIB = 2**20
_LARGEST_SMALL = _MIB
_SMALL_SEGMENT, _LARGE_SEGMENT = 2 * _MIB, 20 * _MIB
_LEAST_OF_ITS_OWN, _ROUNDING = 10 * _MIB, 2 * _MIB


def rounded_up(size: int, multiple: int) -> int:
    """Return the least multiple that is not below ``size``."""
    return -(-size // multiple) * multiple


def reserved_for(events: Iterable[Event]) -> int:
    """Return the bytes of all segments at the end of a step that begins with none; none is given back on the way."""
    allocator = _Allocator()
    blocks: dict[int, list[_Block]] = {}
    for event in events:
        if isinstance(event, Allocated) and event.bytes:
            blocks[event.storage] = [allocator.allocate(event.bytes) for _ in range(event.times)]
        elif isinstance(event, Freed):
            for block in blocks.pop(event.storage, ()):
                allocator.free(block)
    return allocator.reserved


@dataclass(slots=True, eq=False)
class _Block:
    """A part of a segment, between its neighbours there."""

    address: int
    size: int
    small: bool
    before: _Block | None = None
    after: _Block | None = None
    free: bool = False

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands among free blocks: the smallest first, of equal ones the one at the lowest address."""
        return self.size, self.address


class _Allocator:
    """Segments of one device, all used on one stream."""

    def __init__(self) -> None:
        self.reserved = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # by whether blocks are small
        self._at: dict[int, _Block] = {}  # free blocks by address

    def allocate(self, size: int) -> _Block:
        size = rounded_up(size, BLOCK)
        small = size <= _LARGEST_SMALL
        block = self._taken(size, small) or self._segment(size, small)
        left = block.size - size
        if left >= BLOCK if small else left > _LARGEST_SMALL:
            self._split(block, size)
        return block

    def free(self, block: _Block) -> None:
        """Give a block back, joined with its free neighbours."""
        before, after = block.before, block.after
        if after is not None and after.free:
            self._take(after)
            block.size, block.after = block.size + after.size, after.after
        if before is not None and before.free:
            self._take(before)
            before.size, before.after = before.size + block.size, block.after
            block = before
        if block.after is not None:
            block.after.before = block
        self._put(block)

    def _taken(self, size: int, small: bool) -> _Block | None:
        """Return the smallest free block that is large enough."""
        places = self._free[small]
        position = bisect_left(places, (size, 0))
        if position == len(places):
            return None
        block = self._at[places[position][1]]
        self._take(block)
        return block

    def _segment(self, size: int, small: bool) -> _Block:
        large = _LARGE_SEGMENT if size < _LEAST_OF_ITS_OWN else rounded_up(size, _ROUNDING)
        whole = _SMALL_SEGMENT if small else large
        block = _Block(self.reserved, whole, small)
        self.reserved += whole
        return block

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.address + size, block.size - size, block.small, before=block, after=block.after)
        if rest.after is not None:
            rest.after.before = rest
        block.size, block.after = size, rest
        self._put(rest)

    def _put(self, block: _Block) -> None:
        block.free = True
        self._at[block.address] = block
        insort(self._free[block.small], block.place)

    def _take(self, block: _Block) -> None:
        block.free = False
        del self._at[block.address]
        places = self._free[block.small]
        del places[bisect_left(places, block.place)]
