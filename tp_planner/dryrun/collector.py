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


@contextlib.contextmanager
def only_new_garbage() -> Iterator[None]:
    """Inside, a collection goes through the objects that were made inside.

    All those of the plan so far are as young as the garbage of the first block that is simulated: going through them
    takes longer than that block.
    """
    if gc.get_freeze_count():  # somebody else has set objects aside, and thawing would give those back too
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
