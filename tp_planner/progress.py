"""Progress: long work says what it is at, and whoever waits may listen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_listener: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


def stage(text: str) -> None:
    """Tell whoever listens what is being done now."""
    listener = _listener.get()
    if listener is not None:
        listener(text)


@contextlib.contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Inside, ``listener`` is told every stage."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
