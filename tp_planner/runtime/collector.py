"""Python's garbage collector, kept out of the way."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Inside, the collector does not run by itself.

    Planning makes many small objects and hardly any garbage, through all of which the collector would go again and
    again. And tensors in reference cycles, of which Keras makes many, would go whenever it happens to run: a simulated
    step collects them where blocks and passes end, so that every run has the same log.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
