"""The collectives that run are those in the plan: kinds, bytes, group sizes, phases, and order on the way forward.

Real processes train the zoo while a dispatch mode records every communicating op, whoever called it: a boundary
of the plan, DTensor, or Keras.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

import tp_planner
from tests.models import CASES, usual
from tests.workers import Pools, layout_map
from tp_planner.ir.plan import LayerPlan, Plan

# Case and sizes: the zoo as it is, and what is gathered at use or read by more than one rank.
MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name in CASES},
    "gpt with uneven dims": ("gpt", {"vocabulary": 65, "hidden": 63}),
    "llama with tied embeddings and one head for keys": ("llama", {"tied": True, "kv_heads": 1}),
    "llama with blocks that are computed again": ("llama", {"recomputed": True}),
}
BATCH_SIZE = 4
KINDS = {
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}
LOCAL_OPS = {"wait_tensor", "_wrap_tensor_autograd"}  # of the same namespace, but they send nothing


@dataclass(frozen=True, slots=True, order=True)
class Ran:
    """One collective as it ran. ``bytes`` is the size of this rank's input, ``phase`` "update" after backward."""

    kind: str
    bytes: int
    group_size: int
    phase: str


@dataclass
class Step:
    """What was planned for one training step, and what one rank ran: in it, and for one prediction."""

    planned: list[Ran]
    step: list[Ran]
    prediction: list[Ran]


class Recorder(TorchDispatchMode):
    """Records every op that communicates, in order; collectives of no known kind go by the name of their op."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[Ran] = []
        self._phase = "forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor runs the op, and its collectives, under this mode again
        self._phase = _phase(self._phase)
        name = func.__name__.partition(".")[0]
        if func.namespace in ("_c10d_functional", "c10d") and name not in LOCAL_OPS:
            self.ran.append(self._described(func.namespace, name, args))
        return func(*args, **(kwargs or {}))

    def _described(self, namespace: str, name: str, args: tuple[Any, ...]) -> Ran:
        if namespace == "c10d" or name not in KINDS:
            return Ran(f"{namespace}.{name}", 0, 0, self._phase)
        group = dist.distributed_c10d._resolve_process_group(args[-1])
        return Ran(KINDS[name], args[0].numel() * args[0].itemsize, group.size(), self._phase)


def _phase(before: str) -> str:
    """Return "backward" while autograd runs, "update" afterwards."""
    if torch._C._current_graph_task_id() != -1:
        return "backward"
    return "update" if before != "forward" else "forward"


# On the ranks


def run_one_step(name: str, sizes: Mapping[str, Any], broken_layer: str | None = None) -> Step:
    """Plan, parallelize and train the case; ``broken_layer`` loses its boundaries after the plan was made."""
    case = CASES[name]
    x, y = case.batch(np.random.default_rng(2), BATCH_SIZE)
    model = case.build("float32", **sizes)
    plan = tp_planner.plan(model, layout_map(case.rules), inputs=x)
    tp_planner.parallelize(model, plan if broken_layer is None else without_boundaries(plan, broken_layer))
    model.compile(keras.optimizers.AdamW(), case.make_loss(), jit_compile=False)
    model.train_on_batch(x, y)  # Keras builds optimizer and metrics
    with Recorder() as step:
        model.train_on_batch(x, y)
    with Recorder() as prediction:
        model.predict_on_batch(x)
    planned = [Ran(each.kind, each.bytes, each.group_size, each.phase) for each in plan.collectives]
    return Step(planned, step.ran, prediction.ran)


def without_boundaries(plan: Plan, layer: str) -> Plan:
    """Return the plan with one layer's boundaries gone, but none of its collectives."""
    assert any(each.layer == layer for each in plan.layers)

    def broken(each: LayerPlan) -> LayerPlan:
        return replace(each, inputs=(), output=None) if each.layer == layer else each

    return replace(plan, layers=tuple(map(broken, plan.layers)))


def record_known_collectives() -> list[Ran]:
    """Run a collective of every sort that a step could hide."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = DTensor.from_local(torch.ones(3), mesh, [Shard(0)])
    weight = torch.ones(2, requires_grad=True)
    weight.register_hook(lambda gradient: funcol.wait_tensor(funcol.all_reduce(gradient, "sum", mesh)))
    with Recorder() as recorder:
        sharded.redistribute(placements=[Replicate()])  # what DTensor inserts on its own
        (sharded * sharded).sum().full_tensor()
        weight.sum().backward()
        dist.all_reduce(torch.ones(5))
    return recorder.ran


# In the parent


def mismatch(planned: Iterable[Ran], ran: Iterable[Ran]) -> tuple[dict[Ran, int], dict[Ran, int]]:
    """Return the planned collectives that did not run, and those that ran without being planned."""
    expected, found = Counter(planned), Counter(ran)
    return dict(expected - found), dict(found - expected)


def forward(collectives: Iterable[Ran]) -> list[Ran]:
    return [each for each in collectives if each.phase == "forward"]


def test_recorder_sees_collectives_of_every_origin(pools: Pools) -> None:
    """DTensor's own collectives, those of backward, and direct calls of torch.distributed are recorded."""
    ran = pools(2).run(record_known_collectives)[0]

    assert ran == [
        Ran("all_gather", 12, 2, "forward"),
        Ran("all_reduce", 4, 2, "forward"),
        Ran("all_reduce", 8, 2, "backward"),
        Ran("c10d.allreduce_", 0, 0, "update"),
    ]


@pytest.mark.parametrize("model", usual(MODELS))
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_plan_lists_exactly_the_collectives_that_run(pools: Pools, model: str, size: int) -> None:
    """One training step by Keras runs what is planned and no more, on every rank; a prediction its forward part."""
    ranks = pools(size).run(run_one_step, *MODELS[model])

    assert forward(ranks[0].planned)
    for each in ranks:
        assert each.planned == ranks[0].planned
        assert mismatch(each.planned, each.step) == ({}, {})
        assert forward(each.step) == forward(each.planned)
        assert each.prediction == forward(each.planned)


def test_a_transformer_block_has_two_all_reduces_each_way(pools: Pools) -> None:
    """A third block adds to the step of a GPT what Megatron-LM needs: two all-reduces forward, two backward."""
    pool = pools(2)
    two, three = (pool.run(run_one_step, "gpt", {"blocks": blocks})[0] for blocks in (2, 3))

    activation = BATCH_SIZE * 16 * 32 * 4
    added = {Ran("all_reduce", activation, 2, "forward"): 2, Ran("all_reduce", activation, 2, "backward"): 2}
    assert mismatch(two.step, three.step) == ({}, added)


BROKEN = {
    "output of a row-parallel layer": ("mlp", "down", {Ran("all_reduce", 512, 2, "forward"): 1}),
    "input of a column-parallel layer": ("gpt", "block_1_up", {Ran("all_reduce", 8192, 2, "backward"): 1}),
}


@pytest.mark.parametrize(("name", "layer", "missing"), BROKEN.values(), ids=BROKEN)
def test_comparison_notices_a_missing_boundary(pools: Pools, name: str, layer: str, missing: dict[Ran, int]) -> None:
    """Where a boundary of the plan is not executed, just its collective is missing."""
    for each in pools(2).run(run_one_step, name, {}, layer):
        assert mismatch(each.planned, each.step) == (missing, {})
