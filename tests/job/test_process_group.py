"""Process groups: the backend and the device that a mesh's devices ask for, and planning meshes of CPUs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import keras
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.models import CASES, building
from tests.random_models import Heads
from tests.workers import Pools, layout_map
from tp_planner.frontend.layout_map import device_type_of
from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import DeviceType, Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.job import process_group
from tp_planner.job.process_group import device_type, planning_axes, require_process_group

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
NO_GPU = "the mesh has CUDA devices and this machine has none; make a mesh of cpu:0, cpu:1, ..."
OF_CPUS = (
    "the mesh has CUDA devices, the process group that runs (cpu:gloo,cuda:gloo) is for CPUs; "
    "make a mesh of these, or start the group with 'nccl'"
)


@contextlib.contextmanager
def machine(gpus: int, environment: Mapping[str, str] = LAUNCHED) -> Iterator[mock.Mock]:
    """A machine with so many GPUs, on which a process group does not really start; yields what starts it."""

    def start(*args: Any, **kwargs: Any) -> None:
        raise StopIteration

    with (
        mock.patch.dict(os.environ, environment),
        mock.patch("torch.cuda.is_available", return_value=gpus > 0),
        mock.patch("torch.cuda.device_count", return_value=gpus),
        mock.patch("torch.cuda.set_device"),
        mock.patch("torch.distributed.init_process_group", side_effect=start) as started,
        mock.patch("tp_planner.job.process_group._start", started),  # that of several processes
    ):
        yield started


@pytest.mark.parametrize(
    ("gpus", "devices", "expected"),
    [
        (0, None, mock.call("gloo")),
        (0, "cpu", mock.call("gloo")),
        (2, None, mock.call("nccl", device_id=torch.device("cuda", 1))),
        (2, "cuda", mock.call("nccl", device_id=torch.device("cuda", 1))),
        (2, "cpu", mock.call("gloo")),  # whatever else the machine has
    ],
)
def test_backend_is_that_of_the_meshs_devices(gpus: int, devices: DeviceType | None, expected: Any) -> None:
    with machine(gpus) as started, pytest.raises(StopIteration):
        require_process_group(2, devices)
    assert started.call_args_list == [expected]


def test_mesh_of_cuda_devices_needs_them() -> None:
    with machine(0) as started, pytest.raises(PlanError) as refusal:
        require_process_group(2, "cuda")
    assert str(refusal.value) == NO_GPU
    assert not started.called


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (["cpu:0", "cpu:1"], "cpu"),
        (["gpu:0", "gpu:1"], "cuda"),
        (["cuda:0", "CUDA:1"], "cuda"),
        (["tpu:0", "tpu:1"], None),
        (["cpu:0", "gpu:1"], "the mesh has CPUs and CUDA devices (cpu:0, gpu:1); a mesh has devices of one type"),
    ],
)
def test_devices_of_a_mesh(devices: list[str], expected: str | None) -> None:
    mesh = keras.distribution.DeviceMesh((2,), ("model",), devices)
    try:
        found: str | None = device_type_of(mesh)
    except PlanError as error:
        found = str(error)
    assert found == expected


# On the ranks


def refused_devices() -> str:
    with pytest.raises(PlanError) as refusal:
        require_process_group(dist.get_world_size(), "cuda")
    assert device_type() == "cpu"
    return str(refusal.value)


def devices_of_a_group_for_both() -> list[str]:
    """Return what a job computes on whose group has gloo for CPUs and NCCL for CUDA devices, by what the mesh has."""
    found = []
    with mock.patch.object(dist, "get_backend_config", return_value="cpu:gloo,cuda:nccl"):
        for devices in (None, "cpu", "cuda"):
            process_group._used.clear()
            require_process_group(dist.get_world_size(), devices)
            found.append(device_type())
    process_group._used.clear()
    return found


def plan_in_a_job_on_gpus(name: str, replicas: int) -> tuple[str, str]:
    """Return a model's plan in a job on CPUs, and in one whose group says that it is on CUDA devices."""
    case, size = CASES[name], dist.get_world_size()
    plans = []
    for backends in ("cpu:gloo", "cuda:nccl"):
        keras.utils.clear_session()
        with mock.patch.object(dist, "get_backend_config", return_value=backends):
            with planning_axes(Mesh((("batch", replicas), ("model", size // replicas)))) as axes:
                assert {axes.mesh.device_type, *(axis.mesh.device_type for axis in axes.all)} == {"cpu"}
            plans.append(tp_planner.plan(case.build(), layout_map(case.rules)).to_json())
    return plans[0], plans[1]


def plan_of_uneven_shards() -> str:
    """Return the plan of three heads, which a layer's own code tells from each other, on all ranks of the job."""
    with building("float64"):
        inputs = keras.Input((6, 8), name="x")
        model = keras.Model(inputs, Heads(3, 4, causal=True, name="heads")(inputs), name="model")
    rules = {"heads/packed": (None, "model"), "heads/out": ("model", None)}
    layout = Layout(Mesh((("model", 4),)), tuple(LayoutRule(pattern, axes) for pattern, axes in rules.items()))
    return tp_planner.plan(model, layout).to_json()


# In the parent


def test_every_rank_plans_for_rank_0(pools: Pools) -> None:
    """Uneven shards are others on each rank, and yet all ranks make the plan that is made without a job."""
    assert pools(4).run(plan_of_uneven_shards) == [plan_of_uneven_shards()] * 4


def test_planning_leaves_the_process_as_it_was() -> None:
    """No process group, and no rank before each line of an error that the process ends with."""
    before = sys.excepthook
    with planning_axes(Mesh((("model", 2),))):
        assert dist.get_backend() == "fake"
    assert not dist.is_initialized()
    assert sys.excepthook is before


def test_running_group_has_the_meshs_devices(pools: Pools) -> None:
    assert pools(2).run(refused_devices) == [OF_CPUS] * 2
    assert pools(2).run(devices_of_a_group_for_both) == [["cuda", "cpu", "cuda"]] * 2


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_plans_inside_a_job_on_gpus_are_those_outside(pools: Pools, replicas: int) -> None:
    """Fake tensors are on the CPU wherever the job runs; so are the meshes on which they are planned."""
    for on_cpus, on_gpus in pools(2).run(plan_in_a_job_on_gpus, "handwritten", replicas):
        assert on_cpus == on_gpus
