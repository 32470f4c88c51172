"""Numbers for reading: bytes in binary units, and how much more or less than before."""

from __future__ import annotations

from collections.abc import Callable

_BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_COUNTS = ("", "k", "M", "G", "T", "P")


def bytes_text(count: int) -> str:
    """Return a number of bytes with three digits or more.

    >>> [bytes_text(count) for count in (0, 1000, 1536, 16 * 2**30)]
    ['0 B', '1000 B', '1.50 KiB', '16.0 GiB']
    """
    return _scaled(count, 1024, _BYTES)


def count_text(count: int) -> str:
    """Return a number of anything else in powers of a thousand.

    >>> [count_text(count) for count in (12, 4096, 3 * 10**12)]
    ['12', '4.10 k', '3.00 T']
    """
    return _scaled(count, 1000, _COUNTS)


def with_change(now: int, before: int, text: Callable[[int], str]) -> str:
    """Return the number, and in brackets what it is more or less than before.

    >>> with_change(1024, 512, bytes_text)
    '1.00 KiB (+512 B)'
    """
    return text(now) if now == before else f"{text(now)} ({change_text(now - before, text)})"


def change_text(change: int, text: Callable[[int], str]) -> str:
    """Return a change with its sign."""
    return f"+{text(change)}" if change > 0 else text(change)


def _scaled(count: int, base: int, units: tuple[str, ...]) -> str:
    size, power = float(count), 0
    while round(abs(size)) >= base and power < len(units) - 1:
        size, power = size / base, power + 1
    digits = 0 if not power or abs(size) >= 99.95 else 1 if abs(size) >= 9.995 else 2
    return f"{size:.{digits}f} {units[power]}".rstrip()
