"""Objects: losses, metrics and optimizers: whether all of their code is Keras's, and what they hold.

A program of their calls has that written into it, so that it is looked at again before each call.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from tp_planner.replay.automatic import is_foreign, is_of_a_library
from tp_planner.storage.variables import BackendVariable

KINDS = (keras.Loss, keras.Metric, keras.optimizers.Optimizer, keras.optimizers.schedules.LearningRateSchedule)
# What of a variable changes what is done with it, and may be changed.
_OF_VARIABLES = operator.itemgetter("_value", "_trainable", "_constraint", "_overwrite_with_gradient")


def objects_in(*roots: Any) -> list[Any]:
    """Return the losses, metrics, optimizers and schedules among values, and those that they hold, each once."""
    return [each for each in _in_all(roots) if isinstance(each, KINDS)]


def foreign_code_of(objects: Iterable[Any]) -> str:
    """Return what in objects is not the code of Keras or KerasHub, or of ours; "" if nothing is."""
    for each in objects:
        what = f"{type(each).__name__} {getattr(each, 'name', '')!r}"
        for kind in type(each).__mro__:
            if not is_of_a_library(kind):
                return f"{what} has code of {kind.__qualname__}"
        for key, value in vars(each).items():
            if is_foreign(value) or callable(getattr(type(each), key, None)):
                return f"{what} has {key!r}, which is not Keras's"
    return ""


class Held:
    """What objects, variables and containers hold, as it is now.

    Args:
        values: objects, whose containers are looked at, too, variables, dicts and lists.
    """

    def __init__(self, *values: Any) -> None:
        found = list(_in_all(values))
        self._variables = [vars(each) for each in found if isinstance(each, BackendVariable)]
        holders = [
            each if isinstance(each, dict | list) else vars(each)
            for each in found
            if not isinstance(each, BackendVariable)
        ]
        self._views = [each.values() if isinstance(each, dict) else each for each in holders]
        self._sizes, self._held = list(map(len, self._views)), list(self._now())

    def _now(self) -> Iterator[Any]:
        return itertools.chain(*self._views, *map(_OF_VARIABLES, self._variables))

    def is_set_aside(self) -> bool:
        """Whether calls are not to be replayed for the moment."""
        return False

    def is_another(self) -> bool:
        """Whether one of them has something in another's place."""
        if list(map(len, self._views)) != self._sizes:
            return True
        return any(map(operator.is_not, self._now(), self._held))


def _in_all(values: Iterable[Any]) -> Iterator[Any]:
    """Yield what holds something: objects, variables, dicts and lists, those in it, too, each once."""
    seen: set[int] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (*KINDS, BackendVariable)):
            yield value
            waiting += () if isinstance(value, BackendVariable) else vars(value).values()
        elif isinstance(value, dict | list):
            yield value
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, tuple):
            waiting += value
