"""Keras's own loads into a model in shards: each rank reads what it stores of a file, not all of it.

Keras walks through the model and gives each variable what the file has at its place. What lies there in one piece is
given as an array that is mapped from the file and knows where: a variable in shards reads its parts from there, with
the other ranks where apart they would read more. Whoever else looks at the array reads what he looks at.
"""

from __future__ import annotations

import contextlib
import functools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import torch
import torch.distributed as dist
from keras.src.saving import saving_lib
from torch.distributed.tensor import DTensor

from tp_planner.checkpoints.contents import contents_of, pieces_of
from tp_planner.checkpoints.formats.hdf5 import begin_of_member, stored_tensor
from tp_planner.checkpoints.formats.stored import Buffer, Extent, RawFile, StoredTensor
from tp_planner.checkpoints.reading import Reading, reading_together
from tp_planner.ir.errors import PlanError
from tp_planner.job.together import together
from tp_planner.patches import wrap_for_good, wrapped
from tp_planner.storage.variables import ParallelVariable, is_in_shards

LOADING = "model.load_weights"
SMALLEST_PLACED = 2**20  # bytes; what is smaller is read whole
WHY = "no rank reads what others store"


def let_loads_read_shards() -> None:
    """From now on, let Keras's loads into models in shards read on each rank what it stores."""
    wrap_for_good(saving_lib, "load_weights_only", reading_shards, WHY)


def reading_shards(plain: Callable[..., None]) -> Callable[..., None]:
    """Return Keras's function that loads weights as one that reads on each rank what it stores; all have to call it."""

    @functools.wraps(plain)
    def load_weights_only(model: Any, filepath: Any, *args: Any, **kwargs: Any) -> None:
        kinds = {type(each) for each in _variables(model) if is_in_shards(each)}
        if not kinds or _Loading.on_this_rank or dist.get_world_size() == 1:
            plain(model, filepath, *args, **kwargs)
            return
        together(LOADING, lambda: _require_file(Path(filepath)))
        with contextlib.ExitStack() as stack:
            places = stack.enter_context(contextlib.closing(_Places()))
            reading = stack.enter_context(reading_together(LOADING))
            stack.enter_context(wrapped(saving_lib.H5IOStore, "__getitem__", places.placing, WHY))
            for kind in kinds:
                stack.enter_context(wrapped(kind, "assign", functools.partial(_reading_own, reading), WHY))
            stack.enter_context(_Loading())
            plain(model, filepath, *args, **kwargs)

    return load_weights_only


class _Loading:
    on_this_rank = False  # what it loads meanwhile is part of it

    def __enter__(self) -> None:
        _Loading.on_this_rank = True

    def __exit__(self, *error: object) -> None:
        _Loading.on_this_rank = False


def _variables(model: Any) -> list[Any]:
    return list(contents_of(model).values()) if isinstance(model, keras.Model) and model.built else []


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise PlanError(f"{path}: no such file of weights")


class ArrayInFile(np.memmap):
    """A tensor of a file as an array; ``stored`` is where it is, None of what was made of the array."""

    stored: StoredTensor | None = None


class _Places:
    """Where in their files the datasets are that Keras reads."""

    def __init__(self) -> None:
        self._files: dict[Path, RawFile] = {}
        self._buffer = Buffer()

    def close(self) -> None:
        """Read nothing more."""
        for file in self._files.values():
            file.close()

    def placing(self, plain: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        """Return what gives a store's value, as an array in its file where it lies there in one piece."""

        @functools.wraps(plain)
        def __getitem__(store: Any, key: str) -> Any:
            extent = self._extent(store, key)
            if extent is None:
                return plain(store, key)
            dtype = "bfloat16" if extent.dtype == torch.bfloat16 else torch.empty(0, dtype=extent.dtype).numpy().dtype
            array = ArrayInFile(extent.file.path, np.dtype(dtype), "c", extent.offset, extent.shape)
            array.stored = StoredTensor.of(extent)
            return array

        return __getitem__

    def _extent(self, store: Any, key: str) -> Extent | None:
        group = store._h5_entry_group
        if key not in group or not isinstance(group.get(key, getlink=True), h5py.HardLink):
            return None
        dataset = group[key]
        place = _file_of(store, dataset)
        if place is None or not isinstance(dataset, h5py.Dataset) or dataset.nbytes < SMALLEST_PLACED:
            return None
        path, begin = place
        if path not in self._files:
            self._files[path] = RawFile(path, self._buffer)
        tensor = stored_tensor(path, self._files[path], begin, key, dataset)
        found = None if tensor is None else tensor.chunks[0].stored
        return found if isinstance(found, Extent) else None


def _file_of(store: Any, dataset: Any) -> tuple[Path, int] | None:
    """Return the file that a dataset is in, and where in it HDF5's file begins; None if that is in memory alone."""
    if store.archive is None:
        path = Path(dataset.file.filename)
        return (path, 0) if path.is_file() else None
    path, name = Path(store.archive.filename or ""), Path(store.path_or_io).as_posix()
    member = store.archive.NameToInfo.get(name)
    if not path.is_file() or member is None or member.compress_type != zipfile.ZIP_STORED:
        return None
    return path, begin_of_member(path, member)


def _reading_own(reading: Reading, plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def assign(variable: Any, value: Any) -> Any:
        if not (isinstance(value, ArrayInFile) and value.stored is not None and _takes_parts(variable, value)):
            return plain(variable, value)
        own = variable._value
        part = torch.empty_like(own._local_tensor)
        reading.read(value.stored, pieces_of(variable), part)
        return plain(variable, DTensor(part, own._spec, requires_grad=False))

    return assign


def _takes_parts(variable: Any, value: Any) -> bool:
    """Whether a variable stores parts of a value; replicas have summands of a sum, and what does not fit is refused."""
    is_summed = isinstance(variable, ParallelVariable) and variable._stored.sharding.is_summed
    return is_in_shards(variable) and not is_summed and tuple(value.shape) == tuple(variable.shape)
