"""KerasHub's families and their presets: two all-reduces each way per attention or feed-forward, the same function.

The table in plans/README.md is what the tests expect. Ranks train each family with the first step checked against
the plan, in float32.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
import torch.distributed as dist

import tp_planner
from tests.families import FAMILIES
from tests.models import Batch
from tests.test_parity import Arrays, Record, begin, differences, largest
from tests.test_parity import _whole as whole
from tests.workers import WorkerPool
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.frontend.layout_file import find_layout_file, read_layout_file
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.plan import Plan
from tp_planner.planner import make_plan

TOLERANCE = 1e-5
STEPS = 3
BATCH_SIZE = 2
LAST_BLOCK = re.compile(r".*(layer|block)_1/.*")


@dataclass
class Trained:
    """Both trainings as one rank saw them. ``single`` is None but on rank 0."""

    single: Record | None
    sharded: Record


@cache
def plan_of(name: str, parts: int) -> Plan:
    """Return the plan of the tiny family by its preset; plans are the same on every rank, so one process makes them."""
    family = FAMILIES[name]
    layout = read_layout_file(find_layout_file(family.preset)).on(Mesh((("batch", 1), ("model", parts))))
    return make_plan(family.build(), layout, batches(name)[0][0])


def batches(name: str) -> list[Batch]:
    """Return one batch for each step, the same in every process."""
    rng = np.random.default_rng(1)
    return [FAMILIES[name].batch(rng, BATCH_SIZE) for _ in range(STEPS)]


# On the ranks


def train_both(name: str, sizes: Mapping[str, Any], plan: Plan | None, map_of: str = "") -> Trained:
    """Train the family alone on rank 0, then by the plan, or by the layout map of a KerasHub backbone."""
    single = None
    if dist.get_rank() == 0:
        single = train(FAMILIES[name].build(**sizes), name)
    model = FAMILIES[name].build(seed=dist.get_rank(), **sizes)  # rank 0's weights are the truth
    tp_planner.parallelize(model, plan or hub_layout_map(map_of), inputs=batches(name)[0][0], check="first_step")
    return Trained(single, train(model, name))


def train(model: keras.Model, name: str) -> Record:
    """Record output, loss and gradients for one batch, then losses and weights of steps of AdamW."""
    case = FAMILIES[name].case
    record = begin(model, case, "float32", batches(name)[0])
    optimizer = keras.optimizers.AdamW(learning_rate=0.01, weight_decay=0.1, epsilon=1e-3, name="adamw")
    model.compile(optimizer, case.make_loss(), metrics=None, weighted_metrics=None, jit_compile=False)
    record.losses += [float(model.train_on_batch(x, y)) for x, y in batches(name)]
    record.weights = {key: whole(variable._value) for key, variable in named_variables(model).items()}
    return record


def hub_layout_map(backbone: str) -> keras.distribution.LayoutMap:
    """Return the layout map that a backbone of KerasHub gives for a mesh (1, ranks)."""
    size = dist.get_world_size()
    mesh = keras.distribution.DeviceMesh((1, size), ("batch", "model"), [f"cpu:{rank}" for rank in range(size)])
    return getattr(keras_hub.models, backbone).get_layout_map(mesh)


# In the parent


def assert_same_function(ranks: list[Trained]) -> None:
    """Output, loss, gradients, losses of the steps and weights after them are those of the single device."""
    single = ranks[0].single
    assert single is not None
    for each in ranks:
        assert differences(each.sharded.outputs, single.outputs, TOLERANCE) == {}
        assert gradient_differences(each.sharded.gradients, single.gradients) == {}
        assert each.sharded.losses == pytest.approx(single.losses, rel=TOLERANCE)
        assert differences(each.sharded.weights, single.weights, TOLERANCE) == {}


def gradient_differences(found: Arrays, expected: Arrays) -> dict[str, float]:
    """Return the variables whose gradients differ, and by how much.

    The gradient of a key's bias is zero, because softmax subtracts what all keys share: what is left of it is
    rounding, which is only compared with the largest gradient of all.
    """
    zero = TOLERANCE * largest(expected)
    return {
        key: error
        for key, error in differences(found, expected, TOLERANCE).items()
        if not (key.endswith("/key/bias") and np.max(np.abs((found[key], expected[key]))) <= zero)
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_x(workers: WorkerPool, name: str) -> None:
    assert_same_function(workers.run(train_both, name, {}, plan_of(name, workers.size)))
