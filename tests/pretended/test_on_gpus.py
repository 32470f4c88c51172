"""Jobs on GPUs, pretended: no tensor of the host meets one of a device, and NCCL is given what it takes.

Everything computes on the CPU in truth, so losses are compared with a plain model's too. What a real GPU is needed
for are its kernels and its speed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.families import FAMILIES
from tests.layers.test_generation import prompts
from tests.models import Case
from tests.pretended.machine import start
from tests.pretended.reports import reports, waiting
from tests.pretended.storages import on_device
from tests.replicas import MODELS, also_over_batch
from tests.replicas import layout as of_replicas
from tests.training.test_training import OPTIMIZERS
from tests.workers import WorkerPool
from tp_planner.ir.layout import AxisSpec, Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.selftest import CHECKS

STEPS = 3
BATCH_SIZE = 4
Rules = Mapping[str, tuple[AxisSpec, ...]]


@dataclass(frozen=True)
class Seen:
    """What one rank saw: its losses, those of a plain model, and the reports."""

    losses: list[float]
    expected: list[float]
    reports: dict[tuple[str, str], int]


# On the ranks


def layout(rules: Rules, replicas: int = 1) -> Layout:
    mesh = Mesh((("batch", replicas), ("model", dist.get_world_size() // replicas)), "batch")
    return Layout(mesh, tuple(LayoutRule(pattern, axes) for pattern, axes in rules.items()), "cuda")


def built(case: Case, policy: str = "float32", **sizes: Any) -> keras.Model:
    """Return the model with its weights on the host, as one that fits no device is built."""
    with keras.device("cpu"):
        return case.build(policy, **sizes)


def fitted(model: keras.Model, case: Case, optimizer: Any, batches: list[Any], jit: bool) -> list[float]:
    model.compile(optimizer(), case.make_loss(), jit_compile=jit)
    return [float(model.train_on_batch(x, y)) for x, y in batches]


def train(
    name: str,
    sizes: Mapping[str, Any],
    optimizer: str = "adamw",
    jit: bool = False,
    replicas: int = 1,
    in_parts: bool = False,
    policy: str = "float32",
    planned_first: bool = False,
) -> Seen:
    """Train, predict, save, load and restore a model; the losses are those of one that is plain."""
    case = MODELS[name]
    rng = np.random.default_rng(0)
    batches = [case.batch(rng, BATCH_SIZE) for _ in range(STEPS)]
    with keras.device("cpu"):
        expected = fitted(built(case, policy, **sizes), case, OPTIMIZERS[optimizer], batches, False)
    reports.clear()
    model = built(case, policy, **sizes)
    wanted = layout(also_over_batch(case.rules) if in_parts else case.rules, replicas)
    plan = tp_planner.plan(model, wanted, inputs=batches[0][0]) if planned_first else wanted
    tp_planner.parallelize(model, plan, inputs=batches[0][0])
    assert all(on_device(variable._value) for variable in model.variables)
    if replicas > 1:
        share = slice(dist.get_rank(), None, replicas)
        batches = [keras.tree.map_structure(lambda leaf: leaf[share], batch) for batch in batches]
    losses = fitted(model, case, OPTIMIZERS[optimizer], batches, jit)
    assert all(on_device(slot._value) for slot in model.optimizer.variables)
    model.predict_on_batch(batches[0][0])
    model.save_weights(path := "the.weights.h5")
    model.load_weights(path)
    tp_planner.restore(model)
    assert not any(on_device(variable._value) for variable in model.variables)
    return Seen(losses, expected, dict(reports))


def fit_under_distribution(policy: str) -> Seen:
    """Build, fit, evaluate and predict under ``keras.distribution``, on the devices that it lists."""
    case, x_and_y = MODELS["gpt"], MODELS["gpt"].batch(np.random.default_rng(0), 2 * BATCH_SIZE)
    with keras.device("cpu"):
        expected = _history(built(case, policy), *x_and_y)
    reports.clear()
    tp_planner.enable_keras_distribution()
    try:
        devices = keras.distribution.list_devices()
        mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
        layouts = keras.distribution.LayoutMap(mesh)
        for pattern, axes in case.rules.items():
            layouts[pattern] = axes
        distribution = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
        with distribution.scope():
            model = case.build(policy)
            losses = _history(model, *x_and_y)
            model.evaluate(*x_and_y, batch_size=BATCH_SIZE, verbose=0)
            model.predict(x_and_y[0], batch_size=BATCH_SIZE, verbose=0)
    finally:
        tp_planner.disable_keras_distribution()
    return Seen(losses, expected, dict(reports))


def _history(model: keras.Model, x: Any, y: Any) -> list[float]:
    model.compile(OPTIMIZERS["adamw"](), MODELS["gpt"].make_loss(), metrics=["accuracy"])
    losses: list[float] = model.fit(x, y, batch_size=BATCH_SIZE, epochs=2, shuffle=False, verbose=0).history["loss"]
    return losses


def adapt() -> Seen:
    """Train adapters on sharded layers."""
    case = MODELS["gpt"]
    batches = [case.batch(np.random.default_rng(0), BATCH_SIZE)] * STEPS
    losses = []
    for sharded in (False, True):
        keras.utils.set_random_seed(1)
        with keras.device("cpu"):
            model = case.build()
            for layer in model._flatten_layers():
                if isinstance(layer, keras.layers.Dense | keras.layers.EinsumDense):
                    layer.enable_lora(2)
        if not sharded:
            with keras.device("cpu"):
                losses.append(fitted(model, case, OPTIMIZERS["adamw"], batches, False))
        else:
            reports.clear()
            tp_planner.parallelize(model, layout(case.rules), inputs=batches[0][0])
            losses.append(fitted(model, case, OPTIMIZERS["adamw"], batches, False))
    return Seen(losses[1], losses[0], dict(reports))


def recur() -> Seen:
    """Train a recurrent layer, whose cell Keras hands to cudnn where it can."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((BATCH_SIZE, 5, 8)).astype("float32"), rng.standard_normal((BATCH_SIZE, 3))
    losses = []
    for sharded in (False, True):
        keras.utils.set_random_seed(1)
        with keras.device("cpu"):
            inputs = keras.Input((5, 8))
            hidden = keras.layers.LSTM(6, name="lstm")(keras.layers.Dense(8, name="up")(inputs))
            model = keras.Model(inputs, keras.layers.Dense(3, name="down")(hidden))
            model.compile("adam", "mse")
            if not sharded:
                losses.append([float(model.train_on_batch(x, y)) for _ in range(STEPS)])
        if sharded:
            reports.clear()
            tp_planner.parallelize(model, layout({"up/kernel": (None, "model"), "up/bias": ("model",)}))
            losses.append([float(model.train_on_batch(x, y)) for _ in range(STEPS)])
    return Seen(losses[1], losses[0], dict(reports))


def generate(name: str) -> Seen:
    family = FAMILIES[name]
    with keras.device("cpu"):
        model = family.build()
    reports.clear()
    tp_planner.parallelize(model, family.layout(dist.get_world_size()), inputs=prompts())
    for jit in (False, True):
        model.compile(sampler="greedy", jit_compile=jit)
        for _ in range(3):
            model.generate(prompts(), stop_token_ids=None)
    return Seen([], [], dict(reports))


def plan_for_cuda(name: str) -> str:
    """Return the JSON of a family's plan for CUDA devices."""
    family = FAMILIES[name]
    with keras.device("cpu"):
        keras.utils.clear_session()
        model = family.build()
    inputs, _ = family.batch(np.random.default_rng(0), 2)
    return tp_planner.plan(model, replace(family.layout(2), devices="cuda"), inputs=inputs).to_json()


PLANNED = (
    "gpt2", "gemma", "llama3", "bert", "vit", "t5", "whisper", "mixtral", "qwen3_moe", "gemma2", "phi3", "opt",
)  # fmt: skip


def check_itself() -> Seen:
    """Run the checks of the self-test, which raise where a result is not that of one device."""
    reports.clear()
    tp_planner.enable_keras_distribution()
    try:
        for check in CHECKS.values():
            check()
    finally:
        tp_planner.disable_keras_distribution()
    return Seen([], [], dict(reports))


CASES: dict[str, Callable[[], Seen]] = {
    "gpt": partial(train, "gpt", {}),
    "gpt, planned before": partial(train, "gpt", {}, planned_first=True),
    "gpt, replayed": partial(train, "gpt", {"dropout": 0.1}, jit=True),
    "gpt with uneven dims": partial(train, "gpt", {"vocabulary": 65, "hidden": 63}),
    "gpt with dropout": partial(train, "gpt", {"dropout": 0.2}),
    "handwritten": partial(train, "handwritten", {}),
    "convnet": partial(train, "convnet", {}),
    "llama": partial(train, "llama", {}),
    "llama, recomputed": partial(train, "llama", {"recomputed": True}),
    "replicas": partial(train, "normalized", {}, replicas=2),
    "replicas in parts": partial(train, "gpt", {}, replicas=2, in_parts=True),
    **{f"by {name}": partial(train, "mlp", {}, optimizer=name) for name in OPTIMIZERS},
    "keras.distribution": partial(fit_under_distribution, "float32"),
    "keras.distribution in mixed precision": partial(fit_under_distribution, "mixed_float16"),
    "the self-test": check_itself,
    "adapters": adapt,
    "recurrent": recur,
    **{f"generation by {name}": partial(generate, name) for name in ("gpt2", "llama3")},
}


def run_case(name: str, folder: Path) -> Seen:
    os.chdir(folder)
    return CASES[name]()


def waits(
    name: str,
    optimizer: str,
    jit: bool,
    sizes: Mapping[str, Any],
    rules: str = "model axis",
    replicas: int = 1,
    loss: Any = None,
) -> dict[str, int]:
    """Return where the host waits for the device in a step that is not the first."""
    case = MODELS[name]
    x, y = case.batch(np.random.default_rng(0), BATCH_SIZE)
    model = built(case, **sizes)
    wanted = of_replicas(name, rules, (replicas, dist.get_world_size() // replicas))
    tp_planner.parallelize(model, replace(wanted, devices="cuda"), inputs=x)
    model.compile(OPTIMIZERS[optimizer](), loss or case.make_loss(), metrics=METRICS.get(name), jit_compile=jit)
    data = keras.tree.map_structure(lambda leaf: torch.as_tensor(leaf, device="cuda"), (x, y))
    for _ in range(3):
        model.train_step(data)
    waiting.clear()
    model.train_step(data)
    return {f"{what}: {where}": times for (what, where), times in waiting.items()}


SUM = keras.losses.MeanSquaredError(reduction="sum")
METRICS = {"gpt": ["accuracy"], "mlp": ["mae"]}

STEPS_WITHOUT_WAITING: dict[str, tuple[Any, ...]] = {
    "adamw": ("gpt", "adamw", False, {}),
    "adamw, replayed": ("gpt", "adamw", True, {}),
    "dropout": ("gpt", "adamw", False, {"dropout": 0.1}),
    "dropout, replayed": ("gpt", "adamw", True, {"dropout": 0.1}),
    "a mask of padding": ("llama", "adamw", False, {}),
    "momentum": ("mlp", "momentum", False, {}),
    "norms clipped": ("mlp", "clip each norm", False, {}),
    "in slices": ("mlp", "rmsprop", False, {}),
    "replicas": ("gpt", "adamw", False, {"dropout": 0.1}, "model axis", 2),
    "replicas, replayed": ("gpt", "adamw", True, {"dropout": 0.1}, "model axis", 2),
    "replicas with a sum for a loss": ("mlp", "adamw", False, {}, "model axis", 2, SUM),
    "replicas with batch normalization": ("normalized", "adamw", False, {}, "normalized", 2),
    "replicas in parts": ("gpt", "adamw", False, {}, "both axes, 2 ahead", 2),
    "replicas in parts of Llama, recomputed": ("recomputed", "adamw", False, {}, "both axes", 2),
    "slots in parts": ("gpt", "adamw", False, {}, "model axis, zero 1", 2),
    "slots and weights in parts": ("gpt", "adamw", False, {}, "model axis, zero 3", 2),
    "slots in parts, norms clipped": ("mlp", "clip each norm", False, {}, "model axis, zero 1", 2),
}
FEW = {"dropout, replayed", "norms clipped", "in slices", "slots in parts"}  # which `make test` looks at

FAULTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a mask made on the host": lambda tensor: tensor * torch.ones(tensor.shape),
    "an index made on the device for the host's": lambda tensor: torch.gather(torch.zeros(3, 4), 1, tensor.long()),
    "a broadcast of the host's": lambda tensor: dist.broadcast(torch.zeros(3), 0),
    "a sum of the host's": lambda tensor: funcol_all_reduce(torch.zeros(3)),
    "an uneven gather": lambda tensor: dist.all_gather([tensor, tensor[:1]], tensor),
    "a type that NCCL does not have": lambda tensor: dist.all_reduce(tensor.to(torch.int16)),
    "a tensor that is not contiguous": lambda tensor: dist.broadcast(tensor.t(), 0),
    "an object on the host": lambda tensor: dist.broadcast_object_list(["text"], 0, device=torch.device("cpu")),
    "an array of a tensor on the device": lambda tensor: tensor.numpy(),
}


def funcol_all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    group = dist.group.WORLD
    assert group is not None
    result: torch.Tensor = torch.ops._c10d_functional.all_reduce(tensor, "sum", group.group_name)
    return result


def commit_fault(name: str) -> int:
    """Return how much is reported of a mistake."""
    tensor = torch.zeros(3, 4, device="cuda")
    reports.clear()
    with contextlib.suppress(RuntimeError):  # gloo may refuse it, too
        FAULTS[name](tensor)
    found = len(reports)
    dist.all_reduce(torch.zeros(1, device="cuda"))  # no barrier, which may raise what gloo has refused before
    return found


# In the parent


@pytest.fixture(scope="module")
def gpus() -> Iterator[WorkerPool]:
    pool = WorkerPool(2, start=start)
    yield pool
    pool.stop()


# Each sort of code that touches devices once; the others in `make sweep`.
USUAL = {"gpt, replayed", "replicas in parts"}


@pytest.mark.parametrize(
    "case", [case if case in USUAL else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_nothing_is_reported(gpus: WorkerPool, case: str, tmp_path: Path) -> None:
    for seen in gpus.run(run_case, case, tmp_path):
        assert seen.reports == {}
        assert seen.losses == pytest.approx(seen.expected, rel=1e-4)


@pytest.mark.parametrize(
    "name", [name if name == "gemma" else pytest.param(name, marks=pytest.mark.slow) for name in PLANNED]
)
def test_plans_are_those_made_outside_of_the_job(gpus: WorkerPool, name: str) -> None:
    """Byte for byte; Gemma's attention also asks on its own whether there is a GPU."""
    expected = plan_for_cuda(name)
    assert gpus.run(plan_for_cuda, name) == [expected, expected]


@pytest.mark.parametrize(
    "step", [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in STEPS_WITHOUT_WAITING]
)
def test_the_host_waits_for_no_value(gpus: WorkerPool, step: str) -> None:
    """Of a step of Keras's trainer without callbacks, on tensors that are on the device."""
    assert gpus.run(waits, *STEPS_WITHOUT_WAITING[step]) == [{}, {}]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_reported(gpus: WorkerPool, fault: str) -> None:
    """On one rank at least: of an object only who receives it knows where its bytes come to lie."""
    assert any(gpus.run(commit_fault, fault))
