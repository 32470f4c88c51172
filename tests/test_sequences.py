"""Whatever people do to a model, in whatever order: it is what it is on one device, or one clear error says why not.

Each sequence of actions is done to two equal models, one of them sharded, in both ways of use. What is refused changes
nothing, and the next model in the process is right.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tp_planner
from tests.families import FAMILIES
from tests.layers.test_generation import prompts
from tests.models import building, randomize
from tests.workers import Pools, layout_map
from tp_planner.training.model import applied_to

WAYS = ("parallelize", "distribution")
DENSE_RULES = {"(.*/)?up/kernel": (None, "model"), "(.*/)?up/bias": ("model",), "(.*/)?down/kernel": ("model", None)}
TEXT_RULES = {
    "token_embedding/embeddings": ("model", None),
    ".*feedforward_intermediate_dense/kernel": (None, "model"),
    ".*feedforward_output_dense/kernel": ("model", None),
}
Arrays = dict[str, np.ndarray]


@dataclass
class Side:
    """One of the two models, and what an action needs to know of it."""

    model: keras.Model
    kind: str
    shards: bool  # whether it is the one that is sharded
    folder: str
    layouts: Any
    distributed: bool = False  # whether it was made under a distribution
    saved: str = ""  # the last file of weights

    def path(self, name: str) -> str:
        """Return where to write: a file of all ranks, or each rank's own if each has the whole model."""
        parallel = self.distributed or applied_to(self.model) is not None
        return f"{self.folder}/{'' if parallel else dist.get_rank()}{name}"

    @property
    def first(self) -> keras.layers.Layer:
        """A layer that is sharded, and that can be frozen."""
        if self.kind == "text":
            return self.model.backbone.get_layer("transformer_layer_0")._feedforward_intermediate_dense
        layers = self.model._flatten_layers(include_self=False)
        return next(layer for layer in layers if layer.name == "up")

    @property
    def batch(self) -> tuple[Any, Any]:
        rng = np.random.default_rng(5)
        if self.kind != "text":
            return rng.standard_normal((8, 6)), rng.standard_normal((8, 4))
        x = prompts()
        return x, x["token_ids"]


@keras.saving.register_keras_serializable("sequences")
class Subclassed(keras.Model):
    """A model with code of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.up, self.down = keras.layers.Dense(12, "gelu", name="up"), keras.layers.Dense(4, name="down")
        self.drop = keras.layers.Dropout(0.3, seed=3, name="drop")

    def build(self, shape: Any) -> None:
        self.up.build(shape)
        self.down.build((*shape[:-1], 12))
        self.built = True

    def call(self, x: Any, training: bool | None = None) -> Any:
        return self.down(self.drop(self.up(x), training=training))


def _functional() -> keras.Model:
    x = keras.Input((6,))
    y = keras.layers.Dropout(0.3, seed=3, name="drop")(keras.layers.Dense(12, "gelu", name="up")(x))
    return keras.Model(x, keras.layers.Dense(4, name="down")(y), name="dense")


def _sequential() -> keras.Model:
    layers = [keras.layers.Dense(12, "gelu", name="up"), keras.layers.BatchNormalization(name="norm")]
    return keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(4, name="down")], name="row")


def _nested() -> keras.Model:
    x = keras.Input((6,))
    inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(12, "gelu", name="up")], name="inner")
    return keras.Model(x, keras.layers.Dense(4, name="down")(inner(x)), name="outer")


def _subclassed() -> keras.Model:
    model = Subclassed(name="subclassed")
    model.build((None, 6))
    return model


DENSE = {"functional": _functional, "sequential": _sequential, "nested": _nested, "subclassed": _subclassed}
KINDS = (*DENSE, "text")


def rules(kind: str) -> dict[str, tuple[str | None, ...]]:
    return TEXT_RULES if kind == "text" else DENSE_RULES


def make(kind: str) -> keras.Model:
    keras.utils.set_random_seed(4)
    if kind == "text":
        return FAMILIES["gpt2"].build()
    with building("float64"):
        return randomize(DENSE[kind]())


# Actions: what each returns is compared.


def call(side: Side) -> Any:
    return side.model(keras.tree.map_structure(torch.from_numpy, side.batch[0]))


def build_another(side: Side) -> None:
    side.model = make(side.kind)


def clone(side: Side) -> None:
    weights = side.model.get_weights()
    side.model = keras.models.clone_model(side.model)
    side.model.set_weights(weights)


def call_a_layer(side: Side) -> Any:
    width = side.first._kernel.shape[0]
    return side.first(torch.from_numpy(np.random.default_rng(2).standard_normal((2, width)).astype("float32")))


def parallelize(side: Side) -> None:
    if side.shards:
        tp_planner.parallelize(side.model, side.layouts, inputs=side.batch[0])


def restore(side: Side) -> None:
    if side.shards:
        tp_planner.restore(side.model)
        side.model.jit_compile = False


def _compile(side: Side, optimizer: keras.optimizers.Optimizer, **options: Any) -> None:
    text = side.kind == "text"
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if text else "mse"
    side.model.compile(optimizer, loss, **options)


def compile_adam(side: Side) -> None:
    _compile(side, keras.optimizers.Adam(0.01, epsilon=1e-3, global_clipnorm=0.5))


def compile_replayed(side: Side) -> None:
    _compile(side, keras.optimizers.SGD(0.01, momentum=0.9), jit_compile=applied_to(side.model) is not None)


def fit(side: Side) -> Any:
    x, y = side.batch
    return side.model.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0).history["loss"]


def evaluate(side: Side) -> Any:
    return side.model.evaluate(*side.batch, batch_size=2, verbose=0)


def train_on_batch(side: Side) -> Any:
    return side.model.train_on_batch(*side.batch)


def predict(side: Side) -> Any:
    return side.model.predict(side.batch[0], batch_size=2, verbose=0)


def torch_loop(side: Side) -> Any:
    optimizer = torch.optim.AdamW(side.model.parameters(), 0.01, eps=1e-3)  # which keeps rounding small
    norms = []
    for _ in range(2):
        side.model.zero_grad()
        output = side.model(keras.tree.map_structure(torch.from_numpy, side.batch[0]), training=True)
        (output**2).mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(side.model.parameters(), 0.5))
        optimizer.step()
    return norms


def save_weights(side: Side) -> None:
    path = side.path("model.weights.h5")
    side.model.save_weights(path)
    side.saved = path


def save_and_load_checkpoint(side: Side) -> None:
    if applied_to(side.model) is not None:
        tp_planner.save_checkpoint(side.model, f"{side.folder}/checkpoints")
        weights = side.model.get_weights()
        side.model.set_weights([each * 0.5 for each in weights])
        try:
            tp_planner.load_checkpoint(side.model, f"{side.folder}/checkpoints")
        except tp_planner.TpPlannerError:
            side.model.set_weights(weights)
            raise


def set_weights(side: Side) -> None:
    side.model.set_weights([each * 0.5 for each in side.model.get_weights()])


def load_weights(side: Side) -> None:
    if side.saved:
        side.model.load_weights(side.saved)


def save_and_load_model(side: Side) -> None:
    path = side.path("model.keras")
    side.model.save(path)
    side.model = keras.saving.load_model(path)
    side.model.jit_compile = False  # which is torch.compile of a plain model


def freeze(side: Side) -> None:
    side.first.trainable = False


def unfreeze(side: Side) -> None:
    side.first.trainable = True


def add_lora(side: Side) -> None:
    keras.utils.set_random_seed(6)
    keras.config.set_floatx("float32" if side.kind == "text" else "float64")  # of which Keras makes its weights
    try:
        side.first.enable_lora(2)
    finally:
        keras.config.set_floatx("float32")


def quantize(side: Side) -> None:
    side.model.quantize("int8")


def generate(side: Side) -> Any:
    if side.kind == "text":
        return side.model.generate(prompts(), stop_token_ids=None)["token_ids"]
    return None


def export(side: Side) -> None:
    side.model.export(f"{side.folder}/{dist.get_rank()}exported.pt2", format="torch", verbose=False)


ACTIONS: dict[str, Callable[[Side], Any]] = {
    each.__name__: each
    for each in (
        call,
        build_another,
        clone,
        call_a_layer,
        parallelize,
        restore,
        compile_adam,
        compile_replayed,
        fit,
        evaluate,
        train_on_batch,
        predict,
        torch_loop,
        save_weights,
        load_weights,
        save_and_load_checkpoint,
        set_weights,
        save_and_load_model,
        freeze,
        unfreeze,
        add_lora,
        quantize,
        generate,
        export,
    )
}


# On the ranks


def do(actions: Sequence[str], kind: str, way: str, folder: str) -> list[str]:
    """Do the actions to both models; return what is wrong with them, and with the next model."""
    tp_planner.enable_keras_distribution()
    try:
        wrong = _do(actions, kind, way, folder)
    finally:
        tp_planner.disable_keras_distribution()
    return wrong + _next_model()


def _do(actions: Sequence[str], kind: str, way: str, folder: str) -> list[str]:
    scope = contextlib.nullcontext
    if way == "distribution":
        layouts = layout_map(rules(kind))
        scope = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch").scope
    for name in ("alone", "sharded"):
        os.makedirs(f"{folder}/{name}", exist_ok=True)
    alone = Side(make(kind), kind, False, f"{folder}/alone", None)
    with scope():
        layouts = layout_map(rules(kind))
        sharded = Side(make(kind), kind, True, f"{folder}/sharded", layouts, way == "distribution")
    wrong = []
    for number, name in enumerate(actions):
        if way == "distribution" and name == "parallelize":
            continue
        outcomes = []
        for side, around in ((sharded, scope), (alone, contextlib.nullcontext)):
            keras.utils.set_random_seed(number)
            try:
                with around():
                    outcomes.append(_arrays(ACTIONS[name](side)))
            except tp_planner.TpPlannerError:
                break  # what is refused of one is not done to the other
            except Exception as error:
                outcomes.append(error)
        wrong += [f"{number} {name}: {each}" for each in _differences(outcomes, sharded, alone, scope)]
        if wrong:
            break
    return wrong


def _differences(outcomes: list[Any], sharded: Side, alone: Side, scope: Any) -> list[str]:
    if len(outcomes) == 2:
        found, expected = outcomes
        if isinstance(found, Exception) != isinstance(expected, Exception):
            return [f"{_in_words(found)}, on one device {_in_words(expected)}"]
        if not isinstance(found, Exception) and not _close(found, expected, sharded.kind):
            return ["its result differs"]
    elif outcomes and isinstance(outcomes[0], Exception):
        return [_in_words(outcomes[0])]
    with scope():
        weights = [np.asarray(each) for each in sharded.model.variables]
    expected = [np.asarray(each) for each in alone.model.variables]
    if len(weights) != len(expected):
        return [f"there are {len(weights)} variables, on one device {len(expected)}"]
    paths = [each.path for each in alone.model.variables]
    return [
        f"{path} differs"
        for path, *pair in zip(paths, weights, expected, strict=True)
        if not _close(*pair, sharded.kind)
    ]


def _arrays(result: Any) -> Any:
    return [np.asarray(keras.ops.convert_to_numpy(each)) for each in keras.tree.flatten(result) if each is not None]


def _close(found: Any, expected: Any, kind: str) -> bool:
    tolerance = 2e-4 if kind == "text" else 1e-9
    pairs = zip(found, expected, strict=True) if isinstance(found, list) else [(found, expected)]
    return all(np.allclose(*pair, rtol=tolerance, atol=tolerance) for pair in pairs)


def _in_words(outcome: Any) -> str:
    return f"{type(outcome).__name__}: {str(outcome)[:600]}" if isinstance(outcome, Exception) else "nothing fails"


def _next_model() -> list[str]:
    """Train two new models, one of them sharded; return whether they differ."""
    losses = []
    for shards in (True, False):
        side = Side(make("functional"), "functional", shards, "", layout_map(DENSE_RULES))
        parallelize(side)
        compile_adam(side)
        losses.append(fit(side))
    return [] if np.allclose(*losses, rtol=1e-9) else [f"the next model is wrong: {losses}"]


# Found to matter: a checkpoint from before the first step, LoRA before and after sharding, what is refused and goes on.
CHOSEN = (
    (("parallelize", "compile_adam", "save_and_load_checkpoint", "fit", "add_lora", "restore", "fit"), "nested"),
    (("add_lora", "call", "freeze", "compile_adam", "fit", "save_weights", "load_weights", "predict"), "functional"),
    (("parallelize", "torch_loop", "build_another", "parallelize", "call_a_layer", "evaluate"), "sequential"),
)


def do_chosen(folder: str) -> list[str]:
    return [
        f"{kind}, {way}: {each}"
        for number, (actions, kind) in enumerate(CHOSEN)
        for way in WAYS
        for each in do(actions, kind, way, f"{folder}/{number} {way}")
    ]


# In the parent


def test_chosen_actions(pools: Pools, tmp_path: Path) -> None:
    """Each sequence, in both ways of use, does what it does on one device; so does the next model."""
    assert pools(2).run(do_chosen, str(tmp_path)) == [[], []]


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    actions=st.lists(st.sampled_from(sorted(ACTIONS)), min_size=3, max_size=9),
    kind=st.sampled_from(KINDS),
    way=st.sampled_from(WAYS),
)
def test_actions_in_any_order(
    pools: Pools, tmp_path_factory: pytest.TempPathFactory, actions: list[str], kind: str, way: str
) -> None:
    folder = str(tmp_path_factory.mktemp("files"))
    assert pools(2).run(do, actions, kind, way, folder) == [[], []]
