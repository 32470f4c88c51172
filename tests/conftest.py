"""Settings for the whole suite: Keras on torch, one thread for each process, and the pools of workers."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ["KERAS_BACKEND"] = "torch"
os.environ["OMP_NUM_THREADS"] = "1"

from tests.workers import Pools, WorkerPool  # imports Keras, which reads the environment once

# Models of the zoo that `make test` trains in both dtypes on both numbers of processes; the others in float64 on two,
# and in float32 on four, but variants of them, which have a space in their names, on two alone.
EVERYWHERE = {"mlp", "gpt", "llama", "handwritten"}
NAMED_ON_FOUR = {"test_any_layout.py", "test_storage.py"}  # whose other models run on two processes alone


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave some of what a fixture multiplies to `make sweep`."""
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        trained = {"model", "dtype", "workers"} <= params.keys() and params["model"] not in EVERYWHERE
        halved = trained and (params["dtype"], params["workers"]) in {("float32", 2), ("float64", 4)}
        variant = " " in str(params.get("model", ""))
        named = item.path.name in NAMED_ON_FOUR and params.get("name") not in EVERYWHERE
        if halved or (params.get("workers") == 4 and (variant or named)):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """Return the pool of a number of processes; it starts on first use and serves the whole session."""
    started: dict[int, WorkerPool] = {}

    def pool(size: int) -> WorkerPool:
        return started.setdefault(size, WorkerPool(size))

    yield pool
    for each in started.values():
        each.stop()


@pytest.fixture(scope="session", params=[2, 4], ids=lambda size: f"{size} processes")
def workers(request: pytest.FixtureRequest, pools: Pools) -> WorkerPool:
    """The pool of 2 processes, then that of 4."""
    return pools(request.param)
