"""Automatic: which models are replayed though nobody has asked for it, and when.

Keras's default, ``jit_compile="auto"``, leaves the way to run a model to the backend, if only it does what eager code
does. A program in place of code of Keras's own does, as long as nothing is in the layers that is a user's: a class, a
function, a hook. What layers hold is looked at again before each call, for a program has it written into it. Such a
program makes the very functions that the code made, so that results are the same to the bit.
"""

from __future__ import annotations

import functools
import itertools
import operator
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import keras
import torch
from keras.src.models import Functional

from tp_planner.frontend.kept_tensors import holders
from tp_planner.frontend.layer_tree import BOOKKEEPING
from tp_planner.storage.log import logger

PATIENCE = 100  # calls of one sort before it is taped, which takes as long as two to four of them
MOST_SORTS = 1000  # that are counted
MOST_CHANGES = 3  # after which a model runs as ever
LIBRARIES = frozenset({"keras", "keras_hub", "torch", "tp_planner", "numpy"}) | sys.stdlib_module_names
# What a user's own model may have of its own beside Keras's: none of it runs inside of a call.
_STEPS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics", "metrics")
_PHASES = ("compile", "fit", "evaluate", "predict", "get_config", "from_config", "__init__")
AROUND_CALLS = frozenset({*vars(type("Empty", (), {})), *_STEPS, *_PHASES})
OF_CALLS = (
    "_trainable",
    "_dtype_policy",
    "autocast",
    "activity_regularizer",
)  # bookkeeping of Keras's that changes what a call does
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def foreign_code(layers: Mapping[str, keras.Layer]) -> str:
    """Return what in a model is not the code of Keras or KerasHub, or of ours; "" if nothing is.

    Args:
        layers: the model and all layers below it, by name.
    """
    if any(map(len, hooks_of_all_modules())):
        return "torch calls hooks for all modules"
    for name, layer in layers.items():
        if isinstance(layer, keras.layers.TorchModuleWrapper):
            return f"layer {name!r} runs a torch module"
        if isinstance(layer, keras.Model) and type(layer).call not in (Functional.call, keras.Sequential.call):
            return f"model {name!r} is called by code of its own"
        for kind in type(layer).__mro__:
            own = set() if is_of_a_library(kind) else set(vars(kind))
            if own and not (isinstance(layer, keras.Model) and own <= AROUND_CALLS):
                return f"layer {name!r} has code of {kind.__qualname__}"
        if any(is_foreign(hook) for hooks in hooks_of(layer) for hook in hooks.values()):
            return f"layer {name!r} has a hook"
        for key, value in _entries(layer):
            if is_foreign(value):
                return f"layer {name!r} has {key!r}, which is not Keras's"
    return ""


def is_foreign(value: Any) -> bool:
    """Whether a value, or one in it, is a function or an object that is called and is no library's."""
    if isinstance(value, keras.Layer):
        return False  # it is looked at by itself
    if isinstance(value, tuple):
        return any(map(is_foreign, value))
    if isinstance(value, functools.partial):
        return is_foreign(value.func) or is_foreign(value.args) or is_foreign(tuple(value.keywords.values()))
    return callable(value) and not is_of_a_library(value)


def is_of_a_library(value: Any) -> bool:
    """Whether a class, a function or an object that is called is defined in a library."""
    module = getattr(value, "__module__", None) or type(value).__module__
    return str(module).partition(".")[0] in LIBRARIES


def _entries(layer: keras.Layer) -> Iterator[tuple[Any, Any]]:
    """Yield what a layer holds that its calls may read, by attribute, key or position in a container."""
    for holder in holders(layer):
        items = holder.items() if isinstance(holder, dict) else enumerate(holder)
        yield from ((key, value) for key, value in items if key not in BOOKKEEPING)


def hooks_of(layer: keras.Layer) -> Iterator[dict[int, Any]]:
    """Yield the hooks of a layer, by kind."""
    yield from (getattr(layer, name) for name in _HOOKS)


def hooks_of_all_modules() -> Iterator[dict[int, Any]]:
    """Yield the hooks that torch calls for any module, by kind."""
    yield from (getattr(torch.nn.modules.module, f"_global{name}") for name in _HOOKS)


class Written(Protocol):
    """What programs have written into them, as it was."""

    def is_set_aside(self) -> bool:
        """Whether calls are not to be replayed for the moment."""

    def is_another(self) -> bool:
        """Whether it is something else now."""


class Automatic:
    """Says before each call of one function whether it may be taped or replayed.

    Args:
        what: what is called, in words.
        look: returns what programs of its calls have written into them, as it is now, or why there may be none.
        forget: lets go of all programs; called when that is no longer what it was.
        asked: whether somebody has asked for it, so that no calls are waited for.
        instead: what is logged of what else there is, where calls may not be.
    """

    def __init__(
        self,
        what: str,
        look: Callable[[], Written | str],
        forget: Callable[[], None],
        asked: bool = False,
        instead: str = "",
    ) -> None:
        self._what, self._look, self._forget, self._asked, self._instead = what, look, forget, asked, instead
        self._counts: Counter[Hashable] = Counter()  # of calls, by sort
        self._changes = 0
        self._state: Written | None = None  # from the first tape on
        self._is_off = False

    def lets(self, key: Hashable) -> bool:
        """Whether a call of this sort may be, which is one more."""
        if self._is_off:
            return False
        if self._state is not None and self._state.is_set_aside():
            return False
        if self._state is not None and self._state.is_another():
            self._begin_anew()
            return False
        if key in self._counts or len(self._counts) < MOST_SORTS:
            self._counts[key] += 1
        if self._counts[key] <= PATIENCE and not self._asked:
            return False
        if self._state is None:
            self._begin()
        return not self._is_off

    def lets_all(self) -> bool:
        """Whether calls of which there are programs may be replayed now; it is no call more."""
        state = self._state
        return not (self._is_off or state is None or state.is_set_aside() or state.is_another())

    def has_changed(self) -> bool:
        """Whether what programs have written into them is something else now."""
        return self._state is not None and self._state.is_another()

    def _begin_anew(self) -> None:
        self._forget()
        self._counts.clear()
        self._state, self._changes = None, self._changes + 1
        if self._changes == MOST_CHANGES:
            self._switch_off("what its code reads changes between calls")

    def _begin(self) -> None:
        found = self._look()
        if isinstance(found, str):
            self._switch_off(found)
        else:
            self._state = found

    def _switch_off(self, reason: str) -> None:
        self._is_off = True
        logger.info("[ModelParallel] %s runs as it is written: %s%s", self._what, reason, self._instead)


class State:
    """What layers hold, and which hooks they have, as it is now."""

    def __init__(self, layers: Mapping[str, keras.Layer]) -> None:
        self._hooks = [*hooks_of_all_modules(), *(hooks for layer in layers.values() for hooks in hooks_of(layer))]
        self._numbers = list(map(len, self._hooks))
        self._kinds = [type(layer) for layer in layers.values()]
        self._calls = [kind.call for kind in self._kinds]
        held = [each for layer in layers.values() for each in _held_by(layer)]
        self._wholes = [holder for holder, keys in held if keys is None]
        self._sizes = list(map(len, self._wholes))
        self._getters = [(_getter(present), holder) for holder, present in _with_keys(held, True) if present]
        self._missing = [(holder, key) for holder, absent in _with_keys(held, False) for key in absent]
        self._values = list(self._now())

    def is_set_aside(self) -> bool:
        """Whether there are other hooks, for as long as there are."""
        return list(map(len, self._hooks)) != self._numbers

    def is_another(self) -> bool:
        """Whether a layer has something in another's place, or its class another call."""
        if any(kind.call is not call for kind, call in zip(self._kinds, self._calls, strict=True)):
            return True
        if list(map(len, self._wholes)) != self._sizes or any(key in holder for holder, key in self._missing):
            return True
        try:
            return any(map(operator.is_not, self._now(), self._values))
        except KeyError:  # of what is there no more
            return True

    def _now(self) -> Iterator[Any]:
        wholes = (each.values() if isinstance(each, dict) else each for each in self._wholes)
        return itertools.chain.from_iterable([*wholes, *(get(holder) for get, holder in self._getters)])


Holder = dict[Any, Any] | list[Any]


def _getter(keys: Sequence[Any]) -> Callable[[Holder], tuple[Any, ...]]:
    """Return what gets the values under some keys, which takes less time than to ask for one after the other."""
    return operator.itemgetter(*keys, keys[0])  # always several, so that it is a tuple


def _with_keys(held: Iterable[tuple[Any, Sequence[Any] | None]], present: bool) -> Iterator[tuple[Any, list[Any]]]:
    """Yield holders with those of the keys looked at that are there, or are not."""
    yield from ((holder, [key for key in keys if (key in holder) == present]) for holder, keys in held if keys)


def _held_by(layer: keras.Layer) -> Iterator[tuple[Holder, Sequence[Any] | None]]:
    """Yield dicts and lists, and the keys under which it matters what is there; None for all of them."""
    own = vars(layer)
    inner = [key for key, module in own["_modules"].items() if not isinstance(module, torch.nn.ParameterDict)]
    yield own["_modules"], inner  # layers that are attributes, and the graph of a Sequential
    if isinstance(layer, keras.Model):  # what its trainer holds changes all the time
        yield own, OF_CALLS
        return
    yield own, [*OF_CALLS, "call", *(key for key in own if key not in BOOKKEEPING)]
    yield from ((holder, None) for holder in holders(layer) if holder is not own)
