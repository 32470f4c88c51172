"""Programs by graphs, pretended: what they compute is what they do without, however the model is called."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

import tp_planner
from tests.models import CASES
from tests.pretended.graphs import Graph, pretended_graphs
from tests.workers import WorkerPool, layout_map
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.ir.errors import ParallelRuntimeError, PlanError
from tp_planner.patches import replaced

BATCH_SIZE = 4
STEPS = 5


# On the ranks


def parallel(name: str, jit_compile: Any, **sizes: Any) -> tuple[keras.Model, list[Any]]:
    """Return a compiled parallel model, and batches."""
    case, rng = CASES[name], np.random.default_rng(5)
    batches = [case.batch(rng, BATCH_SIZE) for _ in range(STEPS)]
    model = case.build("float64", **sizes)
    tp_planner.parallelize(model, layout_map(case.rules), inputs=batches[0][0])
    keras.utils.set_random_seed(7)
    model.compile(keras.optimizers.AdamW(0.01), case.make_loss("float64"), jit_compile=jit_compile)
    return model, batches


def trained(name: str, jit_compile: Any, **sizes: Any) -> dict[str, Any]:
    model, batches = parallel(name, jit_compile, **sizes)
    losses = [float(model.train_on_batch(x, y)) for x, y in batches]
    outputs = [model.predict_on_batch(x) for x, _ in batches]
    model.train_on_batch(*batches[0])
    return {
        "losses": losses,
        "outputs": outputs,
        **{key: np.array(each) for key, each in named_variables(model).items()},
    }


def steps_by_graphs(name: str, sizes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return what training gives without graphs and by them, and how often these were replayed."""
    plain = trained(name, True, **sizes)
    with pretended_graphs():
        return plain, trained(name, "cudagraphs", **sizes), Graph.replays


def other_calls() -> dict[str, Any]:
    """Return gradients and outputs, without graphs and by them, of calls that would overwrite each other."""
    found = {}
    for jit_compile in (True, "cudagraphs"):
        with pretended_graphs():
            model, batches = parallel("mlp", jit_compile)
            inputs = [torch.from_numpy(np.asarray(x)) for x, _ in batches]
            for x in inputs[:3]:
                model(x).sum().backward()
            model.zero_grad()
            outputs = [model(x) for x in inputs]  # before any of their backward passes
            sum(each.square().sum() for each in outputs).backward()
            both = [each.value.grad.clone() for each in model.trainable_variables]
            model(inputs[0]).square().sum().backward()  # added to those
            added = [each.value.grad.clone() for each in model.trainable_variables]
            model.zero_grad()
            for x in inputs[:3]:
                model(x).square().sum().backward()
            summed = [each.value.grad for each in model.trainable_variables]
            whole = [each._value for each in model.trainable_variables if not isinstance(each._value, DTensor)]
            own = [each.data for each in whole]
            for each in whole:
                each.data = torch.ones_like(each)  # as those do who average weights
            others = model(inputs[0])
            for each, data in zip(whole, own, strict=True):
                each.data = data
            values = [*outputs, *both, *added, *summed, *own, others, model(inputs[1])]
            found[str(jit_compile)] = [keras.ops.convert_to_numpy(_local(each)) for each in values], Graph.replays
    return found


def _local(tensor: Any) -> torch.Tensor:
    tensor = tensor.detach()
    return getattr(tensor, "_local_tensor", tensor)


def gradients_of_inputs() -> dict[str, Any]:
    """Return the gradients of inputs, without graphs and by them; no collective lies between these and a layer."""
    found = {}
    for jit_compile in (True, "cudagraphs"):
        with pretended_graphs():
            keras.utils.set_random_seed(7)
            x = keras.Input((8,), dtype="float64")
            y = keras.layers.Dense(8, "tanh", dtype="float64", name="first")(x)
            y = keras.layers.Dense(16, "tanh", dtype="float64", name="up")(y)
            model = keras.Model(x, keras.layers.Dense(4, dtype="float64", name="down")(y))
            rules: dict[str, Any] = {
                "up/kernel": (None, "model"),
                "up/bias": ("model",),
                "down/kernel": ("model", None),
            }
            tp_planner.parallelize(model, layout_map(rules))
            model.compile("sgd", "mse", jit_compile=jit_compile)
            rng = np.random.default_rng(0)
            given = [torch.from_numpy(rng.standard_normal((BATCH_SIZE, 8))).requires_grad_() for _ in range(8)]
            for each in given:
                model(each).square().sum().backward()
            found[str(jit_compile)] = [np.array(each.grad) for each in given], Graph.replays
    return found


def backward_again() -> str:
    """Return what is said of a second backward pass behind another call."""
    with pretended_graphs():
        model, batches = parallel("mlp", "cudagraphs")
        x = torch.from_numpy(np.asarray(batches[0][0]))
        for _ in range(5):
            loss = model(x).sum()
            loss.backward(retain_graph=True)
        model(x).sum().backward()
        try:
            loss.backward()
        except ParallelRuntimeError as error:
            return str(error)
    return ""


def reasons() -> list[str]:
    """Return what is said of a model on CPUs, of kernels that no graph holds, and of an unknown compiler."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("tp_planner").addHandler(handler)
    model, batches = parallel("mlp", "cudagraphs")
    for x, y in batches:
        model.train_on_batch(x, y)
    with pretended_graphs():
        torch.cuda.graph = None  # type: ignore[assignment, misc]
        model.compile("sgd", "mse", jit_compile="cudagraphs")
        for x, y in batches:
            model.train_on_batch(x, y)
    try:
        model.compile("sgd", "mse", jit_compile="xla")
    except PlanError as error:
        said.append(str(error))
    logging.getLogger("tp_planner").removeHandler(handler)
    return said


def failing(*_: Any, **__: Any) -> Any:
    raise ValueError("no compiler")


def without_a_compiler() -> tuple[bool, list[str]]:
    """Return whether training is that without one, and what is said of it."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("tp_planner").addHandler(handler)
    with replaced(torch, "compile", lambda function, **_: failing, "no compiler works"):
        found = trained("mlp", "inductor")
    logging.getLogger("tp_planner").removeHandler(handler)
    expected = trained("mlp", True)
    return all(np.array_equal(found[key], value) for key, value in expected.items()), said


def steps_by_inductor() -> tuple[dict[str, Any], dict[str, Any]]:
    return trained("mlp", True), trained("mlp", "inductor")


# In the parent


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-10, atol=1e-12, err_msg=key)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mlp", {}),
        pytest.param("gpt", {"dropout": 0.2}, marks=pytest.mark.slow),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in ("llama", "vit")),
    ],
)
def test_steps_by_graphs(pools: Callable[[int], WorkerPool], name: str, sizes: dict[str, Any]) -> None:
    """The same losses, predictions and weights; what is drawn is drawn between graphs."""
    for plain, by_graphs, replays in pools(2).run(steps_by_graphs, name, sizes):
        assert_equal(by_graphs, plain)
        assert replays > STEPS


def test_nothing_is_overwritten(pools: Callable[[int], WorkerPool]) -> None:
    """Several calls before a backward pass, gradients that are added up, and weights in others' place."""
    for found in pools(2).run(other_calls):
        (expected, none), (values, replays) = found["True"], found["cudagraphs"]
        assert (none, replays > 0) == (0, True)
        for value, wanted in zip(values, expected, strict=True):
            np.testing.assert_allclose(value, wanted, rtol=1e-10, atol=1e-12)


def test_gradients_of_inputs_are_not_overwritten(pools: Callable[[int], WorkerPool]) -> None:
    """Who asks for the gradients of inputs has each of them for himself."""
    for found in pools(2).run(gradients_of_inputs):
        (expected, _), (values, replays) = found["True"], found["cudagraphs"]
        assert replays > 0
        for value, wanted in zip(values, expected, strict=True):
            np.testing.assert_allclose(value, wanted, rtol=1e-10, atol=1e-12)


def test_a_second_backward_pass_is_refused(pools: Callable[[int], WorkerPool]) -> None:
    for said in pools(2).run(backward_again):
        assert said == (
            "a backward pass runs a second time after the model was called again, and jit_compile='cudagraphs' "
            "keeps what it needs of the last call alone; compile the model with jit_compile=True"
        )


def test_reasons(pools: Callable[[int], WorkerPool]) -> None:
    prefix = "[ModelParallel] jit_compile='cudagraphs' replays model 'mlp' without graphs: "
    for said in pools(2).run(reasons):
        assert said == [
            prefix + "it is not on a CUDA device",
            prefix + "TypeError: 'NoneType' object is not callable",
            "model 'mlp' is compiled with jit_compile='xla'; it is True, which replays calls, 'inductor' or "
            "'cudagraphs', by which what lies between their boundaries runs, or False",
        ]


def test_a_part_that_cannot_be_compiled(pools: Callable[[int], WorkerPool]) -> None:
    """It runs as it is, and that is said once for each part of each sort of call."""
    for equal, said in pools(2).run(without_a_compiler):
        assert equal
        assert set(said) == {
            "[ModelParallel] jit_compile='inductor' leaves a part of model 'mlp' as it is: ValueError: no compiler"
        }


@pytest.mark.slow
def test_steps_by_inductor(pools: Callable[[int], WorkerPool]) -> None:
    """Fused kernels round otherwise."""
    for plain, compiled in pools(2).run(steps_by_inductor):
        assert_equal(compiled, plain)
