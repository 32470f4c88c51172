"""The backend library of ``keras.distribution``: what Keras's own tests ask of one, and what is torch's own."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
from keras.src import backend as keras_backend
from keras.src.distribution import distribution_lib
from keras.src.saving import saving_lib
from torch._C import _len_torch_dispatch_stack
from torch.distributed.tensor import DTensor, Replicate, Shard

import tp_planner
from tests.workers import Pools, layout_map
from tp_planner.keras_distribution import backend, install
from tp_planner.keras_distribution.data import share_of

KERAS_OWN = keras_backend.distribution_lib  # None in Keras 3.15
EIGHT = [f"cpu:{number}" for number in range(8)]


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    tp_planner.enable_keras_distribution()
    yield
    keras.distribution.set_distribution(None)
    tp_planner.disable_keras_distribution()


def mesh(shape: tuple[int, ...] = (4, 2), names: tuple[str, ...] = ("data", "model")) -> Any:
    return keras.distribution.DeviceMesh(shape, names, EIGHT[: int(np.prod(shape))])


# Installing


def test_importing_changes_nothing_and_disabling_undoes_everything() -> None:
    tp_planner.disable_keras_distribution()
    places = (
        keras.Model,
        keras_backend.torch.Variable,
        install.data_adapters,
        keras.callbacks.CallbackList,
        saving_lib,
        install.torch_trainer,
        install.torch_trainer.TorchEpochIterator,
        keras_backend,
    )
    before = [dict(vars(place)) for place in places]
    assert keras_backend.distribution_lib is KERAS_OWN is not backend

    tp_planner.enable_keras_distribution()
    tp_planner.enable_keras_distribution()

    assert keras_backend.distribution_lib is distribution_lib.distribution_lib is backend
    assert [dict(vars(place)) for place in places] != before
    tp_planner.disable_keras_distribution()
    tp_planner.disable_keras_distribution()
    assert [dict(vars(place)) for place in places] == before


def test_enabling_that_fails_midway_leaves_keras_as_it_was() -> None:
    tp_planner.disable_keras_distribution()
    places = keras.Model, keras_backend.torch.Variable, keras_backend
    before = [dict(vars(place)) for place in places]
    with (
        mock.patch.object(install.callbacks, "deciding_alike", side_effect=ValueError("not this version")),
        pytest.raises(ValueError, match=r"^not this version$"),
    ):
        tp_planner.enable_keras_distribution()
    assert [dict(vars(place)) for place in places] == before
    tp_planner.enable_keras_distribution()
    assert keras_backend.distribution_lib is backend


def test_a_newer_keras_with_a_library_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    tp_planner.disable_keras_distribution()
    own = KERAS_OWN or SimpleNamespace()
    with mock.patch.object(keras_backend, "distribution_lib", own), caplog.at_level(logging.WARNING, "tp_planner"):
        tp_planner.enable_keras_distribution()
        assert keras_backend.distribution_lib is backend
        tp_planner.disable_keras_distribution()
        assert keras_backend.distribution_lib is own
    assert [record.getMessage() for record in caplog.records] == [
        f"Keras {keras.__version__} brings a distribution library for torch; tp_planner's is in use instead, until "
        f"tp_planner.disable_keras_distribution()"
    ]


@pytest.mark.skipif(KERAS_OWN is None, reason="Keras 3.15 has no library for torch, and so no mode")
def test_the_dispatch_mode_of_kerass_own_library_is_left_and_entered_again() -> None:
    tp_planner.disable_keras_distribution()
    outside = _len_torch_dispatch_stack()
    keras.distribution.set_distribution(distribution_lib.Distribution(mesh()))
    assert _len_torch_dispatch_stack() == outside + 1

    tp_planner.enable_keras_distribution()
    assert _len_torch_dispatch_stack() == outside
    tp_planner.disable_keras_distribution()
    assert _len_torch_dispatch_stack() == outside + 1
    keras.distribution.set_distribution(None)
    assert _len_torch_dispatch_stack() == outside


# Devices and processes

LAUNCHED = {"RANK": "3", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("environment", "gpus", "kind", "expected"),
    [
        ({}, 0, None, ["cpu:0"]),
        ({}, 0, "gpu", []),
        ({}, 2, None, ["gpu:0", "gpu:1"]),
        ({}, 2, "cuda", ["gpu:0", "gpu:1"]),
        ({}, 2, "CPU", ["cpu:0"]),
        ({"WORLD_SIZE": "4"}, 0, None, ["cpu:0"]),
        (LAUNCHED, 0, None, EIGHT[:4]),
        (LAUNCHED, 0, "gpu", []),
        (LAUNCHED, 1, None, ["gpu:0", "gpu:1", "gpu:2", "gpu:3"]),
        (LAUNCHED, 1, "cpu", EIGHT[:4]),
    ],
)
def test_devices(environment: Mapping[str, str], gpus: int, kind: str | None, expected: list[str]) -> None:
    """In a job that torchrun started each process has one device."""
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch("torch.cuda.is_available", return_value=gpus > 0),
        mock.patch("torch.cuda.device_count", return_value=gpus),
    ):
        assert keras.distribution.list_devices(kind) == expected
        assert keras.distribution.get_device_count(kind) == len(expected)
        launched = "RANK" in environment
        assert (backend.num_processes(), backend.process_id()) == ((4, 3) if launched else (1, 0))


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("cpu", 0, "cpu"),
        ("cpu:3", 0, "cpu"),
        (torch.device("meta"), 0, "meta"),
        ("gpu:1", 2, "cuda:1"),
        ("cuda", 2, "cuda:0"),
        ("gpu:2", 2, "Device not found: gpu:2; there are ['gpu:0', 'gpu:1']"),
        ("gpu:0", 0, "Device not found: gpu:0; there are []"),
        ("tpu:0", 0, "device type 'tpu' is unknown on the torch backend; it is 'cpu' or 'gpu'"),
    ],
)
def test_devices_of_torch(name: Any, gpus: int, expected: str) -> None:
    with (
        mock.patch("torch.cuda.is_available", return_value=gpus > 0),
        mock.patch("torch.cuda.device_count", return_value=gpus),
    ):
        assert message_or(lambda: str(backend._to_backend_device(name))) == expected


def message_or(call: Any) -> Any:
    """Return what the call returns, or the message of its ValueError."""
    try:
        return call()
    except ValueError as error:
        return str(error)


TWO = "10.0.0.1:1234,10.0.0.2:2345"
FIRST = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None, None, None), {}),
        ((TWO, 2, 1), {**FIRST, "LOCAL_RANK": "0"}),
        (
            ("a:1,a:2,b:1,b:2", 4, 3),
            {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_RANK": "1"},
        ),
        (("10.0.0.1:1234", 2, 1), FIRST),
        (("[::1]:9", None, None), {"MASTER_ADDR": "[::1]", "MASTER_PORT": "9"}),
        ((TWO, 3, 0), f"job_addresses {TWO!r} has 2 jobs, but num_processes is 3"),
        (("10.0.0.1", 2, 0), "job address '10.0.0.1' names no port; write host:port, e.g. 10.0.0.1:1234"),
        ((TWO, 2, 2), "process_id is 2; with num_processes=2 it is 0 to 1"),
        ((TWO, 2, None), "num_processes is 2 and process_id is None; give both, or neither under torchrun"),
    ],
)
def test_job_settings(arguments: tuple[Any, Any, Any], expected: Any) -> None:
    """What ``initialize`` hands to torch, or refuses."""
    assert message_or(lambda: backend._job_settings(*arguments)) == expected


ENVIRONMENT = {
    "KERAS_DISTRIBUTION_JOB_ADDRESSES": TWO,
    "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
    "KERAS_DISTRIBUTION_PROCESS_ID": "0",
}


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ((TWO, 2, 0), {}, (TWO, 2, 0)),
        ((), ENVIRONMENT, (TWO, 2, 0)),
        ((), {}, (None, None, None)),
    ],
    ids=["explicit parameters", "environment variables", "nones"],
)
def test_initialize_is_given(arguments: tuple[Any, ...], environment: Mapping[str, str], expected: Any) -> None:
    with mock.patch.dict(os.environ, environment), mock.patch.object(backend, "initialize") as initialize:
        keras.distribution.initialize(*arguments)
    initialize.assert_called_once_with(*expected)


# Meshes, layouts and distributions: Keras's classes on this library, as Keras's own tests of them


def test_meshes_and_layouts_of_keras() -> None:
    eight = mesh()
    assert (eight.shape, eight.axis_names, eight.devices.shape) == ((4, 2), ("data", "model"), (4, 2))
    layout = keras.distribution.TensorLayout(("data", None))
    assert layout.device_mesh is None
    layout.device_mesh = eight
    assert layout.device_mesh is eight
    for refused in (
        lambda: keras.distribution.TensorLayout(("rows",), eight),
        lambda: setattr(keras.distribution.TensorLayout(("rows",)), "device_mesh", eight),
    ):
        with pytest.raises(ValueError, match="Invalid axis names for Layout"):
            refused()


@pytest.mark.parametrize(
    ("shape", "names", "count", "message"),
    [
        ((4,), "", 4, "Shape and axis_names cannot be empty"),
        ((4, 2), ["batch"], 4, "Shape and axis_names should have same size"),
        ((4, 2), ["batch", "model"], 4, "Shape does not match the number of devices"),
    ],
)
def test_wrong_meshes(shape: Any, names: Any, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keras.distribution.DeviceMesh(shape, names, EIGHT[:count])


def test_layouts_without_a_mesh_and_with_an_axis_twice() -> None:
    layout = keras.distribution.TensorLayout(("model", None))
    twice = keras.distribution.TensorLayout(("model", "model"), mesh())
    assert message_or(lambda: layout.backend_layout) == (
        "Cannot create sharding when device mesh is not set for TensorLayout."
    )
    assert message_or(lambda: twice.backend_layout) == (
        "layout ('model', 'model') names mesh axis 'model' twice; an axis shards one dim of a tensor"
    )


@pytest.mark.parametrize(
    ("processes", "replicas", "shards"),
    [(4, 8, [0, 1, 2, 3]), (4, 2, [0, 0, 1, 1]), (4, 1, [0, 0, 0, 0]), (4, 4, [0, 1, 2, 3]), (1, 1, [0])],
)
def test_data_shards(processes: int, replicas: int, shards: list[int]) -> None:
    """Processes of one replica have the same data shard, as on JAX."""
    rest = max(1, processes // replicas)
    found = []
    for process in range(processes):
        with (
            mock.patch.object(backend, "num_processes", return_value=processes),
            mock.patch.object(backend, "process_id", return_value=process),
        ):
            layouts = keras.distribution.LayoutMap(mesh((replicas, rest if replicas * rest <= 8 else 1)))
            distribution = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="data")
        assert (distribution.num_processes, distribution.num_model_replicas) == (processes, replicas)
        found.append(distribution.data_shard_id)
    assert found == shards


def test_scopes() -> None:
    outer, inner = (distribution_lib.Distribution(mesh()) for _ in range(2))
    assert keras.distribution.distribution() is None
    with outer.scope():
        with inner.scope():
            assert keras.distribution.distribution() is inner
        assert keras.distribution.distribution() is outer
    assert keras.distribution.distribution() is None


def test_data_parallel_of_keras() -> None:
    for distribution, axis in (
        (keras.distribution.DataParallel(device_mesh=mesh((8,), ("data",))), "data"),
        (keras.distribution.DataParallel(devices=EIGHT), "batch"),
    ):
        assert (distribution.batch_dim_name, distribution.num_model_replicas) == (axis, 8)
        assert distribution.get_data_layout((4, 2, 2)).axes == (axis, None, None)
        assert distribution.get_variable_layout(keras.Variable([1, 2, 3])).axes == (None,)
        assert distribution.get_tensor_layout("path/to/tensor") is None
    assert keras.distribution.DataParallel().device_mesh.devices.tolist() == ["cpu:0"]


def test_model_parallel_of_keras() -> None:
    layouts = keras.distribution.LayoutMap(mesh())
    layouts[".*kernel"], layouts[".*bias"] = (None, "model"), ("model",)
    layouts["/model/layer/tensor"] = ("data", None)
    distribution = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="data")
    own = keras.Variable([1, 2, 3], name="kernel", layout=None)
    own._layout = keras.distribution.TensorLayout(("x",), mesh((8,), ("x",)))
    axes = [
        distribution.get_variable_layout(keras.Variable(np.zeros(shape), name=name)).axes
        for shape, name in (((8, 4), "kernel"), ((4,), "bias"), ((2,), "seed"))
    ]
    assert axes == [(None, "model"), ("model",), (None,)]
    assert distribution.get_variable_layout(own).axes == ("x",)
    assert distribution.get_tensor_layout("/model/layer/tensor").axes == ("data", None)
    assert distribution.get_tensor_layout("/model/layer/other") is None
    assert distribution.get_data_layout((4, 2)).axes == ("data", None)
    if hasattr(distribution, "distribute_dataset"):  # not from Keras 3.16 on
        dataset = object()
        assert distribution.distribute_dataset(dataset) is dataset


def test_processes_that_do_not_fit_the_replicas() -> None:
    layouts = keras.distribution.LayoutMap(mesh((3, 2)))
    with (
        mock.patch.object(backend, "num_processes", return_value=4),
        pytest.raises(ValueError, match="must be divisible"),
    ):
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="data")


# Shares


@pytest.mark.parametrize(
    ("rows", "shards", "expected"),
    [
        (8, 1, [(0, 8)]),
        (8, 2, [(0, 4), (4, 8)]),
        (7, 2, [(0, 4), (4, 7)]),
        (5, 4, [(0, 2), (2, 4), (4, 5), (5, 5)]),
        (1, 2, [(0, 1), (1, 1)]),
    ],
)
def test_shares_are_the_batch_in_order(rows: int, shards: int, expected: list[tuple[int, int]]) -> None:
    found = [share_of(rows, shard, shards) for shard in range(shards)]
    assert [(each.start, each.stop) for each in found] == expected


# On ranks


@contextlib.contextmanager
def on_a_rank() -> Iterator[keras.distribution.ModelParallel]:
    tp_planner.enable_keras_distribution()
    try:
        distribution = keras.distribution.ModelParallel(layout_map=layout_map({}), batch_dim_name="batch")
        with distribution.scope():
            yield distribution
    finally:
        tp_planner.disable_keras_distribution()


def tensors() -> dict[str, Any]:
    """Return what the library makes of meshes, layouts, tensors and variables."""
    whole = np.arange(32, dtype="float32").reshape(8, 4)
    with on_a_rank() as distribution:
        own = distribution.device_mesh
        line = keras.distribution.DeviceMesh((dist.get_world_size(),), ("model",), own.devices.flatten())
        square = keras.distribution.DeviceMesh((1, dist.get_world_size()), ("batch", "model"), own.devices.flatten())
        rows = keras.distribution.TensorLayout(("model", None), own)
        sharded = keras.distribution.distribute_tensor(whole, rows)
        columns = keras.distribution.distribute_tensor(sharded, keras.distribution.TensorLayout((None, "model"), own))
        floats = backend.distribute_variable(whole, rows)
        integers = backend.distribute_variable(whole.astype("int32"), rows)
        batch = backend.distribute_data_input(whole, distribution.get_data_layout((8, 4)), "batch")
        mine = torch.full((2, 1), float(dist.get_rank() + 1))
        again = keras.distribution.TensorLayout(("model", None), square).backend_layout
        return {
            "placements": rows.backend_layout.placements,
            "meshes": (
                own.backend_mesh is square.backend_mesh,
                own.backend_mesh is line.backend_mesh,
                line.backend_mesh.ndim,
            ),
            "equal": again == rows.backend_layout,
            "rows": sharded.to_local().numpy(),
            "columns": columns.to_local().numpy(),
            "whole": sharded.full_tensor().numpy(),
            "floats": (
                type(floats.data) is DTensor,
                floats.requires_grad,
                floats.to_local().untyped_storage().nbytes(),
            ),
            "integers": integers.requires_grad,
            "batch": type(batch) is torch.Tensor and batch.shape == (8, 4),
            "sum": backend.all_reduce(mine).tolist(),
            "mean": backend.all_reduce(mine, "mean", "model").tolist(),
            "max": backend.all_reduce(mine, "max", "batch").tolist(),
            "gathered": backend.all_gather(mine, 1, "model").tolist(),
            "variable": backend.all_gather_variable(floats).numpy(),
            "op": message_or(lambda: backend.all_reduce(mine, "product")),
            "axis": message_or(lambda: backend.all_reduce(mine, axis_name="rows")),
            "gradient": message_or(lambda: backend.all_gather(mine.requires_grad_())),
            "dims": message_or(
                lambda: keras.distribution.distribute_tensor(
                    np.ones(4), keras.distribution.TensorLayout((None, "model"), own)
                )
            ),
            "size": message_or(lambda: backend.initialize(num_processes=16, process_id=0)),
        }


def test_tensors_and_collectives(pools: Pools) -> None:
    whole = np.arange(32, dtype="float32").reshape(8, 4)
    for rank, seen in enumerate(pools(2).run(tensors)):
        assert seen["placements"] == (Replicate(), Shard(0))
        assert seen["meshes"] == (True, False, 1)
        assert seen["equal"]
        np.testing.assert_array_equal(seen["rows"], whole[4 * rank : 4 * rank + 4])
        np.testing.assert_array_equal(seen["columns"], whole[:, 2 * rank : 2 * rank + 2])
        np.testing.assert_array_equal(seen["whole"], whole)
        np.testing.assert_array_equal(seen["variable"], whole)
        assert seen["floats"] == (True, True, 64)
        assert not seen["integers"]
        assert seen["batch"]
        assert (seen["sum"], seen["mean"], seen["max"]) == ([[3.0]] * 2, [[1.5]] * 2, [[rank + 1.0]] * 2)
        assert seen["gathered"] == [[1.0, 2.0]] * 2
        assert seen["op"] == "op is 'product'; it is one of 'sum', 'mean', 'max', 'min'"
        assert seen["axis"] == "mesh axis 'rows' is unknown; the current distribution's axes are ('batch', 'model')"
        assert re.match("all_gather passes no gradient on", seen["gradient"])
        assert seen["dims"] == "the layout shards dim 1, the tensor of shape (4,) has no such dim"
        assert re.match("the mesh has 16 devices, the job has 2 processes", seen["size"])
