"""How much memory a process uses while it does something."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path

M_MMAP_THRESHOLD = -3  # of malloc.h
STATUS = Path("/proc/self/status")


@contextlib.contextmanager
def watching() -> Iterator[list[int]]:
    """Inside, note the most bytes that this process uses beyond what it did before; pages of files do not count."""

    def watch() -> None:
        while not stopped.is_set():
            most[0] = max(most[0], _used() - before)
            time.sleep(0.001)

    gc.collect()
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)  # what is larger is given back when it is freed
    libc.malloc_trim(0)  # what was freed before is used again, and would not be seen
    before, most, stopped = _used(), [0], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        stopped.set()
        thread.join()


def _used() -> int:
    return next(int(line.split()[1]) << 10 for line in STATUS.read_text().splitlines() if "RssAnon" in line)
