"""Integer programs, built column by column and row by row, and solved by HiGHS (Huangfu and Hall 2018).

HiGHS proves how good what it finds is: no better solution is cheaper than its dual bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

GAP = 1e-7  # relative, at which HiGHS takes a solution for the best
TRUE = 0.5  # a column that is 0 or 1, but for rounding


@dataclass(frozen=True)
class Solution:
    """The columns' values, what they cost, and what no solution can cost less than."""

    values: np.ndarray
    cost: float
    bound: float

    def has(self, column: int) -> bool:
        """Whether a column of 0 or 1 is 1."""
        return bool(self.values[column] > TRUE)


@dataclass
class IntegerProgram:
    """Columns between 0 and 1, and rows that bind them."""

    costs: list[float] = field(default_factory=list)
    integral: list[bool] = field(default_factory=list)
    _rows: list[dict[int, float]] = field(default_factory=list)
    _low: list[float] = field(default_factory=list)
    _high: list[float] = field(default_factory=list)

    def column(self, cost: float = 0.0, integral: bool = False) -> int:
        """Add a column, and return its number."""
        self.costs.append(cost)
        self.integral.append(integral)
        return len(self.costs) - 1

    def row(self, entries: Mapping[int, float], low: float, high: float) -> None:
        """Let the sum of the columns times their entries be from ``low`` to ``high``."""
        self._rows.append(dict(entries))
        self._low.append(low)
        self._high.append(high)

    def equal(self, entries: Mapping[int, float], value: float) -> None:
        """Let the sum of the columns times their entries be ``value``."""
        self.row(entries, value, value)

    def solve(self, costs: Mapping[int, float] | None = None) -> Solution | None:
        """Return the cheapest solution, if columns cost what they do, or else these; None if there is none."""
        each = self.costs if costs is None else [costs.get(column, 0.0) for column in range(len(self.costs))]
        return self._solve(np.asarray(each))

    def _solve(self, costs: np.ndarray) -> Solution | None:
        scale = 1e6 / max(float(np.abs(costs).max(initial=0.0)), 1e-300)  # HiGHS's tolerances are absolute
        entries = [(row, column, value) for row, each in enumerate(self._rows) for column, value in each.items()]
        rows, columns, values = zip(*entries, strict=True)
        matrix = csr_array((values, (rows, columns)), shape=(len(self._rows), len(costs)))
        result = milp(
            costs * scale,
            integrality=np.asarray(self.integral, dtype=int),
            bounds=Bounds(0.0, 1.0),
            constraints=LinearConstraint(matrix, self._low, self._high),
            options={"mip_rel_gap": GAP},
        )
        if result.x is None:
            return None
        bound = result.fun if result.mip_dual_bound is None else result.mip_dual_bound
        return Solution(result.x, float(result.fun) / scale, float(bound) / scale)
