"""``make selftest``: its checks pass on this machine, and fail where something is wrong on one of the ranks."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

import tp_planner
from tests.workers import Pools
from tp_planner import selftest

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("device detection", "DataParallel", "ModelParallel", "gradient flow")
OFF = r"rank 0: RuntimeError: predictions: \d\.\de-01 off one device, relatively; tolerance 1e-05"


# On the ranks


def wrong_devices() -> AbstractContextManager[object]:
    """Let Keras see one device too few."""
    return mock.patch("keras.distribution.list_devices", return_value=["cpu:0"])


def without_averaging() -> AbstractContextManager[object]:
    """Let every replica keep its own gradients."""
    return mock.patch("tp_planner.training.averaging.add_in_place")


def without_sums() -> AbstractContextManager[object]:
    """Let a sum over the ranks of the model axis be the own summand on rank 1, in the backward pass alone."""
    plain = torch.ops._c10d_functional.all_reduce.default

    def all_reduce(tensor: torch.Tensor, *args: object) -> torch.Tensor:
        summed = plain(tensor, *args)
        backward = torch._C._current_graph_task_id() != -1 and not isinstance(tensor, FakeTensor)
        return tensor.clone() if backward and dist.get_rank() == 1 else summed

    return mock.patch("tp_planner.regions.collectives._ALL_REDUCE", all_reduce)


WRONG: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "nothing": contextlib.nullcontext,
    "devices": wrong_devices,
    "averaging": without_averaging,
    "sums": without_sums,
}


def lines_of(wrong: str) -> str:
    """Return what this rank prints while something is wrong."""
    tp_planner.enable_keras_distribution()
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed, WRONG[wrong]():
            for name, check in selftest.CHECKS.items():
                selftest.line_of_all(name, check)
    finally:
        tp_planner.disable_keras_distribution()
    return printed.getvalue()


# In the parent


@pytest.mark.parametrize(
    ("wrong", "failed", "reason"),
    [
        ("nothing", [], None),
        ("devices", list(NAMES), "rank 0: RuntimeError: 1 devices are listed for 2 processes"),
        pytest.param("averaging", ["DataParallel"], OFF, marks=pytest.mark.slow),
        pytest.param("sums", ["ModelParallel", "gradient flow"], OFF, marks=pytest.mark.slow),
    ],
    ids=list(WRONG),
)
def test_checks_fail_where_something_is_wrong(pools: Pools, wrong: str, failed: list[str], reason: str | None) -> None:
    """Rank 0 prints four lines, those of the checks that fail with the reason; another rank prints nothing."""
    first, second = pools(2).run(lines_of, wrong)
    lines = first.splitlines()
    assert second == ""
    assert [line.split("  ")[1] for line in lines] == list(NAMES)
    assert [name for name, line in zip(NAMES, lines, strict=True) if line.startswith("FAILED  ")] == failed
    assert sum(line.startswith("PASSED  ") for line in lines) == len(NAMES) - len(failed)
    if reason is not None:
        told = next(line for line in lines if line.startswith("FAILED"))
        assert re.fullmatch(rf"FAILED  {failed[0]}\s+{reason}", told), told


@pytest.mark.slow
def test_selftest() -> None:
    """The command starts one process, then two, and ends well."""
    command = [sys.executable, "-m", "tp_planner.cli", "selftest"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    lines = [line.split("  ")[:2] for line in ended.stdout.splitlines()]
    passed = [["PASSED", name] for name in NAMES]
    assert lines == [["1 process on the CPU"], *passed, ["2 processes on the CPU"], *passed]
    assert ended.returncode == 0
