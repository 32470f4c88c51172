"""A sharded model is the same function as on a single device: outputs, gradients, training, and restored.

Every model is trained twice from the same weights on the same batches: by plain Keras on rank 0, and
sharded over all ranks. The tests compare what the two trainings recorded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import tp_planner
from tests.models import CASES, Batch, Case, usual
from tests.workers import Pools, WorkerPool, layout_map
from tp_planner.frontend.layer_tree import named_layers, named_variables
from tp_planner.ir.plan import LayerPlan, Plan
from tp_planner.storage.variables import ParallelVariable, is_sharded, whole_tensor
from tp_planner.training.optimizer import ParallelOptimizer

Arrays = Mapping[str, np.ndarray]

Sizes = Mapping[str, Any]

# Case and sizes: the zoo as it is, and what tensor parallelism gets wrong easily.
MODELS: dict[str, tuple[str, Sizes]] = {
    **{name: (name, {}) for name in CASES},
    "gpt with dropout": ("gpt", {"dropout": 0.2}),
    "gpt with uneven dims": ("gpt", {"vocabulary": 65, "hidden": 63}),
    "llama with tied embeddings and one head for keys": ("llama", {"tied": True, "kv_heads": 1}),
    "llama with blocks that are computed again": ("llama", {"recomputed": True}),
    "gemma with one head for keys": ("gemma", {"kv_heads": 1}),
    "handwritten with two heads for keys": ("handwritten", {"kv_heads": 2}),
}
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
BATCH_SIZE = 4
STEPS = 5  # while sharded; one more follows after restore
# The softmax of attention does not change when a constant is added to all keys: what is left of the gradient of
# the key's bias is rounding, and has no scale of its own.
ZERO_GRADIENT = re.compile(r".*attention/key/bias")


@dataclass
class Record:
    """What a model computed, in order; weights and gradients are whole and by the variable's key."""

    outputs: Arrays  # "output" and "loss"
    gradients: Arrays
    losses: list[float] = field(default_factory=list)
    weights: Arrays = field(default_factory=dict)  # after the steps
    trained: Arrays = field(default_factory=dict)  # "prediction" with these weights
    restored_weights: Arrays = field(default_factory=dict)
    restored: Arrays = field(default_factory=dict)  # "prediction" of the restored model
    weights_after_another_step: Arrays = field(default_factory=dict)


@dataclass
class Trained:
    """Both trainings as one rank saw them. ``single`` is None but on rank 0."""

    single: Record | None
    sharded: Record
    replicas: Mapping[str, bytes]  # of the variables that every rank holds whole, after the steps
    left_over: list[str]  # what restore left of the plan


# On the ranks


def train_both(name: str, sizes: Sizes, dtype: str) -> Trained:
    """Train the case alone on rank 0, then sharded, and restore it."""
    case = CASES[name]
    batches = make_batches(case)
    single = _train_alone(case, sizes, dtype, batches) if dist.get_rank() == 0 else None
    model = case.build(dtype, seed=dist.get_rank(), **sizes)  # rank 0's weights are the truth
    tp_planner.parallelize(model, layout_map(case.rules), inputs=batches[0][0])
    record = begin(model, case, dtype, batches[0])
    train(model, case, dtype, batches[:STEPS], record)
    replicas = _replicas(model)
    tp_planner.restore(model)
    left_over = _left_over(model)
    _train_on(model, batches, record)
    return Trained(single, record, replicas, left_over)


def train_by_broken_plan(name: str, layer: str, side: str) -> Trained:
    """Train as ``train_both`` does, one boundary missing from the plan, and go no further than the steps."""
    case, dtype = CASES[name], "float64"
    batches = make_batches(case)
    single = _train_alone(case, {}, dtype, batches) if dist.get_rank() == 0 else None
    model = case.build(dtype)
    plan = tp_planner.plan(model, layout_map(case.rules), inputs=batches[0][0])
    tp_planner.parallelize(model, without_boundary(plan, layer, side))
    record = begin(model, case, dtype, batches[0])
    train(model, case, dtype, batches[:STEPS], record)
    return Trained(single, record, _replicas(model), [])


def train_in_and_out(name: str) -> tuple[Arrays, Arrays]:
    """Return weights after the steps: of a plain model, and of one that becomes parallel, plain and parallel again."""
    case, dtype = CASES[name], "float64"
    batches = make_batches(case)
    single = _train_alone(case, {}, dtype, batches)
    model = case.build(dtype)
    train(model, case, dtype, batches[:1], begin(model, case, dtype, batches[0]))
    for change, batch in zip(("in", "", "out", "in"), batches[1:STEPS], strict=True):
        if change == "in":
            tp_planner.parallelize(model, layout_map(case.rules), inputs=batch[0])
        elif change == "out":
            tp_planner.restore(model)
        model.train_on_batch(*batch)
    return single.weights, _weights(model)


def without_boundary(plan: Plan, layer: str, side: str) -> Plan:
    """Return the plan without what happens at the inputs, or at the output, of one layer."""
    assert any(each.layer == layer for each in plan.layers)

    def broken(each: LayerPlan) -> LayerPlan:
        if each.layer != layer:
            return each
        return replace(each, output=None) if side == "output" else replace(each, inputs=())

    return replace(plan, layers=tuple(map(broken, plan.layers)))


def make_batches(case: Case) -> list[Batch]:
    """Return one batch for each step, the same on every rank."""
    rng = np.random.default_rng(1)
    return [case.batch(rng, BATCH_SIZE) for _ in range(STEPS + 1)]


def _train_alone(case: Case, sizes: Sizes, dtype: str, batches: list[Batch]) -> Record:
    model = case.build(dtype, **sizes)
    record = begin(model, case, dtype, batches[0])
    train(model, case, dtype, batches[:STEPS], record)
    _train_on(model, batches, record)
    return record


def begin(model: keras.Model, case: Case, dtype: str, batch: Batch) -> Record:
    """Return output, loss and gradients for one batch; the weights stay as they are."""
    x, y = batch
    output = model(x, training=True)
    loss = case.make_loss(dtype)(y, output)
    loss.backward()
    gradients = {key: _whole_gradient(v) for key, v in named_variables(model).items() if v.trainable}
    model.zero_grad()
    return Record({"output": _whole(output), "loss": _whole(loss)}, gradients)


def train(model: keras.Model, case: Case, dtype: str, batches: list[Batch], record: Record) -> None:
    """Train by Keras' own loop, and record losses and weights.

    Adam divides a gradient by its size: with the usual epsilon of 1e-7, rounding would move the variables whose
    gradient is zero as far as any other.
    """
    optimizer = keras.optimizers.AdamW(learning_rate=0.01, weight_decay=0.1, epsilon=1e-3, name="adamw")
    model.compile(optimizer, case.make_loss(dtype), jit_compile=False)
    record.losses += [float(model.train_on_batch(x, y)) for x, y in batches]
    record.weights = _weights(model)
    record.trained = {"prediction": model.predict_on_batch(batches[0][0])}


def _train_on(model: keras.Model, batches: list[Batch], record: Record) -> None:
    """Record what the model computes as a plain one, then how it trains."""
    record.restored_weights = _weights(model)
    record.restored = {"prediction": model.predict_on_batch(batches[0][0])}
    model.train_on_batch(*batches[STEPS])
    record.weights_after_another_step = _weights(model)


def _weights(model: keras.Model) -> Arrays:
    return {key: whole_tensor(variable).numpy().copy() for key, variable in named_variables(model).items()}


def _whole(tensor: torch.Tensor) -> np.ndarray:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().numpy().copy()


def _whole_gradient(variable: keras.Variable) -> np.ndarray:
    """Return a gradient in the order of the whole variable; torch's has that in which it is stored."""
    gradient = variable.value.grad
    if is_sharded(variable):
        gradient = variable._stored.sharding.whole(gradient._local_tensor, tuple(variable.shape))
    return gradient.detach().numpy().copy()


def _replicas(model: keras.Model) -> dict[str, bytes]:
    """Return the bytes of all variables that are no shards, of the model and of its optimizer."""
    slots = {f"optimizer/{variable.path}": variable for variable in model.optimizer.variables}
    variables = {**named_variables(model), **slots}
    return {
        key: variable._value.detach().numpy().tobytes()
        for key, variable in variables.items()
        if not isinstance(variable._value, DTensor)
    }


def _left_over(model: keras.Model) -> list[str]:
    """Return everything about a restored model that is not as in a plain one."""
    return [*_of_variables(model), *_of_layers(model), *_of_the_model(model)]


def _of_variables(model: keras.Model) -> Iterator[str]:
    variables = [*named_variables(model).values(), *model.optimizer.variables]
    for variable in variables:
        if isinstance(variable, ParallelVariable) or "_stored" in vars(variable):
            yield f"{variable.path} is a {type(variable).__name__}"
        if isinstance(variable._value, DTensor) or isinstance(variable._value.grad, DTensor):
            yield f"{variable.path} holds a DTensor"


def _of_layers(model: keras.Model) -> Iterator[str]:
    variables = [*named_variables(model).values(), *model.metrics_variables, *model.optimizer.variables]
    held = {id(variable._value) for variable in variables}
    for name, layer in named_layers(model).items():
        for kind, hooks in vars(layer).items():
            if "hooks" in kind and isinstance(hooks, dict) and hooks:
                yield f"{name} has {kind}"
        for parameter in layer.parameters():
            if id(parameter) not in held:
                yield f"{name} holds a parameter that is no variable's value"


def _of_the_model(model: keras.Model) -> Iterator[str]:
    if isinstance(model.optimizer, ParallelOptimizer) or type(model.optimizer) is not type(_plain_optimizer()):
        yield f"the optimizer is a {type(model.optimizer).__mro__}"
    for name in vars(model):
        if name in ("save", "save_weights", "compile") or "tp_planner" in name:
            yield f"the model has its own {name}"


def _plain_optimizer() -> keras.optimizers.Optimizer:
    return keras.optimizers.AdamW()


# In the parent


def differences(found: Arrays, expected: Arrays, tolerance: float, scale: float = 0.0) -> dict[str, float]:
    """Return what differs by more than ``tolerance`` of its largest expected entry, and by how much.

    Variables with a gradient of zero are measured by ``scale``, the largest entry of them all, instead.
    """
    assert found.keys() == expected.keys()
    worst = {}
    for key, array in expected.items():
        size = scale if scale and ZERO_GRADIENT.fullmatch(key) else np.max(np.abs(array), initial=0.0)
        error = np.max(np.abs(found[key] - array), initial=0.0)
        if not error <= tolerance * size:
            worst[key] = float(error / size) if size else float("inf")
    return worst


def largest(arrays: Arrays) -> float:
    return float(max(np.max(np.abs(array)) for array in arrays.values()))


def gradient_differences(found: Record, expected: Record, tolerance: float) -> dict[str, float]:
    """Return the variables whose gradients differ in the two trainings, and by how much."""
    return differences(found.gradients, expected.gradients, tolerance, scale=largest(expected.gradients))


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=list(TOLERANCE))
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ranks(workers: WorkerPool, model: str, dtype: str) -> list[Trained]:
    """Both trainings of one model in one dtype, by rank; trained once for all tests."""
    return workers.run(train_both, *MODELS[model], dtype)


@pytest.fixture
def single(ranks: list[Trained]) -> Record:
    assert ranks[0].single is not None
    return ranks[0].single


def test_every_rank_has_the_output_and_the_loss(ranks: list[Trained], single: Record, dtype: str) -> None:
    """The model's call and the loss function return on every rank what a single device computes."""
    for each in ranks:
        assert {array.dtype.name for array in each.sharded.outputs.values()} == {dtype}
        assert differences(each.sharded.outputs, single.outputs, TOLERANCE[dtype]) == {}


def test_every_gradient(ranks: list[Trained], single: Record, dtype: str) -> None:
    """Backward gives each trainable variable, sharded or not, the gradient of the single device."""
    for each in ranks:
        assert gradient_differences(each.sharded, single, TOLERANCE[dtype]) == {}


def test_training_steps(ranks: list[Trained], single: Record, dtype: str) -> None:
    """Five steps of AdamW by ``train_on_batch`` report the same losses and give the same weights.

    Keras adds up losses in float32, whatever the dtype of the model.
    """
    for each in ranks:
        assert each.sharded.losses == pytest.approx(single.losses, rel=1e-6 if dtype == "float64" else 1e-5)
        assert differences(each.sharded.weights, single.weights, TOLERANCE[dtype]) == {}


def test_replicas_are_bit_identical(ranks: list[Trained]) -> None:
    """After the steps all ranks hold the same bits of what is not sharded, optimizer slots too."""
    for each in ranks[1:]:
        assert each.replicas.keys() == ranks[0].replicas.keys()
        assert [key for key, bits in each.replicas.items() if bits != ranks[0].replicas[key]] == []


def test_restore_gives_every_rank_the_whole_model(ranks: list[Trained], dtype: str) -> None:
    """Restored weights are the sharded ones bit by bit, and ``predict_on_batch`` returns the same as before."""
    for each in ranks:
        sharded, restored = each.sharded.weights, each.sharded.restored_weights
        assert sharded.keys() == restored.keys()
        assert [key for key, array in restored.items() if not np.array_equal(array, sharded[key])] == []
        assert differences(each.sharded.restored, each.sharded.trained, TOLERANCE[dtype]) == {}


def test_restored_model_trains_on(ranks: list[Trained], single: Record, dtype: str) -> None:
    """One more step after restore continues from the optimizer's state."""
    expected = single.weights_after_another_step
    assert not all(np.array_equal(expected[key], single.weights[key]) for key in single.gradients)

    for each in ranks:
        assert differences(each.sharded.weights_after_another_step, expected, TOLERANCE[dtype]) == {}


def test_restore_leaves_nothing_behind(ranks: list[Trained]) -> None:
    """No parallel variable, DTensor, hook, optimizer class or override of the plan is left."""
    for each in ranks:
        assert each.left_over == []


@pytest.mark.parametrize("name", usual(["gpt", "subclassed"], {"subclassed"}))
def test_training_goes_on_across_changes(pools: Pools, name: str) -> None:
    """A model that is trained plain, sharded, restored and sharded again ends with the weights of a plain one."""
    for expected, found in pools(2).run(train_in_and_out, name):
        assert differences(found, expected, TOLERANCE["float64"]) == {}


BROKEN = {
    "sum of a row-parallel layer": ("mlp", "down", "output", True),
    "sum of a vocabulary-parallel embedding": ("gpt", "token_embedding", "output", True),
    "sum of a gradient": ("gpt", "block_1_up", "input", False),
}


@pytest.mark.parametrize(("case", "layer", "side", "forward"), BROKEN.values(), ids=BROKEN)
def test_comparison_notices_a_missing_boundary(pools: Pools, case: str, layer: str, side: str, forward: bool) -> None:
    """A plan with one boundary less gives other gradients, and other outputs if it was one of the way forward."""
    ranks = pools(2).run(train_by_broken_plan, case, layer, side)

    single, sharded = ranks[0].single, ranks[0].sharded
    assert bool(differences(sharded.outputs, single.outputs, 1e-3)) == forward
    assert gradient_differences(sharded, single, 1e-3) != {}
    assert differences(sharded.weights, single.weights, 1e-3) != {}
    if not forward:
        assert ranks[0].replicas != ranks[1].replicas
