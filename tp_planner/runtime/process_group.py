"""Process groups and device meshes: torchrun's for running, torch's fake one for planning."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tp_planner.ir.errors import PlanError


def require_process_group(size: int) -> None:
    """Make sure that a process group of ``size`` ranks runs, starting it from torchrun's environment.

    NCCL on CUDA, gloo on CPU; on CUDA the process takes the device of LOCAL_RANK.

    Raises:
        PlanError: if the world has another size, or there is no group and no environment to start one from.
    """
    if not dist.is_initialized():
        world = os.environ.get("WORLD_SIZE")
        if world is None and size == 1:
            _start_alone()
        elif world is None or "RANK" not in os.environ:
            raise PlanError(
                f"the mesh has {size} devices but this is one process without a process group; "
                f"start it with torchrun --nproc-per-node={size} your_script.py"
            )
        else:
            if int(world) != size:
                raise PlanError(_wrong_world(size, int(world)))
            _start_from_environment()
    if dist.get_world_size() != size:
        raise PlanError(_wrong_world(size, dist.get_world_size()))


def _wrong_world(size: int, world: int) -> str:
    return (
        f"the mesh has {size} devices, the job has {world} processes; "
        f"start torchrun with --nproc-per-node={size} or make a mesh of {world} devices"
    )


def _start_from_environment() -> None:
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise PlanError(
                f"LOCAL_RANK is {local_rank} but this machine has {torch.cuda.device_count()} CUDA devices; "
                f"start one process for each device"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def _start_alone() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    from torch._C._distributed_c10d import HashStore

    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def device_type() -> str:
    """Return "cuda" where the process group runs on CUDA devices, else "cpu"."""
    return "cuda" if "nccl" in dist.get_backend() else "cpu"


def this_device() -> torch.device:
    """Return the device of this process."""
    if device_type() == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def model_mesh(axis: str) -> DeviceMesh:
    """Return the 1-D mesh of all ranks, its one axis named ``axis``."""
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=(axis,))


@contextlib.contextmanager
def planning_mesh(parts: int, axis: str) -> Iterator[DeviceMesh]:
    """Yield a mesh of ``parts`` ranks for fake tensors, without any device.

    Outside a job torch's fake process group stands in and is gone afterwards; inside one the job's own group
    is used, on which collectives of fake tensors return at once. The axis has a name of its own, because DTensor
    remembers results, rank 0's coordinates among them, for all meshes that compare equal.

    Raises:
        PlanError: inside a job of another size.
    """
    if dist.is_initialized():
        if dist.get_world_size() != parts:
            raise PlanError(
                f"this process belongs to a job of {dist.get_world_size()} ranks and cannot plan for {parts}; "
                f"plan in a process without a process group"
            )
        yield init_device_mesh(device_type(), (parts,), mesh_dim_names=(f"planned {axis}",))
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=parts)
    try:
        yield init_device_mesh("cpu", (parts,), mesh_dim_names=(f"planned {axis}",))
    finally:
        dist.destroy_process_group()
