"""Keep torch's loggers quiet where a failure is an expected answer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

# Both log whole tracebacks for ops that cannot run on given shapes or shards; callers report those in one line.
LOGGERS = ("torch._subclasses.fake_tensor", "torch.distributed.tensor")


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Inside, torch does not log failing fake or distributed ops."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    if set(levels.values()) == {logging.CRITICAL}:  # to set a level makes all loggers forget what is enabled
        yield
        return
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
