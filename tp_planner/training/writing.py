"""Who writes: rank 0 writes what Keras, or KerasHub, writes of a model; the others give their shards and wait.

It is asked of every method of a parallel model, and of all models and layers inside it, that writes files, and of
Keras's functions that are given one. Under a distribution it is asked of every model.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import torch.distributed as dist
from keras.src.legacy.saving import legacy_h5_format
from keras.src.saving import saving_lib
from keras.src.utils import file_utils

from tp_planner.files import written_aside
from tp_planner.frontend.layer_tree import named_layers
from tp_planner.patches import wrap_for_good
from tp_planner.storage.persistence import save_together
from tp_planner.storage.variables import is_in_shards

METHODS = (
    "save",
    "save_weights",
    "save_lora_weights",
    "save_task_weights",
    "save_to_preset",
    "export_to_transformers",
)
# To these all others of Keras come.
FUNCTIONS = (
    (saving_lib, "save_model"),
    (saving_lib, "save_weights_only"),
    (legacy_h5_format, "save_model_to_hdf5"),
)

IN_MEMORY = "a model in shards may be larger than the memory of any process"

WHOLE = "_tp_planner_whole"  # attribute of each layer of a parallel model


@dataclass(frozen=True, slots=True)
class Whole:
    """The parallel model that a layer belongs to, which lives as long as the layer; Keras saves no attribute of it."""

    model: keras.Model


def write_together(model: keras.Model, undo: list[Callable[[], None]]) -> None:
    """Let rank 0 write for all, whatever method of a parallel model or its layers is called; add what undoes it."""
    for module, name in FUNCTIONS:
        wrap_for_good(module, name, written_by_rank_zero, "one rank writes what belongs to all")
    wrap_for_good(saving_lib, "is_memory_sufficient", through_the_disk, IN_MEMORY)
    for layer in named_layers(model).values():
        layer.__dict__[WHOLE] = Whole(model)
        undo.append(functools.partial(layer.__dict__.pop, WHOLE, None))
        for name in METHODS:
            if hasattr(type(layer), name):
                plain = getattr(type(layer), name).__get__(layer)
                layer.__dict__[name] = functools.wraps(plain)(functools.partial(_write, layer, name, plain))
                undo.append(functools.partial(layer.__dict__.pop, name, None))


def _write(layer: keras.Layer, name: str, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if name == "save_lora_weights":  # which comes to no function of Keras
        plain = functools.partial(_write_aside, plain)
    return save_with_all_ranks(f"model.{name}", layer, lambda: plain(*args, **kwargs))


def written_by_rank_zero(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method or function, given a model first, that writes on rank 0 what belongs to all ranks."""

    @functools.wraps(plain)
    def write(model: Any, *args: Any, **kwargs: Any) -> Any:
        if WHOLE not in model.__dict__ and not is_distributed(model):
            return plain(model, *args, **kwargs)
        own = functools.partial(plain, model)
        return save_with_all_ranks(f"model.{plain.__name__}", model, lambda: _write_aside(own, *args, **kwargs))

    write.by_tp_planner = True  # type: ignore[attr-defined]
    return write


def through_the_disk(plain: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return Keras's question whether a model's weights, on their way from or to a file, may all be in memory."""

    @functools.wraps(plain)
    def is_memory_sufficient(model: Any) -> bool:
        return not is_distributed(model) and plain(model)

    return is_memory_sufficient


def _write_aside(write: Callable[..., Any], filepath: Any, *args: Any, **kwargs: Any) -> Any:
    """Let Keras write a file in its place only when it is whole; what Keras would refuse to write, it refuses."""
    is_file = isinstance(filepath, str | os.PathLike) and str(filepath).endswith((".keras", ".h5", ".hdf5", ".json"))
    asks = os.path.exists(filepath) and False in (kwargs.get("overwrite"), *args) if is_file else True
    if asks or file_utils.is_remote_path(filepath) or not Path(filepath).absolute().parent.is_dir():
        return write(filepath, *args, **kwargs)
    index = Path(filepath).with_suffix(".json")
    before = _shards_of(index)
    with written_aside(filepath) as aside:
        result = write(str(aside), *args, **kwargs)
        if before & _shards_of(aside.with_suffix(".json")):
            _rename_shards(aside.with_suffix(".json"))
    if before and not before & _shards_of(index):
        _clear(index, before)
    return result


def _shards_of(index: Path) -> set[str]:
    """Return the names of the files in which weights are that Keras has written in several; none if it has not."""
    if not index.name.endswith(".weights.json") or not index.is_file():
        return set()
    weights: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return set(keras.tree.flatten(weights))


def _rename_shards(index: Path) -> None:
    """Give the files of weights new names: those to which the index before refers stay until it is replaced."""
    written, mark = json.loads(index.read_text(encoding="utf-8")), secrets.token_hex(4)
    for shard in _shards_of(index):
        index.with_name(shard).rename(index.with_name(f"{mark}_{shard}"))
    written["weight_map"] = keras.tree.map_structure(lambda shard: f"{mark}_{shard}", written["weight_map"])
    index.write_text(json.dumps(written, indent=4), encoding="utf-8")


def _clear(index: Path, shards: set[str]) -> None:
    """Delete files to which the index refers no more; of the first name that Keras gives, an empty file stays.

    Keras opens that file whatever the index says.
    """
    for shard in shards:
        if shard.endswith("_00000.weights.h5") and shard.startswith(index.name.removesuffix(".weights.json")):
            with written_aside(index.with_name(shard)) as aside:
                saving_lib.H5IOStore(str(aside), mode="w").close()
        else:
            index.with_name(shard).unlink(missing_ok=True)


def save_with_all_ranks(what: str, layer: Any, save: Callable[[], Any]) -> Any:
    """Run ``save`` on rank 0, which may read any variable of the model that a layer belongs to; return what it returns.

    Raises ParallelRuntimeError if another rank has ended, calls something else, or ``save`` failed on rank 0.
    """
    whole: Whole | None = layer.__dict__.get(WHOLE)
    return save_together(what, _variables(layer if whole is None else whole.model, layer), save)


def _variables(model: Any, layer: Any) -> Iterator[Any]:
    yield from model.variables
    for each in {id(each): each for each in (model, layer)}.values():
        if getattr(each, "optimizer", None) is not None:
            yield from each.optimizer.variables


def is_distributed(model: Any = None) -> bool:
    """Whether a distribution is in use, or a model is stored in shards, and this is one of several processes.

    The first time that it is asked under a distribution, the process group is started.
    """
    distribution = keras.distribution.distribution()
    if distribution is not None and not dist.is_initialized() and distribution.num_processes > 1:
        _ = distribution.device_mesh.backend_mesh
    several = dist.is_initialized() and dist.get_world_size() > 1
    return several and (distribution is not None or (model is not None and any(map(is_in_shards, model.variables))))
