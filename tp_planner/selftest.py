"""The self-test's checks, on the processes of one job: each compares ``keras.distribution`` with one device.

``tp-planner selftest`` starts one job of one process and one of two. Rank 0 prints a line for each check; the exit
code is 1 if one has failed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

import tp_planner
from tp_planner.gpt import BYTES, LENGTH, RULES, build_gpt
from tp_planner.job.process_group import this_device
from tp_planner.job.rendezvous import exchange
from tp_planner.keras_distribution import backend
from tp_planner.storage.variables import local_tensor

ROWS, BATCH, EPOCHS = 7, 4, 2  # the last batch of an epoch is smaller
LEARNING_RATE = 0.1
TOLERANCE = 1e-5  # relative, in float32
TINY = 1e-30  # keeps an array that is all zero from dividing by zero
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

Arrays = Mapping[str, np.ndarray]


def main() -> int:
    """Run all checks on this process of the job; return the exit code."""
    tp_planner.enable_keras_distribution()
    keras.distribution.initialize()
    lines = [line_of_all(name, check) for name, check in CHECKS.items()]
    dist.destroy_process_group()
    return 0 if all(line.startswith("PASSED") for line in lines) else 1


def line_of_all(name: str, check: Callable[[], str]) -> str:
    """Run a check; return what rank 0 prints of it: whether it has passed on all ranks, and what was seen.

    A rank that fails tells the others. If they do not come to hear it, because they wait for it in a collective, it
    prints the line itself and ends: so torchrun ends them.
    """
    try:
        passed, seen = True, check()
    except Exception as error:
        passed, seen = False, f"rank {dist.get_rank()}: {type(error).__name__}: {' '.join(str(error).split())}"
    try:
        failures = [text for text in exchange(f"the self-test of {name}", "" if passed else seen) if text]
    except tp_planner.ParallelRuntimeError as error:
        print(line("FAILED", name, f"rank {dist.get_rank()}: {error}" if passed else seen), flush=True)
        sys.exit(1)
    whole = line("FAILED", name, failures[0]) if failures else line("PASSED", name, seen)
    if dist.get_rank() == 0:
        print(whole, flush=True)
    return whole


def line(verdict: str, name: str, seen: str) -> str:
    """Return one line of the self-test."""
    return f"{verdict}  {name:<16}  {seen}"


# The checks; each returns what was seen, and raises if that is not as on one device


def device_detection() -> str:
    """Each process has a device of the list, which computes what NumPy does, and no two have the same."""
    size, rank = dist.get_world_size(), dist.get_rank()
    names = keras.distribution.list_devices()[:size]
    if len(names) < size:
        raise RuntimeError(f"{len(names)} devices are listed for {size} processes")
    device = backend._to_backend_device(names[rank])
    factor = np.random.default_rng(rank).standard_normal((LENGTH, LENGTH)).astype("float32")
    tensor = torch.as_tensor(factor, device=device)
    require_equal({"a product of matrices": host(tensor @ tensor)}, {"a product of matrices": factor @ factor})
    ranks = host(backend.all_gather(torch.full((1,), float(rank), device=device)))
    require_equal({"the ranks that all have gathered": ranks}, {"the ranks that all have gathered": np.arange(size)})
    own = [text for text in exchange("the devices of the self-test", str(device)) if text != "cpu"]
    if len(set(own)) < len(own):
        raise RuntimeError(f"processes share a device: {', '.join(own)}")
    return f"{', '.join(names)}; {dist.get_backend()}"


def data_parallel() -> str:
    """Training on shares of each batch gives the losses, weights and predictions of one device on all of it."""
    expected = trained(build_model())
    with keras.distribution.DataParallel(devices=devices()).scope():
        model = build_model()
        rows = RowsSeen(model)
        found = trained(model)
    total = backend.all_reduce(torch.tensor(float(rows.trained), device=this_device()))
    if float(total) != EPOCHS * ROWS:
        raise RuntimeError(f"replicas were trained on {float(total):.0f} rows together, not on {EPOCHS * ROWS}")
    return f"losses, weights and predictions; largest difference {require_equal(found, expected):.1e}"


def model_parallel() -> str:
    """Training a model that is stored in shards gives the losses, weights and predictions of one device."""
    expected = trained(build_model())
    with over_model_axis().scope():
        model = build_model()
        found = trained(model)
        stored = sum(local_tensor(variable).numel() for variable in model.weights)
    whole = sum(array.size for name, array in expected.items() if name.startswith("weight "))
    if dist.get_world_size() > 1 and stored == whole:
        raise RuntimeError(f"this process stores all {whole} numbers of the model")
    difference = require_equal(found, expected)
    return f"losses, weights and predictions; largest difference {difference:.1e}; {stored / whole:.0%} of them here"


def gradient_flow() -> str:
    """Every trainable variable gets the gradient that it has on one device, whole or in shards."""
    expected = gradients(build_model())
    with over_model_axis().scope():
        found = gradients(build_model())
    return f"{len(expected)} gradients; largest difference {require_equal(found, expected):.1e}"


CHECKS = {
    "device detection": device_detection,
    "DataParallel": data_parallel,
    "ModelParallel": model_parallel,
    "gradient flow": gradient_flow,
}


# What they share


def devices() -> list[str]:
    """Return the devices of this job, one for each process."""
    names: list[str] = keras.distribution.list_devices()
    return names[: dist.get_world_size()]


def over_model_axis() -> keras.distribution.ModelParallel:
    """Return the distribution that splits layers over all processes."""
    mesh = keras.distribution.DeviceMesh((1, dist.get_world_size()), ("batch", "model"), devices())
    layouts = keras.distribution.LayoutMap(mesh)
    for pattern, axes in RULES.items():
        layouts[pattern] = axes
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def build_model() -> keras.Model:
    """Return the GPT of the demonstration with the same weights each time, biases among them that are not zero."""
    model, rng = build_gpt(), np.random.default_rng(0)
    for variable in model.weights:
        around = 1.0 if variable.name == "gamma" else 0.0
        variable.assign(around + 0.1 * rng.standard_normal(variable.shape).astype("float32"))
    return model


def data() -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and targets, (rows, positions) of int32."""
    tokens = np.random.default_rng(1).integers(0, BYTES, (ROWS, LENGTH + 1)).astype("int32")
    return tokens[:, :-1], tokens[:, 1:]


def trained(model: keras.Model) -> dict[str, np.ndarray]:
    """Train the model; return the losses, the weights by path, and what the model predicts then."""
    inputs, targets = data()
    model.compile(keras.optimizers.SGD(LEARNING_RATE), LOSS)
    history = model.fit(inputs, targets, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0)
    paths = [f"weight {variable.path}" for variable in model.weights]
    weights = dict(zip(paths, model.get_weights(), strict=True))
    predictions = model.predict(inputs, batch_size=BATCH, verbose=0)
    return {"losses": np.array(history.history["loss"]), **weights, "predictions": predictions}


class RowsSeen:
    """Counts the rows that the model is called on in training."""

    def __init__(self, model: keras.Model) -> None:
        self.trained = 0
        model.register_forward_pre_hook(self._see)

    def _see(self, model: keras.Model, args: Any) -> None:
        planned = isinstance(args[0], FakeTensor) or args[0].is_meta
        if torch.is_grad_enabled() and not planned:
            self.trained += len(args[0])


def gradients(model: keras.Model) -> dict[str, np.ndarray]:
    """Return the whole gradient of every trainable variable, by its path."""
    inputs, targets = data()
    LOSS(targets, model(inputs)).backward()
    absent = [variable.path for variable in model.trainable_variables if variable.value.grad is None]
    if absent:
        raise RuntimeError(f"no gradient has come to {absent[0]!r} and {len(absent) - 1} others")
    return {f"gradient of {each.path}": host(each.value.grad) for each in model.trainable_variables}


def host(tensor: Any) -> np.ndarray:
    """Return the whole of a tensor as an array."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    array: np.ndarray = whole.detach().cpu().numpy()
    return array


def require_equal(found: Arrays, expected: Arrays) -> float:
    """Return the largest relative difference of the arrays. Raises RuntimeError if it is not within the tolerance."""
    differences = {name: relative(found[name], array) for name, array in expected.items()}
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= TOLERANCE:
        raise RuntimeError(f"{worst}: {differences[worst]:.1e} off one device, relatively; tolerance {TOLERANCE:.0e}")
    return differences[worst]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of the difference over the norm of ``expected``; not a number if one of them has such."""
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected)) / max(norm, TINY)


if __name__ == "__main__":
    sys.exit(main())
