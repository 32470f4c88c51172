"""The layer calls that are running: how each reads its variables, and which regions are open."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

Reader = Callable[[Any], torch.Tensor]


class Frame:
    """One running call: a reader for each variable it uses, and what its hooks keep until it returns."""

    __slots__ = ("cache", "kept", "readers")

    def __init__(self, readers: dict[int, Reader]) -> None:
        self.readers = readers
        self.cache: dict[tuple[int, Any], torch.Tensor] = {}
        self.kept: Any = None


class _Running(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.scopes: Counter[tuple[int, str]] = Counter()
        self.entered: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.values: str = "dtensor"
        self.converting: Callable[[], AbstractContextManager[None]] = nullcontext  # entered around every conversion


running = _Running()


@contextmanager
def reading_local_values() -> Iterator[None]:
    """Inside, ``variable.value`` of a sharded variable is this rank's plain shard, without gradient."""
    before, running.values = running.values, "local"
    try:
        yield
    finally:
        running.values = before
