"""What ranks physically store: bytes of storages, the verification's counts and text, and the lines of the log."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import tp_planner
from tests.models import CASES, Batch, usual
from tests.workers import Pools, WorkerPool, layout_map
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.ir.placement import Shard

BATCH_SIZE = 4
SLOTS = "momentum", "velocity"


@dataclass(frozen=True, slots=True)
class Stored:
    """How one tensor lies in the memory of one rank. ``dim`` is that of the plan's shard, None for a whole one."""

    shape: tuple[int, ...]
    dim: int | None
    itemsize: int
    bytes: int  # of the storage behind it, views of something larger counted in full

    def expected_bytes(self, rank: int, size: int) -> int:
        """Return the bytes of the rank's chunk of the shape, cut as torch.chunk does."""
        if self.dim is None:
            return math.prod(self.shape) * self.itemsize
        length = self.shape[self.dim]
        chunk = -(-length // size)
        own = len(range(length)[rank * chunk : (rank + 1) * chunk])
        return math.prod(self.shape) // length * own * self.itemsize


# On the ranks


def store(name: str, slots: str, sizes: Mapping[str, Any]) -> dict[str, Stored]:
    """Return how the case's variables, gradients and AdamW slots are stored after a step.

    ``slots`` says when Keras made the slots: "before" or "after" parallelize.
    """
    case = CASES[name]
    x, y = batch = case.batch(np.random.default_rng(3), BATCH_SIZE)
    model = case.build(**sizes)
    plan = tp_planner.plan(model, layout_map(case.rules), inputs=x)
    if slots == "before":
        train(model, name, batch)
    tp_planner.parallelize(model, plan)
    if slots == "after":
        train(model, name, batch)
    else:
        model.train_on_batch(x, y)
    dims = {each.key: each.placement.dim if isinstance(each.placement, Shard) else None for each in plan.variables}
    return {key: _stored(tensor, dims[variable]) for key, variable, tensor in _tensors(model)}


def train(model: keras.Model, name: str, batch: Batch) -> None:
    model.compile(keras.optimizers.AdamW(), CASES[name].make_loss(), jit_compile=False)
    model.train_on_batch(*batch)


def _tensors(model: keras.Model) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield (what it is, key of the variable it belongs to, the tensor)."""
    keys = {id(variable): key for key, variable in named_variables(model).items()}
    for variable in named_variables(model).values():
        key = keys[id(variable)]
        yield key, key, variable._value
        if variable._value.grad is not None:
            yield f"{key} gradient", key, variable._value.grad
    optimizer = model.optimizer
    for kind, slots in zip(SLOTS, (optimizer._momentums, optimizer._velocities), strict=True):
        for variable, slot in zip(optimizer._trainable_variables, slots, strict=True):
            yield f"{keys[id(variable)]} {kind}", keys[id(variable)], slot._value


def _stored(tensor: torch.Tensor, dim: int | None) -> Stored:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return Stored(tuple(tensor.shape), dim, tensor.itemsize, local.untyped_storage().nbytes())


def whole_tensors_kept(name: str) -> list[str]:
    """Return the sharded variables whose whole value is still in this rank's memory after parallelize."""
    case = CASES[name]
    x, _ = case.batch(np.random.default_rng(3), BATCH_SIZE)
    model = case.build()
    plan = tp_planner.plan(model, layout_map(case.rules), inputs=x)
    before = {key: weakref.ref(variable._value) for key, variable in named_variables(model).items()}
    tp_planner.parallelize(model, plan)
    gc.collect()
    sharded = {each.key for each in plan.variables if isinstance(each.placement, Shard)}
    return [key for key, whole in before.items() if key in sharded and whole() is not None]


def verify(name: str, parallel: bool) -> tuple[tp_planner.Verification, str]:
    """Return the verification of the case after a training step, and what it printed."""
    case = CASES[name]
    batch = case.batch(np.random.default_rng(3), BATCH_SIZE)
    model = case.build()
    if parallel:
        tp_planner.parallelize(model, layout_map(case.rules), inputs=batch[0])
    train(model, name, batch)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        verification = tp_planner.verify_model_parallel(model)
    assert str(verification) + "\n" == printed.getvalue() or dist.get_rank() > 0
    return verification, printed.getvalue()


def log(name: str, level: int, call: str) -> list[str]:
    """Return the lines that the logger writes in "plan" or in "parallelize" of a plan."""
    case = CASES[name]
    model, layouts = case.build(), layout_map(case.rules)
    with _logged(level) as lines:
        if call == "plan":
            tp_planner.plan(model, layouts)
        else:
            tp_planner.parallelize(model, layouts)
    return lines


@contextlib.contextmanager
def _logged(level: int) -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("tp_planner")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


# In the parent


@pytest.mark.parametrize("slots", [pytest.param("before", marks=pytest.mark.slow), "after"])
@pytest.mark.parametrize("name", usual(CASES, {"convnet", "llama", "subclassed", "tied"}))
def test_ranks_store_their_share(workers: WorkerPool, name: str, slots: str) -> None:
    """A rank stores one of N chunks of each sharded variable, of its gradient and of its AdamW slots."""
    ranks = workers.run(store, name, slots, {})

    sharded = [key for key, stored in ranks[0].items() if stored.dim is not None]
    assert any(key.endswith("kernel") for key in sharded)
    assert all(f"{key} {slot}" in ranks[0] for key in sharded if key.endswith("kernel") for slot in SLOTS)
    for rank, tensors in enumerate(ranks):
        expected = {key: stored.expected_bytes(rank, workers.size) for key, stored in tensors.items()}
        assert {key: stored.bytes for key, stored in tensors.items()} == expected


def test_uneven_shares_add_up(workers: WorkerPool) -> None:
    """Where the dim does not divide, the ranks' chunks differ, and together they are the whole."""
    ranks = workers.run(store, "gpt", "after", {"vocabulary": 65, "hidden": 63})

    for key, stored in ranks[0].items():
        if stored.dim is not None:
            held = [tensors[key].bytes for tensors in ranks]
            assert held == [tensors[key].expected_bytes(rank, workers.size) for rank, tensors in enumerate(ranks)]
            assert sum(held) == math.prod(stored.shape) * stored.itemsize
    assert len({tensors["token_embedding/embeddings momentum"].bytes for tensors in ranks}) > 1


def test_share_is_one_nth_where_the_dim_divides(workers: WorkerPool) -> None:
    """In the GPT, whose dims all divide, the sum over the sharded tensors is exactly 1/N of the whole."""
    for tensors in workers.run(store, "gpt", "after", {}):
        sharded = [stored for stored in tensors.values() if stored.dim is not None]
        whole = sum(math.prod(stored.shape) * stored.itemsize for stored in sharded)
        assert sum(stored.bytes for stored in sharded) * workers.size == whole


def test_nobody_keeps_the_whole_value_of_a_sharded_variable(pools: Pools) -> None:
    """After parallelize no reference to the whole parameters is left, on rank 0 or elsewhere."""
    assert pools(2).run(whole_tensors_kept, "mlp") == [[], []]


SUMMARY = """\
[ModelParallel] Verification Summary:
  - Total devices: {size}
  - Sharded variables: {sharded}
  - Replicated variables: {replicated}
  - Model parallel is {state}
"""


@pytest.mark.parametrize(
    ("name", "sharded", "replicated"), [("mlp", 3, 3), ("gpt", 23, 15), ("tied", 4, 3)], ids=["mlp", "gpt", "tied"]
)
def test_verification_counts_and_prints_once(workers: WorkerPool, name: str, sharded: int, replicated: int) -> None:
    """All ranks get the same verification of what all of them store; rank 0 prints it."""
    ranks = workers.run(verify, name, True)

    size = workers.size
    text = SUMMARY.format(size=size, sharded=sharded, replicated=replicated, state="ACTIVE")
    assert [printed for _, printed in ranks] == [text] + [""] * (size - 1)
    for verification, _ in ranks:
        assert verification == ranks[0][0]
        assert (verification.active, verification.reason) == (True, "")
        assert (verification.sharded, verification.replicated) == (sharded, replicated)
        assert verification.devices == ("cpu",) * size
        assert len(verification.ranks) == size


def test_verification_lists_slots_with_their_bytes(pools: Pools) -> None:
    """``ranks`` holds variables and optimizer slots, as they are in memory."""
    verification, _ = pools(2).run(verify, "mlp", True)[1]

    for rank in verification.ranks:
        stored = {each.key: each for each in rank}
        for key in ("up/kernel", "optimizer/adam_w/up_kernel_momentum", "optimizer/adam_w/up_kernel_velocity"):
            each = stored[key]
            assert (each.whole_shape, each.local_shape, each.stored_bytes) == ((16, 64), (16, 32), 2048)
            assert each.sharded
        assert not stored["optimizer/adam_w/iteration"].sharded


def test_verification_of_a_plain_model_says_what_to_do(pools: Pools) -> None:
    """Without a plan applied, nothing is active, even if the processes are there."""
    ranks = pools(2).run(verify, "mlp", False)

    state = "NOT ACTIVE: no plan is applied; call tp_planner.parallelize(model, layout_map)"
    text = SUMMARY.format(size=2, sharded=0, replicated=6, state=state)
    assert [printed for _, printed in ranks] == [text, ""]


def lines_of_the_mlp(rank: int) -> list[str]:
    """Return the lines of parallelizing the MLP over two ranks, in the order of its variables."""
    shards = {
        "up.kernel": ("(16, 64)", 1, "(16, 32)"),
        "up.bias": ("(64,)", 0, "(32,)"),
        "down.kernel": ("(64, 32)", 0, "(32, 32)"),
        "down.bias": (None, None, "(32,)"),
        "head.kernel": (None, None, "(32, 8)"),
        "head.bias": (None, None, "(8,)"),
    }
    lines = []
    for path, (whole, dim, local) in shards.items():
        if whole is not None and rank == 0:
            lines.append(
                f"INFO [ModelParallel] Sharding tensor '{path.split('.')[1]}' | Original shape: {whole} | "
                f"Shard axis: {dim} | Devices: cpu:0, cpu:1"
            )
        lines.append(
            f"INFO [ModelParallel] Distributing variable '{path}' | Shape: {local} | "
            f"Device: cpu:{rank} | Is sharded: {whole is not None}"
        )
    return lines


def test_log_of_parallelize(pools: Pools) -> None:
    """Every rank logs where each variable went, once; rank 0 also which tensors were cut and how."""
    ranks = pools(2).run(log, "mlp", logging.INFO, "parallelize")

    assert ranks == [lines_of_the_mlp(0), lines_of_the_mlp(1)]


@pytest.mark.parametrize(("level", "call"), [(logging.WARNING, "parallelize"), (logging.INFO, "plan")])
def test_nothing_else_is_logged(pools: Pools, level: int, call: str) -> None:
    """At the default level sharding is silent; a plan places nothing, so it has nothing to log."""
    assert pools(2).run(log, "mlp", level, call) == [[], []]
