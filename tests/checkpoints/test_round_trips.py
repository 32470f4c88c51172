"""From every format and layout to every layout: the same bits of weights and optimizer, and the next losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest

import tp_planner
from tests.checkpoints.test_saving import PARTS, UNEVEN, mesh_map, share, whole
from tests.models import CASES
from tests.workers import Pools
from tp_planner.checkpoints import reading
from tp_planner.checkpoints.converting import convert
from tp_planner.checkpoints.formats.opening import open_weights
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.storage.variables import whole_tensor

Arrays = dict[str, np.ndarray]
MODELS: dict[str, dict[str, Any]] = {"gpt": {"vocabulary": 50}, "llama": {"tied": True}, "convnet": {}, "lora": {}}
# What writes each format of a model that is trained, and what reads it into one; Keras reads what it wrote.
FORMATS: dict[str, tuple[Callable[[Any, str], Any], Callable[[Any, str], Any]]] = {
    "checkpoints": (tp_planner.save_checkpoint, tp_planner.load_checkpoint),
    "model.keras": (lambda model, path: model.save(path), lambda model, path: model.load_weights(path)),
    "model.weights.h5": (lambda model, path: model.save_weights(path), lambda model, path: model.load_weights(path)),
    "parts.weights.json": (
        lambda model, path: model.save_weights(path, max_shard_size=5e-5),
        lambda model, path: model.load_weights(path),
    ),
}
ZEROS = {"gpt": (1, 3), "llama": (3,), "convnet": (1,), "lora": (1,)}  # the stages of ZeRO besides none
# In which models without values are born; the checkpoint's are in shards, the others whole.
CONVERTED = ("weights.safetensors", "folder")


LayoutOf = tuple[Any, int, int]  # rules, the number of replicas, the stage of ZeRO


def layouts(name: str, size: int) -> dict[str, LayoutOf]:
    """Return layouts by a name."""
    rules = CASES[case_of(name)].rules
    if size == 2:
        return {"2": (rules, 1, 0), **({"2 uneven": (UNEVEN, 1, 0)} if name == "gpt" else {})}
    found = {"4": (rules, 1, 0), "2x2": (rules, 2, 0), **{f"2x2 zero={zero}": (rules, 2, zero) for zero in ZEROS[name]}}
    return found | ({"2x2 in parts": (PARTS, 2, 0)} if name == "gpt" else {})


def case_of(name: str) -> str:
    return "mlp" if name == "lora" else name


def formats(name: str) -> tuple[str, ...]:
    """Return the formats that hold all of a model: Keras merges adapters into the weights that it writes."""
    return ("checkpoints",) if name == "lora" else tuple(FORMATS)


def compiled(name: str, seed: int) -> tuple[keras.Model, Any, Any]:
    case = CASES[case_of(name)]
    keras.utils.set_random_seed(seed)
    keras.utils.clear_session(free_memory=False)
    model = case.build("float64", seed=seed, **MODELS[name])
    if name == "lora":
        for layer in model.layers:
            if isinstance(layer, keras.layers.Dense):
                layer.enable_lora(3)
    x, y = case.batch(np.random.default_rng(0), 4)
    if name == "gpt":
        x, y = x % 50, y % 50
    model.compile(keras.optimizers.AdamW(0.01, name="adamw"), case.make_loss("float64"))
    return model, x, y


def shared(values: Any, replicas: int) -> Any:
    return keras.tree.map_structure(lambda each: share(each, replicas), values)


def parallel(name: str, seed: int, layout: LayoutOf) -> tuple[keras.Model, Any, Any]:
    """Return a model that has made two steps, so that its optimizer has its slots, and its share of the data."""
    (model, x, y), (_, replicas, _) = compiled(name, seed), layout
    tp_planner.parallelize(model, mesh_map(*layout), batch_axis="batch" if replicas > 1 else None)
    x, y = shared(x, replicas), shared(y, replicas)
    for _ in range(2):
        model.train_on_batch(x, y)
    return model, x, y


# On the ranks


def write(name: str, layout: LayoutOf, folder: str) -> tuple[Arrays, float]:
    """Write a trained model in every format; return all that it holds, and the next loss."""
    model, x, y = parallel(name, 1, layout)
    for kind in formats(name):
        FORMATS[kind][0](model, f"{folder}/{kind}")
    return whole(model), float(model.train_on_batch(x, y))


def read(name: str, layout: LayoutOf, folders: list[str]) -> list[tuple[str, str, Arrays, float]]:
    """Read what is in each folder, in each format, into one model; return what it then holds, and the next loss."""
    model, x, y = parallel(name, 2, layout)
    found = []
    for folder in folders:
        for kind in formats(name):
            with mock.patch.object(reading, "SMALLEST_SHARED", 1):
                FORMATS[kind][1](model, f"{folder}/{kind}")
            found.append((folder, kind, whole(model), float(model.train_on_batch(x, y))))
    return found


def born(name: str, layout: LayoutOf, paths: list[str]) -> list[tuple[str, Arrays]]:
    """Return the weights of models without values that are given those of a file."""
    _, replicas, _ = layout
    found = []
    for path in paths:
        with tp_planner.deferred_init():
            model, _, _ = compiled(name, 2)
        batch_axis = "batch" if replicas > 1 else None
        with mock.patch.object(reading, "SMALLEST_SHARED", 1):
            tp_planner.parallelize(model, mesh_map(*layout), batch_axis=batch_axis, weights=path)
        found.append((path, {key: whole_tensor(each).numpy().copy() for key, each in named_variables(model).items()}))
    return found


# In the test's process


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_from_every_layout_to_every_layout(pools: Pools, name: str, tmp_path: Path, record_property: Any) -> None:
    """Weights and optimizer are the same bits, and the next step's loss is the same."""
    saved: dict[str, tuple[Arrays, float]] = {}
    trips = 0
    for size in (2, 4):
        for label, layout in layouts(name, size).items():
            folder = tmp_path / label
            folder.mkdir()
            saved[str(folder)] = pools(size).run(write, name, layout, str(folder))[0]
    for size in (2, 4):
        for label, layout in layouts(name, size).items():
            for folder, kind, found, loss in pools(size).run(read, name, layout, list(saved))[0]:
                expected, next_loss = saved[folder]
                np.testing.assert_equal(found, expected, err_msg=f"{kind} of {folder} to {label}")
                np.testing.assert_allclose(loss, next_loss, rtol=1e-6)  # Keras tracks losses in float32
                trips += 1
    record_property("counted", f"{name}: {trips} round trips of format, mesh and layout")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "llama", "convnet"])
def test_converted_weights_to_every_layout(pools: Pools, name: str, tmp_path: Path) -> None:
    """Weights that were converted, and those that Keras has written, are read in shards as they are."""
    model, _, _ = compiled(name, 1)
    expected = {key: each.numpy() for key, each in named_variables(model).items()}
    tp_planner.save_checkpoint(model, tmp_path / "checkpoints")
    checkpoint = next((tmp_path / "checkpoints").glob("0*"))
    with open_weights(checkpoint) as weights:
        kept = {key.removeprefix("model/"): each for key, each in weights.tensors.items() if key.startswith("model/")}
        for kind in CONVERTED:
            convert(kept, tmp_path / kind)
    for kind in formats(name)[1:]:
        FORMATS[kind][0](model, str(tmp_path / kind))
    paths = [str(checkpoint), *(str(tmp_path / kind) for kind in (*CONVERTED, *formats(name)[1:]))]
    for size in (2, 4):
        for layout in layouts(name, size).values():
            for path, found in pools(size).run(born, name, layout, paths)[0]:
                np.testing.assert_equal(found, expected, err_msg=path)
