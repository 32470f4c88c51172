"""Whatever Keras trains with works on a sharded model and gives what it gives on a single device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.models import CASES
from tests.workers import WorkerPool, layout_map
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.ir.mesh import Mesh
from tp_planner.job.process_group import planning_axes
from tp_planner.training.optimizer import ParallelOptimizer, adopt_optimizer, release_optimizer

STEPS = 4

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda: keras.optimizers.Adam(0.01, epsilon=1e-3, amsgrad=True),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, epsilon=1e-3),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, epsilon=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda: keras.optimizers.Adagrad(0.01, epsilon=1e-3),
    "adadelta": lambda: keras.optimizers.Adadelta(0.5, epsilon=1e-3),
    "adamax": lambda: keras.optimizers.Adamax(0.01, epsilon=1e-3),
    "nadam": lambda: keras.optimizers.Nadam(0.01, epsilon=1e-3),
    "ftrl": lambda: keras.optimizers.Ftrl(0.01),
    "lion": lambda: keras.optimizers.Lion(1e-4),
    "lamb": lambda: keras.optimizers.Lamb(0.01, epsilon=1e-3),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "muon": lambda: keras.optimizers.Muon(0.01),
    "clip each norm": lambda: keras.optimizers.Adam(0.01, clipnorm=0.01, epsilon=1e-3),
    "clip the global norm": lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.1, epsilon=1e-3),
    "clip values": lambda: keras.optimizers.SGD(0.01, clipvalue=1e-3),
    "moving average": lambda: keras.optimizers.AdamW(
        0.01, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2, epsilon=1e-3
    ),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2, epsilon=1e-3),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01, global_clipnorm=0.1, epsilon=1e-3), initial_scale=1024.0
    ),
    "schedule": lambda: keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(0.01, 10), epsilon=1e-3),
}


@dataclass
class Both:
    """What the single-device model and the sharded one gave: arrays by name."""

    single: dict[str, np.ndarray]
    sharded: dict[str, np.ndarray]


def relative(found: Any, expected: Any, floor: float) -> float:
    """Return the largest difference relative to the largest expected entry, or to ``floor`` if that is larger."""
    found, expected = np.asarray(found, "float64"), np.asarray(expected, "float64")
    return float(np.max(np.abs(found - expected), initial=0.0) / max(np.max(np.abs(expected), initial=0.0), floor))


def check_equal(both: Both, tolerance: float, floor: float = 1e-30) -> None:
    """``floor`` keeps values that are zero but for rounding, as the slots of an attention key's bias, from failing."""
    assert both.single.keys() == both.sharded.keys()
    errors = {name: relative(both.sharded[name], both.single[name], floor) for name in both.single}
    assert {name: error for name, error in errors.items() if error > tolerance} == {}


def variables_of(model: keras.Model) -> dict[str, np.ndarray]:
    """Return the model's variables and the optimizer's, by key."""
    arrays = {key: variable.numpy() for key, variable in named_variables(model).items()}
    arrays |= {f"slot {number}": variable.numpy() for number, variable in enumerate(model.optimizer.variables)}
    return arrays


# On the ranks


def train_with(optimizer: str, compile_first: bool) -> Both:
    """Train the MLP with an optimizer, on one device and sharded."""
    case = CASES["mlp"]
    models = [case.build("float64") for _ in range(2)]
    x, y = case.batch(np.random.default_rng(0), 8)
    results = []
    for number, model in enumerate(models):
        if compile_first:
            model.compile(OPTIMIZERS[optimizer](), case.make_loss("float64"))
            model.train_on_batch(x, y)
        if number:
            tp_planner.parallelize(model, layout_map(case.rules))
        if not compile_first:
            model.compile(OPTIMIZERS[optimizer](), case.make_loss("float64"))
        losses = [float(model.train_on_batch(x, y)) for _ in range(STEPS)]
        results.append({"losses": np.array(losses)} | variables_of(model))
    return Both(*results)


def fit_all(weighted: bool) -> Both:
    """Fit, evaluate and predict with metrics, validation data, callbacks and sample weights."""
    case = CASES["gpt"]
    models = [case.build("float64") for _ in range(2)]
    x, y = case.batch(np.random.default_rng(0), 20)
    weights = np.random.default_rng(1).uniform(0.5, 1.5, y.shape) if weighted else None
    tp_planner.parallelize(models[1], layout_map(case.rules))
    results = []
    for model in models:
        keras.utils.set_random_seed(3)  # fit shuffles
        model.compile(
            OPTIMIZERS["adamw"](), case.make_loss("float64"), metrics=["accuracy"], weighted_metrics=["accuracy"]
        )
        stop = keras.callbacks.EarlyStopping("loss", patience=5)
        plateau = keras.callbacks.ReduceLROnPlateau("loss", patience=1)
        history = model.fit(
            x,
            y,
            batch_size=8,
            epochs=3,
            verbose=0,
            sample_weight=weights,
            validation_data=(x, y),
            callbacks=[stop, plateau],
        )
        results.append(
            {name: np.array(values) for name, values in history.history.items()}
            | {"evaluated": np.array(model.evaluate(x, y, verbose=0)), "predicted": model.predict(x, verbose=0)}
            | variables_of(model)
        )
    return Both(*results)


def fifty_steps_with_dropout(seeded: bool) -> tuple[Both, dict[str, bytes]]:
    """Train with dropout inside and outside of regions; return also the bytes of every replicated variable."""
    keras.utils.set_random_seed(100 + dist.get_rank())
    case = CASES["gpt"]
    models = [case.build("float64", dropout=0.3) for _ in range(2)]
    if not seeded:
        for model in models:
            for layer in model._flatten_layers():
                if isinstance(layer, keras.layers.Dropout):
                    layer.seed_generator._initial_seed = None
    x, y = case.batch(np.random.default_rng(0), 2)
    tp_planner.parallelize(models[1], layout_map(case.rules))
    results = []
    for model in models:
        model.compile(OPTIMIZERS["adamw"](), case.make_loss("float64"))
        torch.manual_seed(5)
        results.append({"losses": np.array([float(model.train_on_batch(x, y)) for _ in range(50)])})
    replicas = {
        key: variable.numpy().tobytes()
        for key, variable in named_variables(models[1]).items()
        if not isinstance(variable._value, torch.distributed.tensor.DTensor)
    }
    return Both(*results), replicas


def llama_with_dropout(seeded: bool) -> Both:
    """Run a Llama whose attention scores do not lie in memory as their dims are ordered."""
    case = CASES["llama"]
    models = [case.build("float64", dropout=0.3) for _ in range(2)]
    x, _ = case.batch(np.random.default_rng(0), 3)
    tp_planner.parallelize(models[1], layout_map(case.rules))
    results = []
    for model in models:
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.Dropout) and not seeded:
                layer.seed_generator._initial_seed = None
        torch.manual_seed(5)
        results.append({"output": model(x, training=True).detach().numpy()})
    return Both(*results)


def dropout_continues_from_rank_zero() -> list[float]:
    """Train with unseeded dropout on ranks that were seeded differently."""
    keras.utils.set_random_seed(dist.get_rank())
    case = CASES["gpt"]
    model = case.build("float64", dropout=0.3)
    tp_planner.parallelize(model, layout_map(case.rules))
    model.compile("sgd", case.make_loss("float64"))
    x, y = case.batch(np.random.default_rng(0), 2)
    return [float(model.train_on_batch(x, y)) for _ in range(3)]


def mixed_precision(policy: str) -> tuple[list[float], list[float], str]:
    """Train under a mixed policy; also with a gradient that overflows on one rank only."""
    case, losses = CASES["gpt"], []
    x, y = case.batch(np.random.default_rng(0), 4)
    for sharded in (False, True):
        model = case.build(policy)
        if sharded:
            tp_planner.parallelize(model, layout_map(case.rules))
        model.compile("adam", case.make_loss("float32"))
        losses.append([float(model.train_on_batch(x, y)) for _ in range(6)])
    return losses[0], losses[1], type(model.optimizer).__name__


def overflow_on_one_rank() -> tuple[list[float], list[float]]:
    """Return the loss scale on this rank before and after one rank's shard of a gradient overflows."""
    case = CASES["mlp"]
    model = case.build("float32")
    tp_planner.parallelize(model, layout_map(case.rules))
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0)
    model.compile(optimizer, case.make_loss("float32"))
    x, y = case.batch(np.random.default_rng(0), 8)
    model.train_on_batch(x, y)
    before = [float(optimizer.dynamic_scale.numpy()), float(np.sum(model.get_weights()[0]))]
    loss = case.make_loss("float32")(y, model(x, training=True))
    loss.backward()
    gradients = [variable.value.grad for variable in model.trainable_variables]
    if dist.get_rank() == 1:
        gradients[0]._local_tensor[0, 0] = float("inf")
    with torch.no_grad():
        optimizer.apply(gradients, model.trainable_variables)
    return before, [float(optimizer.dynamic_scale.numpy()), float(np.sum(model.get_weights()[0]))]


def penalized() -> Both:
    """Train with every kind of regularizer and constraint on sharded variables."""

    def build() -> keras.Model:
        keras.utils.clear_session()
        inputs = keras.Input((16,))
        hidden = keras.layers.Dense(
            32,
            "relu",
            name="up",
            kernel_regularizer=keras.regularizers.L1L2(1e-2, 1e-2),
            bias_regularizer=keras.regularizers.L1(1e-2),
            kernel_constraint=keras.constraints.MaxNorm(0.9),
            bias_constraint=keras.constraints.NonNeg(),
        )(inputs)
        hidden = keras.layers.Dense(
            16,
            name="down",
            kernel_regularizer=keras.regularizers.OrthogonalRegularizer(1e-2),
            kernel_constraint=keras.constraints.UnitNorm(),
        )(hidden)
        model = keras.Model(inputs, keras.layers.Dense(4, "softmax", name="head")(hidden), name="penalized")
        rng = np.random.default_rng(1)
        model.set_weights([rng.standard_normal(weight.shape) * 0.3 for weight in model.get_weights()])
        return model

    CASES["mlp"].build("float64")  # makes Keras compute float64 in float64
    keras.config.set_floatx("float64")
    models = [build(), build()]
    rules = {
        "up/kernel": (None, "model"),
        "up/bias": ("model",),
        "down/kernel": ("model", None),
        "head/kernel": (None, "model"),
    }
    tp_planner.parallelize(models[1], layout_map(rules))
    rng, results = np.random.default_rng(0), []
    x, y = rng.standard_normal((8, 16)), rng.standard_normal((8, 4))
    for model in models:
        model.compile(OPTIMIZERS["adamw"](), keras.losses.MeanSquaredError(dtype="float64"))
        losses = [float(model.train_on_batch(x, y)) for _ in range(STEPS)]
        results.append({"losses": np.array(losses)} | variables_of(model))
    return Both(*results)


def with_lora(name: str) -> Both:
    """Train low-rank adapters on sharded layers; adapters are float32 whatever the layer is."""
    case, results = CASES[name], []
    x, y = case.batch(np.random.default_rng(0), 4)
    for sharded in (False, True):
        model, rng = case.build("float64"), np.random.default_rng(4)
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.Dense | keras.layers.EinsumDense | keras.layers.Embedding):
                layer.enable_lora(3)
        for variable in model.trainable_variables:
            variable.assign(rng.standard_normal(variable.shape) * 0.2)
        if sharded:
            tp_planner.parallelize(model, layout_map(case.rules))
        model.compile(OPTIMIZERS["adamw"](), case.make_loss("float64"))
        losses = [float(model.train_on_batch(x, y)) for _ in range(STEPS)]
        results.append({"losses": np.array(losses)} | variables_of(model))
    return Both(*results)


def released_optimizer() -> tuple[str, str, list[bool]]:
    """Return the optimizer's class while sharded and after restore, and whether it can go on."""
    case = CASES["mlp"]
    model = case.build("float64")
    model.compile(OPTIMIZERS["adamw"](), case.make_loss("float64"))
    x, y = case.batch(np.random.default_rng(0), 8)
    tp_planner.parallelize(model, layout_map(case.rules))
    model.train_on_batch(x, y)
    adopted = isinstance(model.optimizer, ParallelOptimizer)
    name = type(model.optimizer).__name__
    tp_planner.restore(model)
    model.train_on_batch(x, y)
    shapes = [variable._value.shape == torch.Size(variable.shape) for variable in model.optimizer.variables]
    return name, type(model.optimizer).__name__, [adopted, not isinstance(model.optimizer, ParallelOptimizer), *shapes]


def loop_of_ones_own() -> Both:
    """Train without compile, with an optimizer that the model does not know, through restore and on."""
    case, results = CASES["mlp"], []
    x, y = case.batch(np.random.default_rng(0), 8)
    for sharded in (False, True):
        model, losses = case.build("float64"), []
        optimizer, loss_of = OPTIMIZERS["adamw"](), case.make_loss("float64")
        if sharded:
            tp_planner.parallelize(model, layout_map(case.rules))
        for step in range(2 * STEPS):
            if sharded and step == STEPS:
                tp_planner.restore(model)
            model.zero_grad()
            loss = loss_of(y, model(x, training=True))
            loss.backward()
            with torch.no_grad():
                optimizer.apply([v.value.grad for v in model.trainable_variables], model.trainable_variables)
            losses.append(loss.item())
        slots = {f"slot {number}": variable.numpy() for number, variable in enumerate(optimizer.variables)}
        results.append({"losses": np.array(losses)} | slots)
    return Both(*results)


# In the parent


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer(pools: Callable[[int], WorkerPool], optimizer: str) -> None:
    """Weights and slots after four steps are those of the single device, whatever the update."""
    check_equal(pools(2).run(train_with, optimizer, False)[0], 1e-12)


@pytest.mark.parametrize(
    "optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow), "adafactor", "loss scaling", "moving average"]
)
def test_optimizer_built_before(pools: Callable[[int], WorkerPool], optimizer: str) -> None:
    """An optimizer that has trained the plain model goes on with the same slots, sharded."""
    check_equal(pools(4).run(train_with, optimizer, True)[0], 1e-12)


def test_loop_of_ones_own(workers: WorkerPool) -> None:
    """An optimizer outside the model shards its slots at the first step, and has them back after restore."""
    check_equal(workers.run(loop_of_ones_own)[0], 1e-12)


@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_fit_evaluate_predict(workers: WorkerPool, weighted: bool) -> None:
    """Keras's own loops report the same logs on every rank as on a single device."""
    for both in workers.run(fit_all, weighted):
        check_equal(both, 1e-6, floor=1e-6)  # Keras accumulates logs in float32


@pytest.mark.slow
@pytest.mark.parametrize("seeded", [False, True])
def test_dropout(pools: Callable[[int], WorkerPool], seeded: bool) -> None:
    """Dropout draws the single device's masks, and replicated variables stay bit-identical for fifty steps."""
    results = pools(2).run(fifty_steps_with_dropout, seeded)
    for both, replicas in results:
        check_equal(both, 1e-9)
        assert replicas == results[0][1]


@pytest.mark.parametrize("seeded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dropout_in_any_memory_order(workers: WorkerPool, seeded: bool) -> None:
    """A mask is drawn in the order in which the single device draws it."""
    check_equal(workers.run(llama_with_dropout, seeded)[0], 1e-12)


def test_random_state_is_rank_zeros(workers: WorkerPool) -> None:
    """Ranks that were seeded differently draw equal dropout masks after parallelize."""
    losses = workers.run(dropout_continues_from_rank_zero)
    assert all(each == losses[0] for each in losses)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_mixed_precision(pools: Callable[[int], WorkerPool], policy: str) -> None:
    """Under a mixed policy losses agree to the rounding of the compute dtype, and float16 scales the loss."""
    single, sharded, optimizer = pools(2).run(mixed_precision, policy)[0]
    np.testing.assert_allclose(sharded, single, rtol=4e-3)
    assert sharded[-1] < sharded[0]
    assert optimizer == ("LossScaleOptimizer" if policy == "mixed_float16" else "Adam")


def test_overflow_on_one_rank_skips_the_step_on_all(pools: Callable[[int], WorkerPool]) -> None:
    """A gradient that is not finite on one rank halves the loss scale and keeps the weights on every rank."""
    for before, after in pools(2).run(overflow_on_one_rank):
        assert after == [before[0] / 2, before[1]]


def test_regularizers_and_constraints(pools: Callable[[int], WorkerPool]) -> None:
    """Regularizers and constraints are functions of the whole variable."""
    check_equal(pools(2).run(penalized)[0], 1e-12)


@pytest.mark.parametrize(
    "name", ["gpt", *(pytest.param(each, marks=pytest.mark.slow) for each in ("mlp", "llama", "tied"))]
)
def test_lora(pools: Callable[[int], WorkerPool], name: str) -> None:
    """Adapters of sharded layers train as on a single device."""
    check_equal(pools(2).run(with_lora, name)[0], 1e-5, floor=1e-4)


def test_restore_releases_the_optimizer(pools: Callable[[int], WorkerPool]) -> None:
    """After restore the optimizer has its own class and whole slots, and trains on."""
    adopted, released, checks = pools(2).run(released_optimizer)[0]
    assert adopted == released == "AdamW"
    assert all(checks)


def test_released_slots_go_where_their_variables_go() -> None:
    """Also those of variables that every rank held whole; what is no variable's stays where it was."""
    model = CASES["mlp"].build()
    optimizer = keras.optimizers.AdamW(name="adamw")
    optimizer.build(model.trainable_variables)
    with planning_axes(Mesh((("model", 2),))) as axes:
        adopt_optimizer(optimizer, axes)

    release_optimizer(optimizer, {id(variable): torch.device("meta") for variable in model.trainable_variables})

    on_meta = {variable.path for variable in optimizer.variables if variable._value.is_meta}
    assert {variable.path for variable in optimizer.variables} - on_meta == {"adamw/iteration", "adamw/learning_rate"}
