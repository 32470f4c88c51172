"""Updates hold next to nothing beyond variables, gradients and slots, and change them as Keras's own code does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import keras
import pytest
import torch

import tp_planner
from tests.dryrun.test_simulation import Measured, measure
from tests.training.test_training import OPTIMIZERS, Both, check_equal, train_with
from tests.workers import Pools
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.planner import make_plan
from tp_planner.training import updates

SLICED = ("rmsprop", "adagrad", "adadelta", "adamax", "nadam", "ftrl", "lion")
WITHOUT_TEMPORARIES = ("adam", "adamw", "sgd", "momentum")


@contextmanager
def slices_of(size: int) -> Iterator[None]:
    """Inside, every variable is updated alone, and one of more than ``size`` bytes in slices."""
    before = updates.SMALL, updates.SLICE_BYTES
    updates.SMALL, updates.SLICE_BYTES = 0, size
    try:
        yield
    finally:
        updates.SMALL, updates.SLICE_BYTES = before


# On the ranks


def train_in_slices() -> dict[str, Both]:
    with slices_of(100):
        return {name: train_with(name, False) for name in SLICED}


def measure_in_slices() -> Measured:
    with slices_of(4096):
        return measure("gpt", "float32", "RMSprop")


# In the parent


def test_slices_of_variables(pools: Pools) -> None:
    """Weights and slots after four steps are those of Keras's update, which has all variables at once."""
    for both in pools(2).run(train_in_slices)[0].values():
        check_equal(both, 1e-12)


@pytest.mark.slow
def test_slices_in_the_plan(pools: Pools) -> None:
    """The simulated update of blocks that stand for others is the real one."""
    for each in pools(2).run(measure_in_slices):
        assert each.same.memory == each.planned.memory
        assert each.same.work[-1].ops == each.planned.work[-1].ops


@pytest.mark.parametrize("name", [each for each in SLICED if each != "nadam"] + list(WITHOUT_TEMPORARIES))
def test_memory_of_updates(name: str) -> None:
    """Of 256 MiB of weights on a rank, no update makes temporaries beyond 64 MiB; the fused ones make none.

    Nadam reads values, so that its update is not simulated.
    """
    keras.utils.clear_session()
    with keras.device("meta"):
        inputs = keras.Input((4096,))
        hidden = keras.layers.Dense(16384, use_bias=False, name="up")(inputs)
        model = keras.Model(inputs, keras.layers.Dense(4096, use_bias=False, name="down")(hidden))
    mesh = keras.distribution.DeviceMesh((2,), ("model",), ["cpu:0", "cpu:1"])
    rules = keras.distribution.LayoutMap(mesh)
    rules["up/kernel"], rules["down/kernel"] = (None, "model"), ("model", None)
    plan = tp_planner.plan(model, rules, optimizer=OPTIMIZERS[name]())
    memory = plan.step.memory
    assert plan.step.whole_update
    assert memory.largest.parameters == 256 * 2**20
    none = name in WITHOUT_TEMPORARIES and (name != "sgd" or keras.__version__.startswith("3.15."))
    assert memory.largest.temporaries < (2**20 if none else 64 * 2**20)


def test_shards_whose_gradients_are_laid_out_in_another_way_are_updated_by_the_kernel_too() -> None:
    """The gradient of a kernel that an einsum transposes is laid out as its shard, so that one kernel updates all."""
    x = keras.Input((3, 8, 6), name="x")
    outputs = keras.layers.EinsumDense("btnh,nhd->btd", (3, 10), name="output")(x)
    model = keras.Model(x, outputs, name="attention_output")
    ops = {}
    for rules in ({}, {"output/kernel": ("model", None, None)}):
        layout = Layout(Mesh((("model", 2),)), tuple(LayoutRule(*rule) for rule in rules.items()))
        ops[len(rules)] = make_plan(model, layout, optimizer=keras.optimizers.Adam()).step.work[-1].ops
    assert ops[1] == ops[0]


@pytest.mark.parametrize(
    ("others", "fits"),
    [
        ((torch.ones(2, 3), None), True),
        ((torch.ones(3, 2).T, None), False),
        ((torch.ones(2, 3, dtype=torch.float64), None), False),
        ((torch.ones(2, 3, device="meta"), None), False),
    ],
)
def test_kernels_get_tensors_that_are_alike(others: tuple[torch.Tensor | None, ...], fits: bool) -> None:
    """They go through memory, and do not ask what is there."""
    assert updates._kind((torch.ones(2, 3), *others)) == ((torch.device("cpu"), torch.float32) if fits else None)
