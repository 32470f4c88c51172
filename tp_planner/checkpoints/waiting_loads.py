"""Loads that wait: what Keras and KerasHub read into a model without values is read once ranks hold its shards.

The calls are noted with the variables that they may be meant for. Each rank makes them again, one variable after the
other, and keeps its shards: so ``from_preset`` of a folder works on models that fit no device.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch
from keras.src.legacy.saving import legacy_h5_format
from keras.src.saving import saving_lib

from tp_planner.checkpoints.loading import let_loads_read_shards
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.ir.errors import PlanError
from tp_planner.patches import wrap_for_good, wrapped
from tp_planner.storage.variables import BackendVariable, ParallelVariable

INITIALIZER = "_tp_planner_initializer"  # what a variable without values begins with: an initializer, or its value
_LOADS = "_tp_planner_loads"
# KerasHub's converters of other libraries' files: (saveable, loader of a folder, its config).
_CONVERTING = ("keras_hub.src.utils.transformers.", "keras_hub.src.utils.timm.")
_CONVERTERS = ("convert_weights", "convert_head")
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, order=True)
class Load:
    """A call that reads values of a model from ``source``."""

    number: int  # in the order of calls
    source: str = field(compare=False)
    read: Callable[[], Any] = field(compare=False)


def is_waiting(variable: Any) -> bool:
    """Whether a variable has no value yet and remembers how it begins."""
    return INITIALIZER in variable.__dict__ and bool(variable._value.is_meta)


def loads_for(variables: Iterable[Any]) -> list[Load]:
    """Return the calls that wait for any of these variables, in the order in which they were made."""
    return sorted({load for variable in variables for load in variable.__dict__.get(_LOADS, ())})


def forget_loads(variables: Iterable[Any]) -> None:
    """Let nothing wait for these variables any more."""
    for variable in variables:
        variable.__dict__.pop(_LOADS, None)


def read_waiting(variables: Iterable[Any]) -> set[int]:
    """Make the calls that wait for these variables, which hold memory by now; return the ``id`` of those assigned.

    Raises PlanError for what cannot be read.
    """
    filled: set[int] = set()
    for load in loads_for(variables):
        with _noting(filled):
            try:
                load.read()
            except Exception as error:
                raise PlanError(f"{load.source}: {type(error).__name__}: {error}") from error
    return filled


@contextlib.contextmanager
def _noting(filled: set[int]) -> Iterator[None]:
    """Inside, note the ``id`` of each variable that is assigned."""

    def noting(plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def assign(self: Any, value: Any) -> Any:
            filled.add(id(self))
            return plain(self, value)

        return assign

    why = "what is read is noted"
    with wrapped(BackendVariable, "assign", noting, why), wrapped(ParallelVariable, "assign", noting, why):
        yield


def let_loads_wait() -> None:
    """From now on, let whatever gives values to variables that wait for theirs wait as well, or be refused."""
    let_loads_read_shards()  # when they are made
    wrap_for_good(BackendVariable, "assign", _remembered, "values of variables that have none yet are made later")
    wrap_for_good(saving_lib, "load_weights_only", _reading_later, "a model without values is read in shards")
    for name in ("load_weights_from_hdf5_group", "load_weights_from_hdf5_group_by_name"):
        wrap_for_good(legacy_h5_format, name, _refused, "Keras closes the file")


def let_converters_wait() -> None:
    """Let KerasHub's converters wait, once they are imported."""
    for package in _CONVERTING:
        if package + "preset_loader" in sys.modules:
            for name in [each for each in sys.modules if each.startswith(package + "convert_")]:
                for converter in _CONVERTERS:
                    if hasattr(sys.modules[name], converter):
                        wrap_for_good(sys.modules[name], converter, _converting_later, "as of Keras's own files")


def _remembered(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def assign(self: Any, value: Any) -> Any:
        if not is_waiting(self):
            return plain(self, value)
        if isinstance(value, BackendVariable):
            value = value._value
        if getattr(value, "is_meta", False):
            raise PlanError(
                f"variable {self.path!r} was built without a value, and so was what is assigned to it; "
                f"assign it once tp_planner.parallelize has made the values"
            )
        result = plain(self, value)  # which looks at its shape, and copies nothing
        kept = value.detach().cpu().clone() if isinstance(value, torch.Tensor) else np.array(value)
        self.__dict__[INITIALIZER] = kept
        return result

    return assign


def _waiting_in(model: Any) -> list[Any]:
    variables = named_variables(model).values() if isinstance(model, keras.Model) else ()
    return [variable for variable in variables if is_waiting(variable)]


def _reading_later(plain: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(plain)
    def load_weights_only(model: Any, filepath: Any, *args: Any, **kwargs: Any) -> None:
        waiting = _waiting_in(model)
        if not waiting:
            plain(model, filepath, *args, **kwargs)
            return
        if not Path(filepath).is_file():
            raise FileNotFoundError(f"{filepath}: no such file of weights")
        _wait(waiting, str(filepath), functools.partial(plain, model, filepath, *args, **kwargs))

    return load_weights_only


def _converting_later(plain: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def convert(saveable: Any, loader: Any, *args: Any) -> None:
        waiting = _waiting_in(saveable)
        if not waiting:
            plain(saveable, loader, *args)
            return
        folder, prefix, file = loader.preset, loader.prefix, loader.fname

        def read() -> None:
            with type(loader)(folder, prefix=prefix, fname=file) as opened:
                plain(saveable, opened, *args)

        _wait(waiting, str(folder), read)

    return convert


def _wait(waiting: list[Any], source: str, read: Callable[[], Any]) -> None:
    load = Load(next(_numbers), source, read)
    for variable in waiting:
        variable.__dict__.setdefault(_LOADS, []).append(load)


def _refused(plain: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(plain)
    def load(file: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if _waiting_in(model):
            raise PlanError(
                f"model {model.name!r} was built without values, and .h5 files of old are read whole; "
                f"call load_weights once tp_planner.parallelize has made the values"
            )
        plain(file, model, *args, **kwargs)

    return load
