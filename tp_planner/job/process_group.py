"""Process groups and device meshes: torchrun's for running, torch's fake one for planning."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous

from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import DeviceType
from tp_planner.ir.mesh import Mesh
from tp_planner.job.axes import Axes, Axis
from tp_planner.job.pulse import let_pulse_beat
from tp_planner.job.rendezvous import meet, meet_before_start, saying_that_it_waits


def require_process_group(size: int, devices: DeviceType | None = None) -> None:
    """Make sure that a process group of ``size`` ranks runs, starting it from torchrun's environment.

    NCCL on CUDA, gloo on CPU; on CUDA the process takes the device of LOCAL_RANK.

    Args:
        size: number of ranks.
        devices: what the mesh's devices are. By default those of the group that runs, and if there is none CUDA
            devices where there are any.

    Raises:
        PlanError: if the world has another size, there is no group and no environment to start one from, or the
            machine or the group that runs has no such devices.
    """
    if not dist.is_initialized():
        on = devices or ("cuda" if torch.cuda.is_available() else "cpu")
        if on == "cuda" and not torch.cuda.is_available():
            raise PlanError("the mesh has CUDA devices and this machine has none; make a mesh of cpu:0, cpu:1, ...")
        world = os.environ.get("WORLD_SIZE")
        if world is None and size == 1:
            _start_alone(on)
        elif world is None or "RANK" not in os.environ:
            raise PlanError(
                f"the mesh has {size} devices but this is one process without a process group; "
                f"start it with torchrun --nproc-per-node={size} your_script.py"
            )
        else:
            if int(world) != size:
                raise PlanError(_wrong_world(size, int(world)))
            _start_from_environment(on)
    if dist.get_world_size() != size:
        raise PlanError(_wrong_world(size, dist.get_world_size()))
    if devices is not None:
        _use(devices)


def number_of_processes() -> int:
    """Return the size of the process group, or of the one that torchrun's environment is for."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def _wrong_world(size: int, world: int) -> str:
    return (
        f"the mesh has {size} devices, the job has {world} processes; "
        f"start torchrun with --nproc-per-node={size} or make a mesh of {world} devices"
    )


def _start_from_environment(devices: DeviceType) -> None:
    if devices == "cpu":
        _start("gloo")
    else:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise PlanError(
                f"LOCAL_RANK is {local_rank} but this machine has {torch.cuda.device_count()} CUDA devices; "
                f"start one process for each device"
            )
        torch.cuda.set_device(local_rank)
        # Told its device, NCCL makes the group's communicator at once, and not another one for each pair of ranks.
        _start("nccl", device_id=torch.device("cuda", local_rank))


def _start(backend: str, **options: Any) -> None:
    """Start the process group as torch does by itself, once all ranks have come to its store."""
    with saying_that_it_waits("starting the process group", os.environ["RANK"]):
        store, rank, size = next(rendezvous("env://"))
    store = meet_before_start(store, rank, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, **options)
    let_pulse_beat(_get_default_store(), rank)  # so that one that dies before it meets others has had one


def _start_alone(devices: DeviceType) -> None:
    from torch._C._distributed_c10d import HashStore

    backend = "nccl" if devices == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


_used: list[tuple[object, DeviceType]] = []  # the process group, and which of its devices the mesh has


def _use(devices: DeviceType) -> None:
    """Let the job compute on these devices of the process group, which may have both."""
    if devices not in _served():
        raise PlanError(
            f"the mesh has {_named(devices)}, the process group that runs ({dist.get_backend_config()}) is for "
            f"{_named(_served()[0])}; make a mesh of these, or start the group with {_BACKENDS[devices]!r}"
        )
    _used[:] = [(dist.group.WORLD, devices)]


_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def _named(devices: DeviceType) -> str:
    return "CUDA devices" if devices == "cuda" else "CPUs"


def _served() -> tuple[DeviceType, ...]:
    """Return the devices that the process group is for; gloo could serve CUDA devices, and would be slow."""
    backends = dict(each.split(":") for each in str(dist.get_backend_config()).split(","))
    on_cuda: tuple[DeviceType, ...] = ("cuda",) if backends.get("cuda") == "nccl" else ()
    return (*on_cuda, "cpu") if "cpu" in backends else on_cuda


def device_type() -> DeviceType:
    """Return the devices that this job computes on: those that its mesh names, else CUDA where NCCL runs."""
    if _used and _used[0][0] is dist.group.WORLD:
        return _used[0][1]
    return _served()[0]


_of_hosts: list[Any] = []  # the process group, and one of the same ranks for what is on the host


def host_group() -> Any:
    """Return a group of all ranks for tensors on the host; the first time all ranks have to ask for it together."""
    if "cpu:gloo" in str(dist.get_backend_config()):
        return dist.group.WORLD
    if _of_hosts[:1] != [dist.group.WORLD]:
        _of_hosts[:] = [dist.group.WORLD, dist.new_group(backend="gloo")]
    return _of_hosts[1]


def this_device() -> torch.device:
    """Return the device of this process."""
    if device_type() == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def job_axes(mesh: Mesh) -> Axes:
    """Return the axes of this job, which has as many ranks as the mesh.

    Where there are several replicas, process groups are made for each axis the first time: all ranks have to ask for
    the same mesh together.
    """
    device_mesh = _device_mesh(mesh)
    if mesh.batch_axis is None or mesh.replicas == 1:
        return Axes(device_mesh, Axis.of(device_mesh))
    return Axes(device_mesh, Axis.of(device_mesh[mesh.model_axis]), Axis.of(device_mesh[mesh.batch_axis]))


_made: dict[Mesh, DeviceMesh] = {}
_made_for: list[object] = []  # the process group that they belong to


def _device_mesh(mesh: Mesh) -> DeviceMesh:
    if mesh.batch_axis is None or mesh.replicas == 1:
        return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=(mesh.model_axis,))
    if _made_for != [dist.group.WORLD]:
        _made.clear()
        _made_for[:] = [dist.group.WORLD]
    if mesh not in _made:
        _made[mesh] = DeviceMesh(device_type(), _ranks(mesh), mesh_dim_names=(mesh.model_axis, mesh.batch_axis))
    return _made[mesh]


def _ranks(mesh: Mesh) -> torch.Tensor:
    """Return the rank at each place: (model axis, batch axis)."""
    assert mesh.batch_axis is not None
    ranks = torch.empty(mesh.axis_size(mesh.model_axis), mesh.replicas, dtype=torch.int)
    for rank in range(mesh.size):
        ranks[mesh.coordinate(rank, mesh.model_axis), mesh.coordinate(rank, mesh.batch_axis)] = rank
    return ranks


@contextlib.contextmanager
def planning_axes(mesh: Mesh) -> Iterator[Axes]:
    """Yield the axes of a job on ``mesh`` as rank 0 sees them, for fake tensors, without any device.

    Outside a job torch's fake process group stands in and is gone afterwards; inside one the job's own groups
    are used, on which collectives of fake tensors return at once. Device meshes are of CPUs, as fake tensors are
    whatever the job runs on, and have axis names of their own, because DTensor remembers results, rank 0's coordinates
    among them, for all meshes that compare equal.

    Raises:
        PlanError: inside a job of another size.
    """
    if dist.is_initialized():
        if dist.get_world_size() != mesh.size:
            raise PlanError(
                f"this process belongs to a job of {dist.get_world_size()} ranks and cannot plan for {mesh.size}; "
                f"plan in a process without a process group"
            )
        if mesh.replicas > 1 and (mesh not in _made or _made_for != [dist.group.WORLD]):
            meet(f"tp_planner.plan on mesh ({mesh})")
        yield _as_rank_zero(mesh, _renamed(_device_mesh(mesh)))
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    prints_errors = sys.excepthook  # torch puts a rank before each line, and leaves that behind
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=mesh.size)
    try:
        yield _as_rank_zero(mesh, _renamed(_device_mesh(mesh)))
    finally:
        _made.clear()
        dist.destroy_process_group()
        sys.excepthook = prints_errors


def _renamed(device_mesh: DeviceMesh) -> DeviceMesh:
    """Return a mesh of CPUs over the same process groups with axis names of its own."""
    assert device_mesh.mesh_dim_names is not None
    names = tuple(f"planned {name}" for name in device_mesh.mesh_dim_names)
    if device_mesh.ndim == 1:
        return DeviceMesh.from_group(device_mesh.get_group(), "cpu", mesh_dim_names=names)
    return DeviceMesh.from_group(device_mesh.get_all_groups(), "cpu", device_mesh.mesh, mesh_dim_names=names)


def _as_rank_zero(mesh: Mesh, device_mesh: DeviceMesh) -> Axes:
    """Return the axes of a mesh of planning's own, of which DTensor is to see rank 0's shards on every rank."""
    assert device_mesh.mesh_dim_names is not None
    device_mesh._rank, device_mesh._coordinate_on_dim = 0, (0,) * device_mesh.ndim
    if device_mesh.ndim == 1:
        return Axes(device_mesh, Axis(device_mesh, mesh.model_axis, device_mesh.size(), 0))
    model, batch = (device_mesh[name] for name in device_mesh.mesh_dim_names)
    assert mesh.batch_axis is not None
    return Axes(
        device_mesh, Axis(model, mesh.model_axis, model.size(), 0), Axis(batch, mesh.batch_axis, batch.size(), 0)
    )
