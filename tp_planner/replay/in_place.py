"""In place: sums over ranks are made where their summand lies, of those that a program uses for nothing else.

Code may use a summand again, or its user hold the gradient that comes back; of a program's steps it is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tp_planner.frontend.functions import function_name
from tp_planner.regions.behind import PRODUCTS, product_apart
from tp_planner.regions.boundaries import cross_at_once, is_sum
from tp_planner.replay.program import Name, Step, names_in
from tp_planner.replay.rewrites import linear, product

_MAKING_GRADIENTS = (product, linear, product_apart, torch.nn.functional.linear)


def with_sums_in_place(steps: Sequence[Step], output: Any) -> list[Step]:
    """Return the steps of a program that returns ``output``, sums over ranks in place where they may be."""
    uses = Counter(names_in(output))
    for step in steps:
        uses.update(step.uses())
    made = {name for step in steps for name in names_in(step.result)}
    return [
        replace(step, kwargs={"alone": True})
        if step.function is cross_at_once and _is_alone(step, steps, uses, made)
        else step
        for step in steps
    ]


def _is_alone(step: Step, steps: Sequence[Step], uses: Counter[Name], made: set[Name]) -> bool:
    given, boundary = step.args[:2]
    if is_sum(boundary.forward):
        return isinstance(given, Name) and given in made and given != step.result and uses[given] == 1
    return is_sum(boundary.backward) and _makes_gradients_for(step.result, steps, uses)


def _makes_gradients_for(name: Name, steps: Sequence[Step], uses: Counter[Name]) -> bool:
    """Whether all that reads a tensor is products, whose gradients are new; sums hand on one that others may hold."""
    readers = [step for step in steps if name in step.uses()]
    return len(readers) == uses[name] and all(map(_makes_gradients, readers))


def _makes_gradients(step: Step) -> bool:
    name = function_name(step.function)
    is_product = name in PRODUCTS and len(step.args) == (3 if name == "einsum" else 2)  # an einsum of one is a view
    return is_product or step.function in _MAKING_GRADIENTS
