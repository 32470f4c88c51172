"""Who holds a parameter beside its variable: nobody holds a whole one, and what was taken early stays up to date."""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

import tp_planner
from tests.keras_distribution.test_model_parallel import model_parallel
from tests.models import building, randomize
from tests.replicas import whole
from tests.workers import Pools, WorkerPool, layout_map
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.storage.forwarding import _Forwarding
from tp_planner.storage.variables import is_sharded

layers = keras.layers
WIDTH, HIDDEN = 24, 40
RULES = {".*up/kernel": (None, "model"), ".*up/bias": ("model",), ".*down/kernel": ("model", None)}


def up() -> keras.Layer:
    return layers.Dense(HIDDEN, activation="gelu", name="up")


def down() -> keras.Layer:
    return layers.Dense(WIDTH, name="down")


def functional(name: str = "inner") -> keras.Model:
    x = keras.Input((WIDTH,))
    return keras.Model(x, down()(up()(x)), name=name)


def sequential(name: str = "inner") -> keras.Model:
    return keras.Sequential([keras.Input((WIDTH,)), up(), down()], name=name)


def around(inner: keras.Model) -> keras.Model:
    x = keras.Input((WIDTH,))
    return keras.Model(x, layers.Dense(3, name="head")(inner(x)), name="outer")


class Own(keras.Model):
    def __init__(self) -> None:
        super().__init__(name="own")
        self.up, self.down = up(), down()

    def call(self, x: Any) -> Any:
        return self.down(self.up(x))


def subclassed() -> keras.Model:
    model = Own()
    model(np.zeros((2, WIDTH), keras.config.floatx()))
    return model


def over_time(layer: keras.Layer) -> keras.Model:
    x = keras.Input((3, WIDTH))
    return keras.Model(x, layer(x), name="over time")


def with_lora() -> keras.Model:
    model = functional()
    model.get_layer("up").enable_lora(4)
    return model


def tied() -> keras.Model:
    embedding = layers.ReversibleEmbedding(HIDDEN, WIDTH, name="embedding")
    x = keras.Input((3,), dtype="int32")
    return keras.Model(x, embedding(layers.Dense(WIDTH, name="middle")(embedding(x)), reverse=True), name="tied")


def wrapped() -> keras.Model:
    module = torch.nn.Sequential(torch.nn.Linear(WIDTH, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, WIDTH))
    x = keras.Input((WIDTH,))
    wrapper = layers.TorchModuleWrapper(module.double(), name="wrapped", output_shape=(None, WIDTH))
    return keras.Model(x, wrapper(x), name="outer")


def spectral() -> keras.Model:
    x = keras.Input((WIDTH,))
    return keras.Model(x, down()(layers.SpectralNormalization(up(), name="norm")(x)), name="outer")


LSTM = {".*/(recurrent_)?kernel": (None, "model")}
KINDS: dict[str, tuple[Callable[[], keras.Model], dict[str, tuple[str | None, ...]]]] = {
    "functional": (functional, RULES),
    "sequential": (sequential, RULES),
    "functional in sequential": (
        lambda: keras.Sequential([keras.Input((WIDTH,)), functional(), layers.Dense(3, name="head")]),
        RULES,
    ),
    "sequential in functional": (lambda: around(sequential()), RULES),
    "sequential in sequential in functional": (lambda: around(keras.Sequential([sequential()], name="middle")), RULES),
    "subclassed": (subclassed, RULES),
    "time distributed": (lambda: over_time(layers.TimeDistributed(sequential(), name="time")), RULES),
    "bidirectional": (lambda: over_time(layers.Bidirectional(layers.LSTM(HIDDEN), name="both")), LSTM),
    "wrapper": (spectral, RULES),
    "torch module": (wrapped, {"wrapped/0.weight": ("model", None), "wrapped/2.weight": (None, "model")}),
    "lora": (with_lora, RULES),
    "tied": (tied, {"embedding/embeddings": ("model", None)}),
}
# What `make test` builds under a distribution, too.
BORN = {"functional", "sequential", "subclassed", "tied"}
# A thread of gloo holds the tensors of a collective until it runs again, after whoever waited for it went on.
LET_GO_S = 10


# On the ranks


def walk(kind: str, born: bool) -> list[str]:
    """Return what is wrong with what lives on this rank when the model is sharded, trained and restored."""
    build, rules = KINDS[kind]
    with building("float64"):
        alone = built(build)
        train_once(alone)
        want = alone.state_dict()
        known = {id(each) for each in live(torch.Tensor)}
        with model_parallel(rules) if born else contextlib.nullcontext():
            model = built(build)
            taken = list(model.parameters())
            if not born:
                tp_planner.parallelize(model, layout_map(rules), inputs=batch(model))
            model(batch(model))
            wrong = whole_weights(model, known, "after parallelize")
            states = {tuple(each.shape) for each in model.state_dict().values() if isinstance(each, DTensor)}
            if states != {tuple(each.shape) for each in named_variables(model).values() if is_sharded(each)}:
                wrong.append(f"state_dict hands out {states}")
            train_once(model)
            wrong += whole_weights(model, known, "after a step")
    del taken
    tp_planner.restore(model)
    model.optimizer = None
    shards = [each for each in live(DTensor) if id(each) not in known and not isinstance(each, _Forwarding)]
    wrong += [f"after restore: a DTensor of {tuple(each.shape)}" for each in shards]
    have = model.state_dict()
    assert len(have) == len(want)
    for (key, value), expected in zip(have.items(), want.values(), strict=True):
        if "seed_generator" in key:
            continue
        if type(value) is not torch.Tensor or not torch.allclose(value, expected, atol=1e-6):
            wrong.append(f"after restore: state_dict has another {key}, by {abs(value - expected).max():.1e}")
    return wrong


def built(build: Callable[[], keras.Model]) -> keras.Model:
    keras.utils.set_random_seed(0)
    return randomize(build())


def live(kind: type) -> list[Any]:
    """Return every tensor of a kind that Python knows."""
    gc.collect()
    return [each for each in gc.get_objects() if issubclass(type(each), kind)]


def whole_weights(model: keras.Model, known: set[int], when: str) -> list[str]:
    """Return the live tensors, but those known before, that are as large as a sharded matrix of the model."""
    matrices = [each for each in named_variables(model).values() if is_sharded(each) and len(each.shape) > 1]
    smallest = min(int(np.prod(each.shape)) * 8 for each in matrices)

    def kept() -> list[str]:
        found = [each for each in live(torch.Tensor) if id(each) not in known and not isinstance(each, DTensor)]
        with torch._C.DisableTorchFunctionSubclass():  # of what forwards, the tensor itself
            large = [each for each in found if each.device.type != "meta"]
            large = [each for each in large if each.untyped_storage().nbytes() >= smallest]
        return [f"{when}: a tensor of {tuple(each.shape)}" for each in large]

    end = time.monotonic() + LET_GO_S
    while (wrong := kept()) and time.monotonic() < end:
        time.sleep(0.01)
    return wrong


def train_once(model: keras.Model) -> None:
    x = batch(model)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.train_on_batch(x, np.ones(tuple(model(x).shape)))


def batch(model: keras.Model) -> np.ndarray:
    rng = np.random.default_rng(0)
    if model.name == "tied":
        return rng.integers(0, HIDDEN, (2, 3)).astype("int32")
    return rng.standard_normal((2, 3, WIDTH) if model.name == "over time" else (2, WIDTH))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01, amsgrad=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 0.01),
}


def train(model: keras.Model, optimizer: torch.optim.Optimizer, steps: int, losses: list[float]) -> None:
    x = np.random.default_rng(1).standard_normal((6, WIDTH))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))


def loop(name: str, way: str) -> Any:
    """Train with an optimizer, a hook and a list of parameters that are all taken from the plain model."""
    with building("float64"):
        alone = use_what_was_taken(name, randomize(sequential()), lambda model: None, lambda model: None)
        if way == "parallelize":
            return alone, use_what_was_taken(
                name,
                randomize(sequential()),
                lambda model: tp_planner.parallelize(model, layout_map(RULES)),
                tp_planner.restore,
            )
        with model_parallel(RULES):
            return alone, use_what_was_taken(name, randomize(sequential()), lambda model: None, tp_planner.restore)


def use_what_was_taken(name: str, model: keras.Model, shard: Any, restore: Any) -> Any:
    losses: list[float] = []
    seen: list[Any] = []
    optimizer, taken = OPTIMIZERS[name](model.parameters()), dict(model.named_parameters())
    kernel = next(each for key, each in taken.items() if key.endswith("up/kernel"))
    handle = kernel.register_hook(lambda gradient: seen.append(whole(gradient)))
    train(model, optimizer, 2, losses)
    shard(model)
    train(model, optimizer, 2, losses)
    handle.remove()
    held = [whole(each) for each in taken.values()]
    copies = [whole(each) for each in copy.deepcopy(taken).values()]
    gradient = whole(kernel.grad)
    restore(model)
    train(model, optimizer, 2, losses)
    return losses, seen, held, copies, gradient, [whole(each) for each in taken.values()], model.get_weights()


# In the parent


@pytest.mark.parametrize(
    ("kind", "born"),
    [
        *((kind, False) for kind in KINDS),
        *(pytest.param(kind, True, marks=[] if kind in BORN else pytest.mark.slow) for kind in KINDS),
    ],
)
def test_nobody_holds_a_whole_weight(pools: Pools, kind: str, born: bool) -> None:
    """After sharding and after a step no whole sharded weight lives; after restore no shard, and all state is whole."""
    assert pools(2).run(walk, kind, born) == [[], []]


@pytest.mark.parametrize("way", ["parallelize", "keras.distribution"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_was_taken_early_is_of_the_sharded_model(workers: WorkerPool, name: str, way: str) -> None:
    """An optimizer, a hook and a list taken from a model go on with it, sharded and restored, as on one device."""
    for alone, sharded in workers.run(loop, name, way):
        for want, have in zip(keras.tree.flatten(alone), keras.tree.flatten(sharded), strict=True):
            np.testing.assert_allclose(have, want, rtol=1e-12, atol=1e-14)
