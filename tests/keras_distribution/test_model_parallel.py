"""Models under ``keras.distribution.ModelParallel``: planned when first called, the same function as on one device."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import tp_planner
from tests import test_parity as parity
from tests.models import CASES
from tests.replicas import whole
from tests.workers import Pools, layout_map
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.storage.variables import is_sharded
from tp_planner.training.model import applied_to

USUAL = ("gpt", "llama", "subclassed", "tied")  # the others are tested by `make sweep`
PAIR = {".*up/kernel": (None, "model"), ".*up/bias": ("model",), ".*down/kernel": ("model", None)}


# On the ranks


@contextlib.contextmanager
def model_parallel(rules: Any) -> Iterator[keras.distribution.ModelParallel]:
    """Enable keras.distribution and make the rules current on a mesh of all ranks; undo both afterwards."""
    tp_planner.enable_keras_distribution()
    try:
        distribution = keras.distribution.ModelParallel(layout_map=layout_map(rules), batch_dim_name="batch")
        with distribution.scope():
            yield distribution
    finally:
        tp_planner.disable_keras_distribution()


def train_under_distribution(name: str, dtype: str, born: bool) -> parity.Trained:
    """Train the case alone on rank 0, then under a distribution.

    ``born``: the model is built under the distribution, else before it.
    """
    case = CASES[name]
    batches = parity.make_batches(case)
    single = parity._train_alone(case, {}, dtype, batches) if dist.get_rank() == 0 else None
    model = None if born else case.build(dtype)
    with model_parallel(case.rules):
        model = model or case.build(dtype)
        in_shards = [key for key, variable in named_variables(model).items() if isinstance(variable._value, DTensor)]
        record = parity.begin(model, case, dtype, batches[0])
        parity.train(model, case, dtype, batches[: parity.STEPS], record)
        sharded = [key for key, variable in named_variables(model).items() if is_sharded(variable)]
        assert sharded
        assert in_shards == (sharded if born else [])
        replicas = parity._replicas(model)
    return parity.Trained(single, record, replicas, [])


def pair(name: str = "pair") -> keras.Model:
    x = keras.Input((8,), name="x")
    y = keras.layers.Dense(16, activation="relu", name="up")(x)
    return keras.Model(x, keras.layers.Dense(8, name="down")(y), name=name)


class Pair(keras.Model):
    """Builds its layers in its first call."""

    def __init__(self) -> None:
        super().__init__(name="own")
        self.up = keras.layers.Dense(16, activation="relu", name="up")
        self.down = keras.layers.Dense(8, name="down")

    def call(self, x: Any) -> Any:
        return self.down(self.up(x))


class Conditioned(keras.Model):
    """Takes three tensors and a number: one is nested, one is optional."""

    def __init__(self) -> None:
        super().__init__(name="conditioned")
        self.up = keras.layers.Dense(16, activation="relu", name="up")
        self.down = keras.layers.Dense(8, name="down")
        self.gate = keras.layers.Dense(16, name="gate")

    def call(self, x: Any, condition: Any, scale: float = 1.0, training: bool = False, **more: Any) -> Any:
        y = self.up(x) * self.gate(condition["a"]) * scale
        y = self.down(y)
        return y + keras.ops.sin(self.up(more["extra"]))[:, :8] if more else y


def call_with_several_arguments(form: str) -> tuple[Any, Any]:
    """Return outputs and the gradients of a model that takes several arguments: alone, and under the distribution."""
    x, y = data(6)
    condition, extra = {"a": y}, x[::-1].copy()

    def results(model: keras.Model) -> list[np.ndarray]:
        for _ in range(2):  # the second call is made under the plan that the first one has made
            model.zero_grad()
            match form:
                case "keywords":
                    output = model(x=x, condition=condition, extra=extra, scale=0.5, training=True)
                case "positions":
                    output = model(x, condition, extra=extra, scale=0.5)
                case "defaults":
                    output = model(x, condition)
            keras.ops.sum(keras.ops.square(output)).backward()
        assert is_sharded(model.up.kernel) == (keras.distribution.distribution() is not None)
        grads = [variable.value.grad for variable in model.trainable_variables]
        return [whole(array) for array in (output, *grads)]

    keras.utils.set_random_seed(0)
    alone = results(Conditioned())
    with model_parallel(PAIR | {".*gate/kernel": (None, "model")}):
        keras.utils.set_random_seed(0)
        return alone, results(Conditioned())


def data(rows: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.standard_normal((rows, 8)).astype("float32"), rng.standard_normal((rows, 8)).astype("float32")


def fit_in_one_go(kind: str) -> tuple[Any, Any]:
    """Return history and weights of a training by fit: alone with rank 0's seed, and under the distribution."""

    def train(scope: Any = None) -> tuple[Any, Any]:
        keras.config.set_dtype_policy("mixed_float16" if kind == "mixed precision" else "float32")
        with scope or contextlib.nullcontext():
            model = Pair() if kind == "subclassed" else pair()
        model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
        history = model.fit(*data(), batch_size=8, epochs=3, validation_split=0.2, verbose=0).history
        weights = [np.array(weight) for weight in model.weights]
        return history, [*weights, model.predict(data()[0], verbose=0), model.evaluate(*data(), verbose=0)]

    keras.utils.set_random_seed(0)
    alone = train()
    keras.utils.set_random_seed(dist.get_rank())  # rank 0's numbers are the truth
    with model_parallel(PAIR) as distribution:
        if kind != "scope":
            return alone, train()
        keras.distribution.set_distribution(None)
        return alone, train(distribution.scope())


def load_and_train_on(folder: str) -> tuple[Any, Any]:
    """Return the losses of a saved model that trains on: alone, and under the distribution."""
    path, (x, y) = os.path.join(folder, "saved.keras"), data()
    keras.utils.set_random_seed(0)
    model = pair()
    model.compile(keras.optimizers.AdamW(0.01), "mse")
    model.fit(x, y, epochs=2, batch_size=8, verbose=0)
    if dist.get_rank() == 0:
        model.save(path)
    dist.barrier()
    alone = model.fit(x, y, epochs=2, batch_size=8, shuffle=False, verbose=0).history["loss"]
    with model_parallel(PAIR):
        loaded = keras.models.load_model(path)
        slots = [type(slot._value).__name__ for slot in loaded.optimizer.variables]
        found = loaded.fit(x, y, epochs=2, batch_size=8, shuffle=False, verbose=0).history["loss"]
    return alone, (found, slots.count("DTensor"))


def births() -> dict[str, Any]:
    """Return what is seen of a variable that is born in shards, before and without any plan."""
    seen: dict[str, Any] = {}
    alive: list[weakref.ref[Any]] = []
    at_once = []

    def initializer(shape: Any, dtype: Any = None) -> Any:
        at_once.append(sum(ref() is not None for ref in alive))
        value = torch.arange(np.prod(shape), dtype=torch.float32).reshape(shape)
        alive.append(weakref.ref(value.untyped_storage()))
        return value

    with model_parallel({".*kernel": (None, "model"), ".*wrong": ("model", None, None)}):
        layers = [keras.layers.Dense(8, kernel_initializer=initializer, name=f"dense_{n}") for n in range(4)]
        for layer in layers:
            layer.build((None, 4))
        kernel = layers[0].kernel
        seen["most whole values at once"] = max(at_once)
        seen["local shape"] = tuple(kernel._value.to_local().shape)
        seen["storage"] = kernel._value._local_tensor.untyped_storage().nbytes()
        seen["whole"] = np.array(kernel)
        seen["bias"] = type(layers[0].bias._value).__name__
        seen["repr"] = repr(kernel)
        kernel.assign(np.ones((4, 8)))
        seen["assigned"] = np.array(kernel)
        kernel.assign(kernel * 2)
        seen["doubled"] = np.array(kernel)
        with pytest.raises(ValueError, match="assign the whole value") as refusal:
            kernel.assign(np.ones((4, 4)))
        seen["refusal"] = str(refusal.value)
        x = torch.ones((2, 4))
        output = layers[0](x)
        output.sum().backward()
        seen["output"] = output.detach().numpy()
        seen["gradient"] = kernel._value.grad.full_tensor().numpy()
        seed = keras.random.SeedGenerator(1)
        seen["seed"] = (seed.state._value.requires_grad, type(seed.state._value).__name__)
        seen["misfit"] = type(keras.Variable(np.ones(4), name="wrong")._value).__name__
        slot = keras.optimizers.Adam()
        slot.build([kernel])
        seen["slot"] = tuple(slot.variables[-1]._value.to_local().shape)
    seen["outside"] = type(keras.Variable(np.ones((4, 4)), name="kernel")._value).__name__
    return seen


def load_and_save(folder: str) -> dict[str, Any]:
    """Load weights into a model that is born in shards, save it before it is ever called, and after."""
    plain, path = pair(), os.path.join(folder, "plain.weights.h5")
    if dist.get_rank() == 0:
        plain.save_weights(path)
    dist.barrier()
    with model_parallel(PAIR):
        model = pair()
        model.load_weights(path)
        before, after = os.path.join(folder, "before.keras"), os.path.join(folder, "after.weights.h5")
        model.save(before)
        x = data()[0]
        output = model.predict(x, verbose=0)
        model.save_weights(after)
    dist.barrier()
    reloaded = keras.models.load_model(before)
    again = pair()
    again.load_weights(after)
    return {name: each.predict(x, verbose=0) for name, each in {"reloaded": reloaded, "again": again}.items()} | {
        "output": output,
        "files": sorted(os.listdir(folder)),
    }


def nested_and_shared() -> dict[str, Any]:
    """Call models that contain others, or share layers with them, in turn."""
    with model_parallel(PAIR):
        inner = pair("inner")
        x = data()[0]
        first = inner.predict(x, verbose=0)
        z = keras.Input((8,), name="z")
        outer = keras.Model(z, keras.layers.Dense(2, name="head")(inner(z)), name="outer")
        outer.compile("sgd", "mse")
        outer.train_on_batch(x, np.zeros((len(x), 2)))
        second = inner.predict(x, verbose=0)  # runs as the outer model's plan says
        features = keras.Model(inner.inputs, inner.layers[1].output, name="features")
        third = features.predict(x, verbose=0)  # shares a layer: planned for itself
        outer.train_on_batch(x, np.zeros((len(x), 2)))  # and the outer one anew
        states = [applied_to(each) is not None for each in (inner, outer, features)]
        weights = [np.array(weight) for weight in outer.weights]
        slots = [tuple(slot._value.shape) for slot in outer.optimizer.variables]
    return {"first": first, "second": second, "third": third, "states": states, "weights": weights, "slots": slots}


def nested_alone() -> dict[str, Any]:
    """The same on one device."""
    keras.utils.set_random_seed(0)
    inner, x = pair("inner"), data()[0]
    z = keras.Input((8,), name="z")
    outer = keras.Model(z, keras.layers.Dense(2, name="head")(inner(z)), name="outer")
    first = inner.predict(x, verbose=0)
    outer.compile("sgd", "mse")
    outer.train_on_batch(x, np.zeros((len(x), 2)))
    second = inner.predict(x, verbose=0)
    third = keras.Model(inner.inputs, inner.layers[1].output).predict(x, verbose=0)
    outer.train_on_batch(x, np.zeros((len(x), 2)))
    return {"first": first, "second": second, "third": third, "weights": [np.array(weight) for weight in outer.weights]}


def nested_both() -> tuple[dict[str, Any], dict[str, Any]]:
    alone = nested_alone()
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    return alone, nested_and_shared()


def refusals() -> dict[str, str]:
    """Return what users hear."""
    heard, (x, y) = {}, data()

    def hear(name: str, call: Callable[[], Any]) -> None:
        with pytest.raises(ValueError) as error:  # noqa: PT011  the whole message is compared
            call()
        heard[name] = str(error.value)

    with model_parallel({"down/kernal": (None, "model"), ".*up/kernel": (None, "model", None)}):
        model = pair()
        hear("layout", lambda: model.predict(x, verbose=0))
        assert applied_to(model) is None
        model.compile("sgd", "mse", jit_compile=True)
        hear("jit", lambda: model.fit(x, y, verbose=0))
        mesh = keras.distribution.DeviceMesh((1, 8), ("batch", "model"), [f"cpu:{n}" for n in range(8)])
        layouts = keras.distribution.LayoutMap(mesh)
        layouts[".*up/kernel"] = (None, "model")
        with keras.distribution.ModelParallel(layout_map=layouts).scope():
            hear("processes", pair)
    return heard


# In the parent


@pytest.mark.parametrize(
    "name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_models_built_under_a_distribution(pools: Pools, name: str) -> None:
    """Outputs, gradients, losses and weights are those of one device; what is sharded was so from the beginning."""
    dtype = "float32" if name == "gpt" else "float64"
    check(pools(2).run(train_under_distribution, name, dtype, True), dtype)


@pytest.mark.slow
def test_models_on_four_ranks(pools: Pools) -> None:
    check(pools(4).run(train_under_distribution, "gpt", "float64", True), "float64")


def test_a_distribution_that_is_set_after_the_model_is_built(pools: Pools) -> None:
    """The model is sharded when it is first called."""
    check(pools(2).run(train_under_distribution, "gpt", "float64", False), "float64")


def check(ranks: list[parity.Trained], dtype: str) -> None:
    single, tolerance = ranks[0].single, parity.TOLERANCE[dtype]
    assert single is not None
    for trained in ranks:
        assert parity.differences(trained.sharded.outputs, single.outputs, tolerance) == {}
        assert parity.gradient_differences(trained.sharded, single, tolerance) == {}
        assert trained.sharded.losses == pytest.approx(single.losses, rel=1e-6 if dtype == "float64" else 1e-5)
        assert parity.differences(trained.sharded.weights, single.weights, tolerance) == {}
        assert trained.replicas == ranks[0].replicas


@pytest.mark.parametrize("kind", ["functional", "subclassed", "scope", "mixed precision"])
def test_fit_with_nothing_but_a_distribution(pools: Pools, kind: str) -> None:
    """One seed on rank 0 gives the weights, the shuffled batches and the history of one process, on every rank.

    "scope" builds the model inside of the distribution's scope, and trains it outside.
    """
    half = kind == "mixed precision"
    for (history, results), (found, found_results) in pools(2).run(fit_in_one_go, kind):
        assert found.keys() == history.keys()
        for key in history:
            assert found[key] == pytest.approx(history[key], rel=5e-3 if half else 1e-5)
        for a, b in zip(found_results, results, strict=True):
            np.testing.assert_allclose(a, b, rtol=5e-2 if half else 1e-4, atol=5e-3 if half else 1e-6)


@pytest.mark.parametrize("form", ["keywords", "positions", "defaults"])
def test_models_that_take_several_arguments(pools: Pools, form: str) -> None:
    """A model is planned with all that it is called with: outputs and gradients are those of one device."""
    for alone, found in pools(2).run(call_with_several_arguments, form):
        for one, other in zip(alone, found, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def test_a_saved_model_trains_on(pools: Pools, tmp_path: Path) -> None:
    """Model and optimizer load into shards: both moments of kernels and of one bias."""
    for alone, (found, slots) in pools(2).run(load_and_train_on, str(tmp_path)):
        assert found == pytest.approx(alone, rel=1e-5)
        assert slots == 6


def test_births(pools: Pools) -> None:
    """A variable that is born in shards holds only its shard, and reads, takes and computes with the whole value."""
    for seen in pools(2).run(births):
        assert seen["most whole values at once"] == 0
        assert seen["local shape"] == (4, 4)
        assert seen["storage"] == 4 * 4 * 4
        np.testing.assert_array_equal(seen["whole"], np.arange(32).reshape(4, 8))
        assert seen["bias"] == "Parameter"
        assert seen["repr"] == "<Variable path=dense_0/kernel, shape=(4, 8), dtype=float32, stored in shards>"
        np.testing.assert_array_equal(seen["assigned"], np.ones((4, 8)))
        np.testing.assert_array_equal(seen["doubled"], np.full((4, 8), 2.0))
        assert seen["refusal"] == (
            "the value assigned to 'dense_0/kernel' has shape (4, 4), the variable has shape (4, 8); "
            "assign the whole value"
        )
        np.testing.assert_array_equal(seen["output"], np.full((2, 8), 8.0))
        np.testing.assert_array_equal(seen["gradient"], np.full((4, 8), 2.0))
        assert seen["seed"] == (False, "Parameter")
        assert seen["misfit"] == "Parameter"
        assert seen["slot"] == (4, 4)
        assert seen["outside"] == "Parameter"


def test_loading_into_shards_and_saving(pools: Pools, tmp_path: Path) -> None:
    """Weights load into shards; rank 0 writes one file, whether the model was called or not."""
    for seen in pools(2).run(load_and_save, str(tmp_path)):
        assert seen["files"] == ["after.weights.h5", "before.keras", "plain.weights.h5"]
        np.testing.assert_allclose(seen["reloaded"], seen["output"], rtol=1e-5)
        np.testing.assert_allclose(seen["again"], seen["output"], rtol=1e-5)


def test_models_inside_others_and_beside_them(pools: Pools) -> None:
    """The model that is called is planned; a model inside it follows its plan, one that shares layers takes turns."""
    for alone, seen in pools(2).run(nested_both):
        assert seen["states"] == [False, True, False]
        for key in ("first", "second", "third"):
            np.testing.assert_allclose(seen[key], alone[key], rtol=1e-4, atol=1e-6)
        for found, expected in zip(seen["weights"], alone["weights"], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_refusals(pools: Pools) -> None:
    """Mistakes are told when the model is first called, or where the first variable needs the processes."""
    for heard in pools(2).run(refusals):
        assert heard == {
            "layout": "2 problems:\n"
            "  - layout rule '.*up/kernel' -> (None, model, None) has 3 entries, variable 'up/kernel' of shape (8, 16) "
            "has 2 dims; write one entry per dim\n"
            "  - layout rule 'down/kernal' matches no variable; closest: 'down/kernel'",
            "jit": "model 'pair' is compiled with jit_compile=True before it is planned; "
            "call it once and compile it then, or call model.compile(..., jit_compile=False)",
            "processes": "the mesh has 8 devices, the job has 2 processes; start torchrun with --nproc-per-node=8 or "
            "make a mesh of 2 devices",
        }
