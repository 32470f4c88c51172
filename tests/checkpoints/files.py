"""Files of weights as others write them: Keras, safetensors, torch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import keras
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from tp_planner.frontend.layer_tree import named_variables

Tensors = dict[str, torch.Tensor]


def tensors_of(model: keras.Model) -> Tensors:
    return {key: variable._value.detach().clone() for key, variable in named_variables(model).items()}


def save_dcp(tensors: Tensors, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is one process that saves
        dcp.save(dict(tensors), checkpoint_id=folder, no_dist=True)


def save_safetensors_in_two(tensors: Tensors, folder: Path) -> None:
    folder.mkdir()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# By format, the name of its file or folder, and what writes it.
WRITERS: dict[str, tuple[str, Callable[[keras.Model, Path], None]]] = {
    "h5": ("w.weights.h5", lambda model, path: model.save_weights(path)),
    "keras": ("w.keras", lambda model, path: model.save(path)),
    "keras in parts": ("w.weights.json", lambda model, path: model.save_weights(path, max_shard_size=3e-5)),
    "safetensors": ("w.safetensors", lambda model, path: save_file(tensors_of(model), path)),
    "safetensors in parts": ("safe", lambda model, path: save_safetensors_in_two(tensors_of(model), path)),
    "torch": ("dcp", lambda model, path: save_dcp(tensors_of(model), path)),
}


def write_all(model: keras.Model, folder: Path) -> dict[str, str]:
    """Write the model's weights in every format; return the paths by format."""
    for name, write in WRITERS.values():
        write(model, folder / name)
    return {format_: str(folder / name) for format_, (name, _) in WRITERS.items()}
