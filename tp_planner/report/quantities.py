"""Shapes, bytes and kinds of collective as a person reads them."""

from __future__ import annotations

import math

from tp_planner.ir.placement import Shape
from tp_planner.ir.step import CollectiveKind
from tp_planner.report.markup import Markup, element

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def human_bytes(size: int) -> str:
    """Return a number of bytes with three digits or more and its unit.

    >>> [human_bytes(size) for size in (0, 1000, 1536, 16777216)]
    ['0 B', '1000 B', '1.50 KiB', '16.0 MiB']
    """
    power = min(max(size.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    if power == 0:
        return f"{size} B"
    value = size / 1024**power
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {_UNITS[power]}"


def bytes_element(size: int) -> Markup:
    """Return a number of bytes as an element that has the exact number too."""
    return element("data", human_bytes(size), value=size, title=f"{size} bytes")


def shape_text(shape: Shape) -> str:
    """Return a shape as ``64×8``."""
    return "×".join(map(str, shape)) or "scalar"


def byte_size(shape: Shape, itemsize: int) -> int:
    """Return the bytes of a tensor."""
    return math.prod(shape) * itemsize


def dashed(kind: CollectiveKind) -> str:
    """Return a kind of collective as it is written in prose: ``all-reduce``."""
    return kind.replace("_", "-")
