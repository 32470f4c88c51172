"""Holders: what a rank holds at the peak of a training step, tensor by tensor, equal ones of equal layers together."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tp_planner.ir.step import Holder, StorageKind
from tp_planner.ir.step_log import Allocated, Freed, Origin, StepLog

SMALLEST_SHARE = 1000  # holders under one in so many of the bytes at the peak are left out
_NUMBER = re.compile(r"\d+")
_OF_A_STEP: tuple[StorageKind, ...] = ("activations", "temporaries")


def holders_of(log: StepLog) -> tuple[Holder, ...]:
    """Return the activations and temporaries that are there at the peak, the largest first."""
    held = _held_at_the_peak(log)
    groups: dict[tuple[object, ...], list[tuple[Origin, Allocated]]] = {}
    for storage, event in held.items():
        kind = log.kinds.get(storage, "temporaries")
        if kind in _OF_A_STEP:
            origin = log.origin(storage)
            key = kind, _NUMBER.sub("*", origin.layer), *origin[1:]
            groups.setdefault(key, []).append((origin, event))
    found = (_holder(key[0], members) for key, members in groups.items())
    least = sum(event.bytes * event.times for event in held.values()) / SMALLEST_SHARE
    return tuple(sorted((each for each in found if each.bytes >= least), key=lambda each: (-each.bytes, str(each))))


def _holder(kind: object, members: Iterable[tuple[Origin, Allocated]]) -> Holder:
    origins, events = zip(*members, strict=True)
    layers = tuple(dict.fromkeys(origin.layer for origin in origins))
    first = origins[0]
    assert kind == "activations" or kind == "temporaries"
    count, size = sum(event.times for event in events), sum(event.bytes * event.times for event in events)
    return Holder(kind, layers, first.op, first.dtype, first.shape, count, size)


def _held_at_the_peak(log: StepLog) -> dict[int, Allocated]:
    """Return the storages that are there when their sum is largest for the first time."""
    sizes: dict[int, int] = {}
    total, highest, position = 0, 0, 0
    for number, event in enumerate(log.events, 1):
        if isinstance(event, Allocated):
            sizes[event.storage] = size = event.bytes * event.times
            total += size
            if total > highest:
                highest, position = total, number
        elif isinstance(event, Freed):
            total -= sizes.pop(event.storage)
    held: dict[int, Allocated] = {}
    for event in log.events[:position]:
        if isinstance(event, Allocated):
            held[event.storage] = event
        elif isinstance(event, Freed):
            del held[event.storage]
    return held
