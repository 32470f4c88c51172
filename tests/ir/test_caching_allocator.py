"""What CUDA's caching allocator reserves, by the sizes in PyTorch's notes, and a law of any storages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tp_planner.ir.caching_allocator import reserved_for
from tp_planner.ir.step_log import Allocated, Event, Freed

MIB = 2**20
CASES: dict[str, tuple[list[Event], int]] = {
    "nothing": ([Allocated(0, 0)], 0),
    "one byte": ([Allocated(0, 1)], 2 * MIB),
    "a segment of small ones": ([Allocated(0, 512, times=4096)], 2 * MIB),
    "one more": ([Allocated(0, 512, times=4097)], 4 * MIB),
    "largest small": ([Allocated(0, MIB), Allocated(1, MIB)], 2 * MIB),
    "larger": ([Allocated(0, MIB + 1)], 20 * MIB),
    "small and larger lie apart": ([Allocated(0, 1), Allocated(1, 2 * MIB)], 22 * MIB),
    "two in one segment": ([Allocated(0, 9 * MIB), Allocated(1, 9 * MIB)], 20 * MIB),
    "little is left": ([Allocated(0, 9 * MIB), Allocated(1, 10 * MIB), Allocated(2, MIB + 512)], 40 * MIB),
    "a segment of its own": ([Allocated(0, 10 * MIB), Allocated(1, 11 * MIB)], 22 * MIB),
    "freed is used again": ([Allocated(0, 30 * MIB), Freed(0), Allocated(1, 9 * MIB), Allocated(2, 9 * MIB)], 30 * MIB),
    "neighbours are joined": (
        [Allocated(0, 8 * MIB, times=2), Freed(0), Allocated(1, 20 * MIB)],
        20 * MIB,
    ),
    "the smallest that fits": (
        [
            Allocated(0, 40 * MIB),
            Allocated(1, 30 * MIB),
            Freed(0),
            Freed(1),
            Allocated(2, 29 * MIB),
            Allocated(3, 40 * MIB),
        ],
        70 * MIB,
    ),
}


@pytest.mark.parametrize(("events", "expected"), CASES.values(), ids=CASES)
def test_reserved(events: list[Event], expected: int) -> None:
    assert reserved_for(events) == expected


@given(st.lists(st.tuples(st.integers(1, 24 * MIB), st.booleans()), max_size=60), st.randoms())
def test_law(steps: list[tuple[int, bool]], random: object) -> None:
    """What is reserved holds what is alive, in segments of whole MiB."""
    events: list[Event] = []
    alive: list[int] = []
    sizes: dict[int, int] = {}
    highest = 0
    for number, (size, free) in enumerate(steps):
        events.append(Allocated(number, size))
        alive.append(number)
        sizes[number] = size
        highest = max(highest, sum(sizes[each] for each in alive))
        if free:
            events.append(Freed(alive.pop(random.randrange(len(alive)))))  # type: ignore[attr-defined]
    found = reserved_for(events)
    assert found >= highest
    assert found % (2 * MIB) == 0
