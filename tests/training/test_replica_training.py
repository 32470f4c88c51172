"""Whatever Keras trains with does across replicas what it does in one process on the whole batch."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.replicas import MODELS, Shape, layout, relative, share, weights
from tests.training.test_training import OPTIMIZERS, variables_of
from tests.workers import Pools
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.plan import Plan

# What asks for whole gradients, or for a decision that all ranks share, and what keeps its own state.
ASKING = [
    "clip each norm",
    "clip the global norm",
    "moving average",
    "accumulation",
    "loss scaling",
    "lamb",
    "adafactor",
    "muon",
]
ELEMENTWISE = [name for name in OPTIMIZERS if name not in ("lamb", "adafactor", "muon")]
SHARED = ["momentum", "clip values", *(name for name in ASKING if name in ELEMENTWISE)]


# On the ranks


def train_with(rules: str, optimizers: list[str]) -> dict[str, float]:
    """Return by optimizer and variable how far replicas are from one process, slots included."""
    case, errors = MODELS["mlp"], {}
    x, y = case.batch(np.random.default_rng(0), 8)
    replica = dist.get_rank() // 2
    for optimizer in optimizers:
        models = [case.build("float64") for _ in range(2)]
        tp_planner.parallelize(models[1], layout("mlp", rules, (2, 2)))
        for model, fed in zip(models, ((x, y), (share(x, replica, 2), share(y, replica, 2))), strict=True):
            model.compile(OPTIMIZERS[optimizer](), case.make_loss("float64"))
            for _ in range(4):
                model.train_on_batch(*fed)
        expected, found = (variables_of(model) for model in models)
        scale = max(float(np.abs(array).max()) for array in expected.values())
        errors |= {f"{optimizer}: {key}": float(np.abs(found[key] - expected[key]).max()) / scale for key in expected}
    return errors


def train_in_a_loop_of_ones_own(kind: str, rules: str) -> dict[str, float]:
    """Train without Keras's loop: gradients by ``torch.autograd.grad``, or added up over two backward passes."""
    case = MODELS["mlp"]
    models = [case.build("float64") for _ in range(2)]
    x, y = case.batch(np.random.default_rng(0), 8)
    tp_planner.parallelize(models[1], layout("mlp", rules, (2, 2)))
    replica = dist.get_rank() // 2
    for model, fed in zip(models, ((x, y), (share(x, replica, 2), share(y, replica, 2))), strict=True):
        optimizer = keras.optimizers.SGD(0.1)
        variables = model.trainable_variables
        for _ in range(3):
            if kind == "autograd.grad":
                loss = case.make_loss("float64")(fed[1], model(fed[0], training=True))
                gradients = torch.autograd.grad(loss, [variable.value for variable in variables])
            else:
                for _ in range(2):
                    case.make_loss("float64")(fed[1], model(fed[0], training=True)).backward()
                gradients = [variable.value.grad for variable in variables]
            optimizer.apply(gradients, variables)
            model.zero_grad()
    expected, found = map(weights, models)
    return {key: relative(found[key], expected[key]) for key in expected}


def save_and_load(folder: str) -> tuple[dict[str, float], str]:
    """Return how far weights are that were saved by replicas and loaded by a plain model, and again by replicas."""
    case = MODELS["gpt"]
    models = [case.build("float64", seed=seed) for seed in (0, 1, 2)]
    x, _ = case.batch(np.random.default_rng(0), 4)
    for model in models[:2]:
        tp_planner.parallelize(model, layout("gpt", "both axes", (2, 2)), x)
    path = str(Path(folder) / "replicas.weights.h5")
    models[0].save_weights(path)
    for model in models[1:]:
        model.load_weights(path)
    with contextlib.redirect_stdout(io.StringIO()):
        verification = tp_planner.verify_model_parallel(models[0])
    expected = weights(models[0])
    errors = {}
    for name, model in zip(("replicas", "plain"), models[1:], strict=True):
        errors |= {f"{name}: {key}": relative(array, expected[key]) for key, array in weights(model).items()}
    return errors, str(verification)


def drop_out(seeded: bool) -> tuple[list[bytes], bytes]:
    """Return what two calls in training make of the same input on this rank, and a number drawn after them."""
    inputs = keras.Input((64,))
    outputs = keras.layers.Dropout(0.5, seed=3 if seeded else None, name="dropout")(inputs)
    outputs = keras.layers.Dense(64, name="up", kernel_initializer="identity")(outputs)
    model = keras.Model(inputs, outputs)
    tp_planner.parallelize(model, layout("mlp", "model axis", (2, 2)))
    calls = [model(np.ones((2, 64), "float32"), training=True).detach().numpy().tobytes() for _ in range(2)]
    return calls, torch.rand(4).numpy().tobytes()


def planned_on_meshes() -> list[str]:
    """Return what ranks hear that have different meshes."""
    shape: Shape = (2, 2) if dist.get_rank() else (4, 1)
    try:
        tp_planner.parallelize(MODELS["mlp"].build(), layout("mlp", "model axis", shape), batch_axis="batch")
    except tp_planner.PlanError as refusal:
        return list(refusal.problems)
    return []


class Drops(keras.layers.Layer):
    """Drops half of its input, drawing from a generator that is given to it."""

    def __init__(self, generator: keras.random.SeedGenerator, **options: Any) -> None:
        super().__init__(**options)
        self.generator = generator

    def call(self, x: Any, training: bool = False) -> Any:
        return keras.random.dropout(x, 0.5, seed=self.generator) if training else x


def pair_with(penalty: str | None, generator: Any = None) -> keras.Model:
    inputs = keras.Input((4,), name="inputs")
    x = keras.layers.Dense(8, kernel_regularizer=penalty, name="up")(inputs)
    for number in range(2 if generator else 0):
        x = Drops(generator, name=f"drop_{number}")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="down")(x), name="pair")
    rng = np.random.default_rng(3)
    model.set_weights([rng.standard_normal(weight.shape).astype(weight.dtype) for weight in model.get_weights()])
    return model


IN_PARTS = Layout(Mesh((("batch", 2), ("model", 1))), (LayoutRule("up/kernel", ("batch", None)),))


def train_with_an_empty_share() -> float:
    """Train on a batch of one row, of which replica 1 gets none; return how far the weights are from one process."""
    x, y = np.ones((1, 4), "float32"), np.zeros((1, 2), "float32")
    models, rank = [pair_with("l2"), pair_with("l2")], dist.get_rank()
    tp_planner.parallelize(models[1], IN_PARTS, np.ones((2, 4), "float32"), batch_axis="batch")
    for model, rows in zip(models, (slice(None), slice(rank, 1)), strict=True):
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
        model.train_on_batch(x[rows], y[rows])
    found, expected = weights(models[1]), weights(models[0])
    return max(relative(found[key], expected[key]) for key in expected)


class Keeping(keras.layers.Dense):
    """A Dense layer that holds on to the kernel that it has used, and uses it twice."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kept: list[Any] = []
        self.keeps = False

    def call(self, x: Any, training: bool = False) -> Any:
        if self.keeps:
            self.kept.append(self._kernel.value)
        return super().call(x) + keras.ops.sin(keras.ops.matmul(x, self._kernel))


def train_where_a_rank_keeps_a_weight() -> float:
    """Train with a layer that keeps its weight alive on rank 0 alone; return how far the weights are from one process.

    Backward passes go through the graph once, then twice.
    """
    inputs = keras.Input((4,), name="inputs")
    x, y = np.random.default_rng(0).standard_normal((2, 6, 4)).astype("float32")
    models, rank = [], dist.get_rank()
    for _ in range(2):
        first = keras.layers.Dense(4, name="first")(inputs)  # so that the weight is needed on the way back
        model = keras.Model(inputs, Keeping(4, name="up")(first), name="keeping")
        model.set_weights([np.linspace(-1, 1, w.size).reshape(w.shape) for w in model.get_weights()])
        models.append(model)
    tp_planner.parallelize(models[1], IN_PARTS, np.ones((3, 4), "float32"), batch_axis="batch")
    models[1].get_layer("up").keeps = rank == 0
    for model, rows in zip(models, (slice(None), slice(3 * rank, 3 * rank + 3)), strict=True):
        optimizer, variables = keras.optimizers.SGD(0.1), model.trainable_variables
        for times in (1, 2):
            model.zero_grad()
            loss = keras.losses.MeanSquaredError()(y[rows], model(x[rows], training=True))
            for left in reversed(range(times)):
                loss.backward(retain_graph=left > 0)
            optimizer.apply([variable.value.grad for variable in variables], variables)
    assert len(models[1].get_layer("up").kept) == (2 if rank == 0 else 0)
    found, expected = weights(models[1]), weights(models[0])
    return max(relative(found[key], expected[key]) for key in expected)


def restore_with_a_shared_generator() -> bool:
    """Shard and restore a model of which two layers draw from one generator; return whether it is as before."""
    generator = keras.random.SeedGenerator(7)
    model = pair_with(None, generator)
    tp_planner.parallelize(model, IN_PARTS, np.ones((2, 4), "float32"), batch_axis="batch")
    tp_planner.restore(model)
    return "next" not in generator.__dict__


# In the parent


def test_an_empty_share_takes_part_in_penalties(pools: Pools) -> None:
    """The penalty of a weight in parts communicates, on a replica without rows too, and is the same."""
    assert max(pools(2).run(train_with_an_empty_share)) < 1e-6


def test_a_weight_that_one_rank_keeps(pools: Pools) -> None:
    """All ranks put a weight in parts together alike, whatever one of them still has of it."""
    assert max(pools(2).run(train_where_a_rank_keeps_a_weight)) < 1e-6


def test_layers_that_share_a_generator(pools: Pools) -> None:
    """A generator that two layers draw from is a replica's own once, and everybody's again after restore."""
    assert pools(2).run(restore_with_a_shared_generator) == [True, True]


@pytest.mark.parametrize(
    ("rules", "optimizers"),
    [
        pytest.param("model axis", ASKING, marks=pytest.mark.slow),
        pytest.param("both axes", ASKING, marks=pytest.mark.slow),
        ("model axis, zero 1", ["momentum"]),
        pytest.param("model axis, zero 1", SHARED, marks=pytest.mark.slow),
        pytest.param("both axes, zero 1", ELEMENTWISE, marks=pytest.mark.slow),
        pytest.param("model axis, zero 1", ELEMENTWISE, marks=pytest.mark.slow),
        pytest.param("model axis, zero 3", [*ELEMENTWISE, "lamb"], marks=pytest.mark.slow),
    ],
)
def test_optimizers(pools: Pools, rules: str, optimizers: list[str]) -> None:
    """Weights and slots after four steps are those of one process, whole gradients needed or not."""
    for errors in pools(4).run(train_with, rules, optimizers):
        assert {key: error for key, error in errors.items() if not error <= 1e-11} == {}


@pytest.mark.parametrize("rules", ["both axes", "model axis, zero 1"])
@pytest.mark.parametrize("kind", ["autograd.grad", "two backward passes"])
def test_a_loop_of_ones_own(pools: Pools, kind: str, rules: str) -> None:
    """Gradients that no hook has seen are averaged when they are applied; those that were added up are right too."""
    for errors in pools(4).run(train_in_a_loop_of_ones_own, kind, rules):
        assert {key: error for key, error in errors.items() if not error <= 1e-12} == {}


def test_saving_and_loading(pools: Pools, tmp_path: Path) -> None:
    """One ordinary file of whole weights, whichever axis a weight is stored in parts over."""
    for errors, verification in pools(4).run(save_and_load, str(tmp_path)):
        assert {key: error for key, error in errors.items() if error} == {}
        assert verification == (
            "[ModelParallel] Verification Summary:\n"
            "  - Total devices: 4\n"
            "  - Sharded variables: 23\n"
            "  - Replicated variables: 15\n"
            "  - Model parallel is ACTIVE"
        )


@pytest.mark.parametrize("seeded", [False, True])
def test_replicas_drop_out_on_their_own(pools: Pools, seeded: bool) -> None:
    """Ranks of one replica draw the same mask, replicas different ones, and another in each call.

    What is drawn afterwards is the same on all ranks.
    """
    ranks = pools(4).run(drop_out, seeded)
    calls, after = [each[0] for each in ranks], [each[1] for each in ranks]
    assert calls[0] == calls[1]
    assert calls[2] == calls[3]
    assert len({calls[0][0], calls[0][1], calls[2][0], calls[2][1]}) == 4
    assert len(set(after)) == 1


def test_ranks_with_different_meshes_refuse_together(pools: Pools) -> None:
    message = (
        "ranks have different meshes (rank 0: (batch=4, model=1), the batch over 'batch'; "
        "rank 1: (batch=2, model=2), the batch over 'batch'; rank 2: (batch=2, model=2), the batch over 'batch'; "
        "rank 3: (batch=2, model=2), the batch over 'batch'); give all of them the same"
    )
    assert pools(4).run(planned_on_meshes) == [[message]] * 4


class Remembering(keras.layers.Layer):
    """Keeps a mean of what it has seen."""

    def build(self, shape: Any) -> None:
        self.mean = self.add_weight(shape=(shape[-1],), trainable=False, name="mean")

    def call(self, x: Any) -> Any:
        self.mean.assign(0.9 * self.mean + 0.1 * keras.ops.mean(x, axis=0))
        return x - self.mean


def small(*layers: keras.layers.Layer) -> keras.Model:
    inputs = outputs = keras.Input((8,), name="inputs")
    for layer in layers:
        outputs = layer(outputs)
    return keras.Model(inputs, outputs, name="small")


def plan_across(model: keras.Model, shape: Shape = (2, 1)) -> Plan:
    return tp_planner.plan(model, layout("mlp", "no rules", shape), batch_axis="batch")


def test_state_of_each_replica_is_noted() -> None:
    """A layer of one's own that remembers the batch is named; batch normalization remembers all of it."""
    plan = plan_across(small(keras.layers.BatchNormalization(name="norm"), Remembering(name="remembering")))
    assert plan.notes == (
        "layer 'remembering' sets 'remembering/mean' in training: each replica sets its own, from its share of the "
        "batch, and that of rank 0 is saved; let the layer combine them if they have to agree",
    )


def test_gradients_travel_in_buckets_of_25_mib() -> None:
    """Last variables first; one that is larger is alone, frozen ones do not travel, and several have a mark each."""
    with keras.device("meta"):
        widths = {"first": 4096, "second": 2048, "third": 1024}
        model = small(*(keras.layers.Dense(width, name=name) for name, width in widths.items()))
    model.get_layer("first").trainable = False
    plan = plan_across(model)
    assert plan.buckets == (("third/bias", "third/kernel", "second/bias"), ("second/kernel",))
    elements = [1024 + 2048 * 1024 + 2048 + 3, 4096 * 2048]
    assert [(each.place, each.bytes) for each in plan.collectives] == [
        ("samples of each replica", 8),
        *((f"gradients {number}", 4 * size) for number, size in enumerate(elements)),
    ]


def test_report_of_replicas() -> None:
    """The text says what is split over which axis, and where a collective runs."""
    text = str(plan_across(small(keras.layers.Dense(4, name="only")))).splitlines()
    assert text[:5] == [
        "Plan for 'small' on mesh (batch=2, model=1): layers are split over 'model', 1 rank",
        "the batch is split over 'batch': 2 replicas, each with its own share",
        "traced with inputs 2x8 float32 of one replica",
        "R: whole on every rank; S(d): sharded on dim d; P: a summand on every rank",
        "batch S(d): each shard is stored in parts over the batch axis, and put together for use",
    ]
    assert [line.split() for line in text if "over 'batch'  " in line] == [
        ["1", "backward", "all_reduce", "samples", "of", "each", "replica,", "over", "'batch'", "8", "8"],
        ["1", "backward", "all_reduce", "gradients", "0,", "over", "'batch'", "152", "152"],
    ]


def test_keys_of_variables_are_in_buckets_once() -> None:
    plan = tp_planner.plan(MODELS["gpt"].build(), layout("gpt", "both axes", (2, 2)))
    in_parts = {each.key for each in plan.variables if str(each.batch_placement) != "R"}
    averaged = [key for bucket in plan.buckets for key in bucket]
    assert sorted([*averaged, *in_parts]) == sorted(named_variables(MODELS["gpt"].build()))
