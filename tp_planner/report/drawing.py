"""A tensor drawn as a rectangle that is cut into its shards."""

from __future__ import annotations

import math
from itertools import accumulate

from tp_planner.ir.placement import Placement, Shape, Shard, StridedShard, chunk_sizes
from tp_planner.report.markup import Markup, element

_CUTS_UP_TO = 32  # parts above which there would be nothing but lines to see


def draw_tensor(shape: Shape, placement: Placement, parts: int) -> Markup:
    """Return the matrix of a tensor in memory order, sides on a logarithmic scale, with rank 0's part filled.

    The dims before the sharded one are its rows, the others its columns; a matrix sharded on dim 0 is cut into rows.
    """
    dim = placement.dim if isinstance(placement, Shard | StridedShard) else None
    split = dim or min(1, max(len(shape) - 1, 0))
    width, height = _side(math.prod(shape[split:]), 5.4), _side(math.prod(shape[:split]), 3.4)
    cuts = [1.0] if dim is None else [cut / max(shape[dim], 1) for cut in accumulate(chunk_sizes(shape[dim], parts))]
    by_rows = dim == 0 and split == 1
    own = (width, height * cuts[0]) if by_rows else (width * cuts[0], height)
    lines = [_line(width, height, cut, by_rows) for cut in cuts[:-1]] if len(cuts) <= _CUTS_UP_TO else []
    return element(
        "svg",
        _rectangle(width, height, "whole"),
        _rectangle(*own, "own"),
        element("path", d="".join(lines)) if lines else "",
        _rectangle(width, height, "frame"),
        width=_pixels(width),
        height=_pixels(height),
        aria_hidden="true",
    )


def _side(length: int, scale: float) -> float:
    """Return the length in pixels: a side of 1 is a bar."""
    return 7 + scale * math.log2(max(length, 1))


def _rectangle(width: float, height: float, class_: str) -> Markup:
    return element("rect", width=_pixels(width), height=_pixels(height), class_=class_)


def _line(width: float, height: float, cut: float, by_rows: bool) -> str:
    if by_rows:
        return f"M0 {_pixels(height * cut)}h{_pixels(width)}"
    return f"M{_pixels(width * cut)} 0v{_pixels(height)}"


def _pixels(length: float) -> str:
    return f"{length:.1f}"
