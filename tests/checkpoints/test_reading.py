"""Models that are built without values and get them from files or initializers, each rank its own shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import torch

import tp_planner
from tests.checkpoints.files import WRITERS, tensors_of, write_all
from tests.models import CASES
from tests.workers import WorkerPool, layout_map
from tp_planner.checkpoints.formats import stored
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.storage.variables import local_tensor, whole_tensor

FORMATS = {"gpt": tuple(WRITERS), "tied": ("h5", "torch"), "llama": ("keras", "safetensors")}
Arrays = dict[str, np.ndarray]


def whole(model: keras.Model) -> Arrays:
    return {key: whole_tensor(variable).numpy().copy() for key, variable in named_variables(model).items()}


# On the ranks


def load(name: str, path: str, rename: bool = False) -> tuple[Arrays, np.ndarray, set[str]]:
    """Return the whole weights of a model that was built without values, what it computes, and where its shards are."""
    case = CASES[name]
    with keras.device("meta"):
        model = case.build("float32")
    names = {key: f"renamed.{key}" for key in named_variables(model)} if rename else None
    tp_planner.parallelize(model, layout_map(case.rules), weights=path, names=names)
    x, _ = case.batch(np.random.default_rng(0), 2)
    devices = {str(local_tensor(variable).device) for variable in named_variables(model).values()}
    return whole(model), model(x).detach().numpy(), devices


def load_all(paths: dict[str, dict[str, str]]) -> dict[tuple[str, str], Any]:
    return {(name, kind): load(name, path) for name, kinds in paths.items() for kind, path in kinds.items()}


def seeded(seed: int) -> keras.Model:
    """Return a model with initializers of all kinds."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((16,), name="x")
    x = keras.layers.Dense(24, name="up", bias_initializer="normal", activation="relu")(inputs)
    x = keras.layers.Dropout(0.5, name="drop")(x)
    x = keras.layers.Dense(16, name="down", kernel_initializer="orthogonal", bias_initializer=_counting)(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    return keras.Model(inputs, x, name="seeded")


def _counting(shape: Any, dtype: Any = None) -> Any:
    return keras.ops.arange(shape[0], dtype=dtype)


RULES = {"up/kernel": (None, "model"), "up/bias": ("model",), "down/kernel": ("model", None)}


def initialize() -> tuple[Arrays, dict[str, tuple[int, ...]], Arrays]:
    """Return the whole weights of a model whose initializers ran in shards, their shapes here, and it restored."""
    rank = torch.distributed.get_rank()
    with tp_planner.deferred_init():
        model = seeded(7 + rank)  # rank 0's is the truth
    tp_planner.parallelize(model, layout_map(RULES))
    shapes = {key: tuple(local_tensor(variable).shape) for key, variable in named_variables(model).items()}
    values = whole(model)
    model.compile("adam", "mse")
    model.train_on_batch(np.ones((4, 16)), np.ones((4, 16)))
    after = whole(model)
    tp_planner.restore(model)
    restored = {key: variable.numpy() for key, variable in named_variables(model).items()}
    np.testing.assert_equal(restored, after)
    return values, shapes


def waiting(path: str) -> tuple[Arrays, Arrays]:
    """Return the weights of a model that was loaded, and of one that was assigned to, before they had values."""
    with tp_planner.deferred_init():
        loaded, assigned = seeded(7), seeded(7)
        assigned.get_layer("up").kernel.assign(np.full((16, 24), 2.0))
    loaded.load_weights(path)
    assigned.get_layer("up").bias.assign(keras.ops.ones(24))
    return tuple(whole(tp_planner.parallelize(each, layout_map(RULES))) for each in (loaded, assigned))  # type: ignore[return-value]


def memory(path: str) -> tuple[int, int, int]:
    """Return in bytes how much memory loading took at its peak, this rank's shards, and the largest of them."""
    with keras.device("meta"):
        model = wide()
    plan = tp_planner.plan(
        model, layout_map({"wide_[13]/kernel": (None, "model"), "wide_[02]/kernel": ("model", None)})
    )
    status = Path("/proc/self/status")

    def figure(name: str) -> int:
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
    before = figure("VmRSS")
    with mock.patch.object(stored, "LARGEST_READ", 2**20):
        tp_planner.parallelize(model, plan, weights=path)
    sizes = [local_tensor(variable).nbytes for variable in model.variables]
    return figure("VmHWM") - before, sum(sizes), max(sizes)


def wide() -> keras.Model:
    x = inputs = keras.Input((2048,), name="x")
    for number in range(4):
        x = keras.layers.Dense(2048, use_bias=False, name=f"wide_{number}")(x)
    return keras.Model(inputs, x, name="wide")


def refusals(path: str, cut: str) -> list[str]:
    """Return what is said about models that get no values; each is as before afterwards."""
    case, messages = CASES["gpt"], []
    with keras.device("meta"):
        model = case.build("float32")
        small = case.build("float32", vocabulary=60)
    attempts: list[tuple[keras.Model, dict[str, Any]]] = [
        (model, {}),
        (model, {"weights": path + "x"}),
        (model, {"weights": path, "names": {"haed/kernel": "w"}}),
        (small, {"weights": path}),
        # Only rank 1's file is cut off.
        (model, {"weights": cut if torch.distributed.get_rank() else path}),
    ]
    for attempt, options in attempts:
        with pytest.raises(tp_planner.PlanError) as refusal:
            tp_planner.parallelize(attempt, layout_map(case.rules), **options)
        messages.append(str(refusal.value))
        assert all(variable._value.is_meta for variable in named_variables(attempt).values())
    tp_planner.parallelize(model, layout_map(case.rules), weights=path)
    return messages


# In the test's process


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, keras.Model], dict[str, dict[str, str]]]:
    models, paths = {}, {}
    for name in FORMATS:
        models[name] = CASES[name].build("float32", seed=3)
        written = write_all(models[name], tmp_path_factory.mktemp(name))
        paths[name] = {kind: written[kind] for kind in FORMATS[name]}
    return models, paths


@pytest.mark.parametrize("name", ["gpt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tied", "llama"))])
def test_every_format_is_read_in_shards(workers: WorkerPool, written: Any, name: str) -> None:
    """A model that is built on the meta device has the file's weights, bit for bit, and computes what it should."""
    models, paths = written
    for answers in workers.run(load_all, {name: paths[name]}):
        for (name, _), (weights, output, devices) in answers.items():
            np.testing.assert_equal(weights, {key: each.numpy() for key, each in tensors_of(models[name]).items()})
            x, _ = CASES[name].batch(np.random.default_rng(0), 2)
            np.testing.assert_allclose(output, models[name](x).detach().numpy(), rtol=1e-5, atol=1e-5)
            assert devices == {"cpu"}


def test_initializers_run_in_shards(workers: WorkerPool) -> None:
    """The values are those of a model that is built on one device from the seed of rank 0."""
    expected = {key: each.numpy() for key, each in tensors_of(seeded(7)).items()}
    size = workers.size
    for values, shapes in workers.run(initialize):
        np.testing.assert_equal(values, expected)
        assert shapes["up/kernel"] == (16, 24 // size)


def test_what_is_given_to_models_without_values_is_not_lost(pools: Any, tmp_path: Path) -> None:
    """Files are read, and arrays kept, until the model has its shards; the rest begins as on one device."""
    other, plain = seeded(7), seeded(7)
    seeded(8).save_weights(tmp_path / "other.weights.h5")
    other.load_weights(tmp_path / "other.weights.h5")
    plain.get_layer("up").kernel.assign(np.full((16, 24), 2.0))
    plain.get_layer("up").bias.assign(np.ones(24))
    for loaded, assigned in pools(2).run(waiting, str(tmp_path / "other.weights.h5")):
        np.testing.assert_equal(loaded, {key: each.numpy() for key, each in tensors_of(other).items()})
        np.testing.assert_equal(assigned, {key: each.numpy() for key, each in tensors_of(plain).items()})


def test_what_models_without_values_cannot_be_given(tmp_path: Path) -> None:
    """Each is an error that says what to do instead."""
    file, old = str(tmp_path / "model.keras"), str(tmp_path / "old.h5")
    seeded(8).save(file)
    seeded(8).save(old)
    with tp_planner.deferred_init():
        model = seeded(7)
        refusals = {
            f"{file}: keras.saving.load_model reads all values inside of tp_planner.deferred_init(); call it under "
            f"keras.device('meta') with compile=False, and give parallelize weights={file!r}": lambda: (
                keras.saving.load_model(file)
            ),
            f"model {model.name!r} was built without values, and .h5 files of old are read whole; "
            "call load_weights once tp_planner.parallelize has made the values": lambda: model.load_weights(old),
            "variable 'up/bias' was built without a value, and so was what is assigned to it; "
            "assign it once tp_planner.parallelize has made the values": lambda: model.get_layer("up").bias.assign(
                keras.ops.ones(24)
            ),
            f"tp_planner.load_checkpoint: model {model.name!r} was built without values; call tp_planner.parallelize "
            "first, which makes them": lambda: tp_planner.load_checkpoint(model, tmp_path),
        }
        for message, act in refusals.items():
            with pytest.raises(tp_planner.PlanError) as refusal:
                act()
            assert str(refusal.value) == message


@pytest.mark.parametrize("kind", ["h5", "safetensors", "torch"])
def test_no_rank_holds_more_than_its_shards(pools: Any, tmp_path: Path, kind: str) -> None:
    """Loading takes a rank's shards, and beside them less than the largest of these and one read."""
    name, write = WRITERS[kind]
    write(wide(), tmp_path / name)
    for peak, own, largest in pools(2).run(memory, str(tmp_path / name)):
        assert own == 4 * 2048 * 2048 * 4 // 2
        assert peak < own + largest + 2 * 2**20


def test_refusals_name_all_that_is_wrong(pools: Any, written: Any, tmp_path: Path) -> None:
    """Nothing is applied where values are missing, do not fit, or one rank cannot read them."""
    path = written[1]["gpt"]["safetensors"]
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(path).read_bytes()[:-5])
    first, second = pools(2).run(refusals, path, str(cut))
    misfit = f"{path}: tensor '{{}}' has shape {{}}, not the {{}} of variable '{{}}'"
    embeddings, head = "token_embedding/embeddings", "head/kernel"
    expected = (
        f"model 'gpt' was built on the meta device, so that '{embeddings}' and 37 other variables hold no values; "
        f"give parallelize weights=, or build the model under tp_planner.deferred_init() to have initializers run",
        f"{path}x: no such file or folder of weights",
        "names= has 'haed/kernel', which is no variable of model 'gpt'; closest: 'head/kernel'",
        f"3 problems:\n  - {misfit.format(embeddings, (64, 32), (60, 32), embeddings)}"
        f"\n  - {misfit.format(head, (32, 64), (32, 60), head)}"
        f"\n  - {misfit.format('head/bias', (64,), (60,), 'head/bias')}",
    )
    for messages in (first, second):
        assert tuple(messages[:4]) == expected
    damage = f"{cut}: tensor '{embeddings}' ends at byte 123904, the file at 123899; it is cut off: copy it again"
    assert first[4] == f"rank 1: {damage}"
    assert second[4] == damage
