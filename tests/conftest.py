"""Settings for the whole suite: Keras on torch, one thread for each process, and the pools of workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ["KERAS_BACKEND"] = "torch"
os.environ["OMP_NUM_THREADS"] = "1"

import keras  # reads the environment once

from tests.models import USUAL
from tests.workers import Pools, WorkerPool

EVERYWHERE = "gpt"  # the model that `make test` trains in float32 and on four processes, too


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave some of what fixtures multiply to `make sweep`: most of what runs on four processes runs on two, too."""
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if {"model", "dtype", "workers"} <= params.keys():
            usual = params["workers"] == 2 and params["dtype"] == "float64" and params["model"] in USUAL
            one_of_both = params["model"] == EVERYWHERE and (params["workers"] == 2) != (params["dtype"] == "float64")
            is_slow = not usual and not one_of_both
        else:
            is_slow = params.get("workers") == 4
        if is_slow:
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what tests have counted: ``record_property("counted", ...)``."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "counted":
                terminalreporter.write_line(text)


@pytest.fixture(autouse=True)
def _afresh() -> None:
    """Begin every test with Keras's default dtypes and the same random state, whatever the one before has set."""
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)


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
