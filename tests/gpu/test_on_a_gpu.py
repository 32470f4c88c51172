"""What a GPU computes is what the CPU does, alone in a group of NCCL. Where there is no GPU, the CPU stands for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.families import FAMILIES
from tests.layers.test_generation import generated, prompts
from tests.models import CASES
from tests.training.test_training import OPTIMIZERS
from tp_planner.ir.layout import DeviceType, Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.job.process_group import require_process_group
from tp_planner.storage.variables import local_tensor

pytestmark = pytest.mark.gpu

DEVICE: DeviceType = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, BATCH = 5, 4
MESH = Mesh((("batch", 1), ("model", 1)))


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    require_process_group(1, DEVICE)
    yield
    dist.destroy_process_group()


def parallelized(name: str, dtype: str, inputs: Any, **sizes: Any) -> keras.Model:
    """Return a model of the zoo, built on the host, on the device."""
    rules = tuple(LayoutRule(pattern, axes) for pattern, axes in CASES[name].rules.items())
    with keras.device("cpu"):
        model = CASES[name].build(dtype, **sizes)
    tp_planner.parallelize(model, Layout(MESH, rules, DEVICE), inputs=inputs)
    assert {local_tensor(variable).device.type for variable in model.variables} == {DEVICE}
    return model


def trained(name: str, dtype: str, sharded: bool, optimizer: str = "adam", jit: Any = False) -> dict[str, np.ndarray]:
    """Return losses and final weights of a few steps: on the host and plain, or parallelized on the device."""
    case, rng = CASES[name], np.random.default_rng(0)
    batches = [case.batch(rng, BATCH) for _ in range(STEPS)]
    with keras.device(DEVICE if sharded else "cpu"):
        model = parallelized(name, dtype, batches[0][0]) if sharded else case.build(dtype)
        loss = case.make_loss("float64" if dtype == "float64" else "float32")
        model.compile(OPTIMIZERS[optimizer](), loss, jit_compile=jit)
        losses = [float(model.train_on_batch(x, y)) for x, y in batches]
        if sharded:
            tp_planner.restore(model)
        weights = {each.path: keras.ops.convert_to_numpy(each) for each in model.trainable_variables}
    return {"losses": np.array(losses)} | weights


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        scale = max(float(np.abs(array).max()), 1e-3)
        assert float(np.abs(found[name] - array).max()) <= tolerance * scale, name


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-3), ("mixed_bfloat16", 0.05)])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_training_is_that_of_the_cpu(name: str, dtype: str, tolerance: float) -> None:
    """Kernels sum in other orders, and in bfloat16 round otherwise."""
    assert_close(trained(name, dtype, sharded=True), trained(name, dtype, sharded=False), tolerance)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lion", "rmsprop", "clip each norm"])
def test_optimizers(optimizer: str) -> None:
    expected = trained("gpt", "float64", sharded=False, optimizer=optimizer)
    assert_close(trained("gpt", "float64", sharded=True, optimizer=optimizer), expected, 1e-10)


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("jit", [True, "cudagraphs", "inductor"])
def test_replayed_steps(name: str, jit: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As they are, as CUDA graphs, which nothing keeps from being captured, and fused, which rounds otherwise."""
    if DEVICE == "cpu" and jit is not True:
        pytest.skip("there are no graphs of CPUs, and fusing for them takes a minute")
    expected = trained(name, "float64", sharded=True)
    assert_close(trained(name, "float64", sharded=True, jit=jit), expected, 1e-9 if jit == "inductor" else 1e-12)
    assert not [record.message for record in caplog.records if "jit_compile" in record.message]


@pytest.mark.parametrize("jit", [False, True])
def test_generated_tokens(jit: bool) -> None:
    with keras.device("cpu"):
        model = FAMILIES["llama3"].build()
        expected = generated(model, "greedy")
    layout = FAMILIES["llama3"].layout(1)
    tp_planner.parallelize(model, Layout(layout.mesh, layout.rules, DEVICE), inputs=prompts())
    with keras.device(DEVICE):
        np.testing.assert_array_equal(generated(model, "greedy", jit_compile=jit), expected)


def test_files_of_weights(tmp_path: Path) -> None:
    """What the device writes the host reads, and the other way round."""
    case = CASES["gpt"]
    x, _ = case.batch(np.random.default_rng(0), BATCH)
    with keras.device("cpu"):
        plain, other = case.build("float64"), case.build("float64")
        for variable in plain.trainable_variables:
            variable.assign(variable + 0.5)
        plain.save_weights(tmp_path / "host.weights.h5")
    model = parallelized("gpt", "float64", x)
    model.load_weights(tmp_path / "host.weights.h5")
    model.save_weights(tmp_path / "device.weights.h5")
    with keras.device("cpu"):
        other.load_weights(tmp_path / "device.weights.h5")
        np.testing.assert_array_equal(other.predict(x, verbose=0), plain.predict(x, verbose=0))


@pytest.mark.skipif(DEVICE == "cpu", reason="the host does not wait for itself")
@pytest.mark.parametrize("jit", [False, True, "cudagraphs"])
def test_the_host_does_not_wait_in_a_step(jit: Any) -> None:
    """A warmed-up step of Keras's trainer has no op for which the host waits, dropout by seeds and metrics included."""
    x, y = CASES["gpt"].batch(np.random.default_rng(0), BATCH)
    with keras.device(DEVICE):
        model = parallelized("gpt", "float32", x, dropout=0.1)
        model.compile(OPTIMIZERS["adamw"](), CASES["gpt"].make_loss(), metrics=["accuracy"], jit_compile=jit)
        inputs, targets = (torch.as_tensor(each, device=DEVICE) for each in (x, y))
        for _ in range(4):
            model.train_step((inputs, targets))
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.train_step((inputs, targets))
        finally:
            torch.cuda.set_sync_debug_mode("default")
