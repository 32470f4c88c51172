"""Opening weights, whatever their format; the path tells which it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tp_planner.checkpoints.formats import hdf5, safetensors, torch_dcp
from tp_planner.checkpoints.formats.stored import Weights
from tp_planner.ir.errors import PlanError

_BY_ENDING: tuple[tuple[str, Callable[[Path], Weights]], ...] = (
    (".weights.h5", hdf5.open_hdf5),
    (".weights.json", hdf5.open_hdf5_index),
    (".keras", hdf5.open_keras),
    (".safetensors", safetensors.open_safetensors),
    (".safetensors.index.json", safetensors.open_safetensors_index),
)
_IN_FOLDERS: tuple[tuple[str, Callable[[Path], Weights]], ...] = (
    (torch_dcp.INDEX, lambda path: torch_dcp.open_dcp(path.parent)),
    (safetensors.INDEX, safetensors.open_safetensors_index),
    ("model.safetensors", safetensors.open_safetensors),
    ("model.weights.json", hdf5.open_hdf5_index),
    ("model.weights.h5", hdf5.open_hdf5),
)


def open_weights(path: Path) -> Weights:
    """Return what a file, or a folder, of weights holds; nothing of it is read yet but where things are.

    Raises PlanError for what is no such file, is damaged or cut off, or would have code run or other files read.
    """
    if path.is_dir():
        for name, open_it in _IN_FOLDERS:
            if (path / name).is_file():
                return open_it(path / name)
        known = ", ".join(name for name, _ in _IN_FOLDERS)
        raise PlanError(f"{path}: holds no weights; expected one of {known}")
    if not path.is_file():
        raise PlanError(f"{path}: no such file or folder of weights")
    for ending, open_it in _BY_ENDING:
        if path.name.endswith(ending):
            return open_it(path)
    known = ", ".join(ending for ending, _ in _BY_ENDING)
    raise PlanError(f"{path}: unknown format of weights; the name ends in one of {known}, or is that of a folder")


def is_of_keras(path: Path) -> bool:
    """Whether names in this file are those that Keras gives to places in a model, as ``layers/dense/vars/0``."""
    of_keras = (hdf5.open_hdf5, hdf5.open_hdf5_index, hdf5.open_keras)
    if path.is_dir():
        found = next((open_it for name, open_it in _IN_FOLDERS if (path / name).is_file()), None)
        return found in of_keras
    return any(path.name.endswith(ending) and open_it in of_keras for ending, open_it in _BY_ENDING)
