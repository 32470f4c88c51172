"""The backend library that ``keras.distribution`` asks for: devices, processes, meshes, layouts, collectives.

Keras brings one for JAX, by the same names; ``install`` puts this module in its place on torch. Of the devices of a
mesh, in order, each process of the job is one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import keras
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from tp_planner.frontend.calling import in_layer_call
from tp_planner.frontend.keras_internals import convert_to_tensor
from tp_planner.frontend.layout_map import device_type_of
from tp_planner.ir.errors import PlanError
from tp_planner.ir.placement import chunk_sizes
from tp_planner.job.process_group import device_type as group_device_type
from tp_planner.job.process_group import require_process_group, this_device
from tp_planner.job.random_state import share_random_state
from tp_planner.job.rendezvous import meet
from tp_planner.job.scattering import scatter_parts
from tp_planner.storage.variables import BackendVariable

DEVICE_TYPES = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu"}


@dataclass(frozen=True, slots=True)
class BackendLayout:
    """A ``TensorLayout`` in torch's words: a device mesh, and one placement for each of its axes."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]


# Devices and processes


def list_devices(device_type: str | None = None) -> list[str]:
    """Return the devices of a type, such as ``["gpu:0", "gpu:1"]``; in a job those of all processes.

    Args:
        device_type: "cpu" or "gpu"; by default "gpu" where there are any.
    """
    kind = _device_type(device_type)
    return [f"{kind}:{number}" for number in range(get_device_count(kind))]


def get_device_count(device_type: str | None = None) -> int:
    """Return the number of devices of a type; in a job each process has one."""
    kind = _device_type(device_type)
    if num_processes() > 1:
        return num_processes() if kind in ("cpu", _own_device_type()) else 0
    return torch.cuda.device_count() if kind == "gpu" else 1


def _device_type(name: str | None) -> str:
    if name is None:
        return _own_device_type()
    if name.lower() not in DEVICE_TYPES:
        raise ValueError(f"device type {name!r} is unknown on the torch backend; it is 'cpu' or 'gpu'")
    return DEVICE_TYPES[name.lower()]


def _own_device_type() -> str:
    if dist.is_initialized():
        return DEVICE_TYPES[group_device_type()]
    return "gpu" if torch.cuda.is_available() else "cpu"


def num_processes() -> int:
    """Return the number of processes of the job, 1 outside of one."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if _is_launched() else 1


def process_id() -> int:
    """Return the number of this process in the job, 0 outside of one."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if _is_launched() else 0


def _is_launched() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def initialize(
    job_addresses: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Start the process group; all processes continue from process 0's random state.

    What is not given is read from torchrun's environment. Without either this is a job of one process.

    Args:
        job_addresses: "host:port" of every process, separated by commas, or of process 0 alone.
        num_processes: the size of the job.
        process_id: which of them this is.

    Raises:
        ValueError: if the three do not fit together, or a group of another size runs already.
    """
    settings = _job_settings(job_addresses, num_processes, process_id)
    wanted = int(settings.get("WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    if not dist.is_initialized():
        os.environ.update(settings)
    require_process_group(wanted)
    share_random_state()


def _job_settings(job_addresses: str | None, size: int | None, rank: int | None) -> dict[str, str]:
    """Return the environment variables that torch starts a process group from, as far as they are given."""
    if (size is None) != (rank is None):
        raise ValueError(f"num_processes is {size} and process_id is {rank}; give both, or neither under torchrun")
    if size is not None and rank is not None and not 0 <= rank < size:
        raise ValueError(f"process_id is {rank}; with num_processes={size} it is 0 to {size - 1}")
    settings = {} if size is None else {"WORLD_SIZE": str(size), "RANK": str(rank)}
    if job_addresses is None:
        return settings
    addresses = [address.strip() for address in job_addresses.split(",")]
    if len(addresses) > 1 and size is not None and len(addresses) != size:
        raise ValueError(f"job_addresses {job_addresses!r} has {len(addresses)} jobs, but num_processes is {size}")
    host, colon, port = addresses[0].rpartition(":")
    if not (colon and port.isdecimal()):
        raise ValueError(f"job address {addresses[0]!r} names no port; write host:port, e.g. 10.0.0.1:1234")
    if len(addresses) > 1 and rank is not None:
        hosts = [address.rpartition(":")[0] for address in addresses]
        settings["LOCAL_RANK"] = str(hosts[:rank].count(hosts[rank]))
    return {**settings, "MASTER_ADDR": host, "MASTER_PORT": port}


def _to_backend_device(device_name: str | torch.device) -> torch.device:
    """Return the torch device of a name such as "gpu:1"; in a job, the device of this machine that it stands for."""
    if isinstance(device_name, torch.device):
        return device_name
    name, _, number = str(device_name).partition(":")
    if _device_type(name) == "cpu":
        return torch.device("cpu")
    index, here = int(number or 0), torch.cuda.device_count()
    if index >= get_device_count("gpu") or not here:
        raise ValueError(f"Device not found: {device_name}; there are {list_devices('gpu')}")
    return torch.device("cuda", index % here)


# Meshes and layouts

_meshes: dict[Any, tuple[Any, DeviceMesh]] = {}


def _to_backend_mesh(device_mesh: keras.distribution.DeviceMesh) -> DeviceMesh:
    """Return the torch mesh, the same one for equal shapes, axis names and devices; every process has to call it.

    Starts the process group from torchrun's environment where there is none.

    Raises PlanError if the job has another number of processes, or other devices.
    """
    devices = tuple(str(device) for device in device_mesh.devices.flatten())
    shape, names = tuple(int(size) for size in device_mesh.shape), tuple(device_mesh.axis_names)
    require_process_group(len(devices), device_type_of(device_mesh))
    group, mesh = _meshes.get((shape, names, devices), (None, None))
    if mesh is None or group is not dist.group.WORLD:
        mesh = DeviceMesh(group_device_type(), torch.arange(len(devices)).reshape(shape), mesh_dim_names=names)
        _meshes[shape, names, devices] = (dist.group.WORLD, mesh)
    return mesh


def _to_backend_layout(tensor_layout: keras.distribution.TensorLayout) -> BackendLayout:
    """Return the layout in torch's words. Raises ValueError without a mesh, or for an axis that is named twice."""
    device_mesh, axes = tensor_layout.device_mesh, tuple(tensor_layout.axes)
    if device_mesh is None:
        raise ValueError("Cannot create sharding when device mesh is not set for TensorLayout.")
    named = [axis for axis in axes if axis is not None]
    for axis in named:
        if named.count(axis) > 1:
            raise ValueError(f"layout {axes} names mesh axis {axis!r} twice; an axis shards one dim of a tensor")
    placements = tuple(Shard(axes.index(name)) if name in axes else Replicate() for name in device_mesh.axis_names)
    return BackendLayout(device_mesh.backend_mesh, placements)


def _in_torch(layout: keras.distribution.TensorLayout | BackendLayout) -> BackendLayout:
    if isinstance(layout, keras.distribution.TensorLayout):
        own: BackendLayout = layout.backend_layout
        return own
    return layout


# Tensors


def distribute_tensor(tensor: Any, layout: keras.distribution.TensorLayout | BackendLayout) -> Any:
    """Return the tensor as a DTensor of that layout; inside a layer call, the tensor as it is.

    Every process gives the whole tensor and keeps its part. In layer calls the plan decides about activations: it
    follows the layout map's rules for them.
    """
    if in_layer_call():
        return tensor
    wanted = _in_torch(layout)
    if isinstance(tensor, DTensor):
        return tensor.redistribute(wanted.mesh, wanted.placements)
    whole = tensor if isinstance(tensor, torch.Tensor) else convert_to_tensor(tensor)
    return as_shards(whole, wanted)


def distribute_variable(
    value: Any, layout: keras.distribution.TensorLayout | BackendLayout, trainable: bool = True
) -> torch.nn.Parameter:
    """Return a parameter of that layout. The value is cut where it is: only this process's part moves to its device.

    Values that are no floating point numbers take no gradient.
    """
    with keras.device("cpu"):
        whole = value.detach() if isinstance(value, torch.Tensor) else convert_to_tensor(value)
    return torch.nn.Parameter(as_shards(whole, _in_torch(layout)), trainable and whole.is_floating_point())


def distribute_data_input(per_process_batch: Any, layout: Any, batch_dim_name: str | None = None) -> torch.Tensor:
    """Return this process's batch as a tensor on its device: it is what a planned model takes."""
    batch: torch.Tensor = convert_to_tensor(per_process_batch)
    return batch.to(this_device()) if dist.is_initialized() else batch


def as_shards(whole: torch.Tensor, layout: BackendLayout) -> DTensor:
    """Return the DTensor of which this process keeps its part of ``whole``; nothing is communicated."""
    local = own_part(whole, layout).to(this_device(), copy=True, memory_format=torch.contiguous_format)
    return _dtensor(local, whole, layout)


def scatter_from_rank_zero(whole: torch.Tensor, layout: BackendLayout) -> DTensor:
    """Return the DTensor of rank 0's ``whole``, of which each process is sent its part; all have to call it."""
    own = own_part(whole, layout)
    local = torch.empty(own.shape, dtype=whole.dtype, device=this_device())
    scatter_parts(local, lambda rank: part_of(rank, whole, layout))
    return _dtensor(local, whole, layout)


def _dtensor(local: torch.Tensor, whole: torch.Tensor, layout: BackendLayout) -> DTensor:
    stride = torch.empty(whole.shape, device="meta").stride()
    return DTensor.from_local(local, layout.mesh, layout.placements, run_check=False, shape=whole.shape, stride=stride)


def own_part(whole: Any, layout: BackendLayout) -> Any:
    """Return the part of a whole tensor or array that this process keeps under the layout.

    Raises ValueError if a placement names a dim that it does not have.
    """
    return part_of(dist.get_rank(), whole, layout)


def part_of(rank: int, whole: Any, layout: BackendLayout) -> Any:
    """Return the part that process ``rank`` keeps, as ``own_part`` does: chunks as ``torch.chunk`` cuts them."""
    place = (layout.mesh.mesh == rank).nonzero()[0].tolist()
    part = whole
    for size, number, placement in zip(layout.mesh.shape, place, layout.placements, strict=True):
        if isinstance(placement, Shard):
            if placement.dim >= whole.ndim:
                shape = tuple(whole.shape)
                raise ValueError(f"the layout shards dim {placement.dim}, the tensor of shape {shape} has no such dim")
            sizes = chunk_sizes(part.shape[placement.dim], size)
            start = sum(sizes[:number])
            part = part[(slice(None),) * placement.dim + (slice(start, start + sizes[number]),)]
    return part


# Collectives


def all_reduce(x: Any, op: Literal["sum", "mean", "max", "min"] = "sum", axis_name: str | None = None) -> torch.Tensor:
    """Return ``x`` of all processes, or of those along a mesh axis, combined. No gradient flows through it."""
    kinds = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
    if op not in kinds:
        raise ValueError(f"op is {op!r}; it is one of {', '.join(map(repr, kinds))}")
    group = _group(axis_name)
    result = _without_gradient(x, "all_reduce").clone(memory_format=torch.contiguous_format)
    if group is None:
        return result
    dist.all_reduce(result, kinds[op], group)
    return result / dist.get_world_size(group) if op == "mean" else result


def all_gather(x: Any, axis: int = 0, axis_name: str | None = None) -> torch.Tensor:
    """Return equally shaped ``x`` of all processes, or of those along a mesh axis, concatenated along dim ``axis``.

    No gradient flows through it.
    """
    group = _group(axis_name)
    tensor = _without_gradient(x, "all_gather").contiguous()
    if group is None:
        return tensor.clone()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group)
    return torch.cat(parts, dim=axis)


def all_gather_variable(variable: Any) -> torch.Tensor:
    """Return the whole value of a variable, without gradient; every process has to call it."""
    value: torch.Tensor = variable._value if isinstance(variable, BackendVariable) else variable
    if not isinstance(value, DTensor):
        return value.detach().clone()
    meet("keras.distribution all_gather_variable")
    return whole_of(value)


def whole_of(value: DTensor) -> torch.Tensor:
    """Return the whole tensor, without gradient, on every process, which all have to call it."""
    with torch.no_grad():
        whole: torch.Tensor = value.full_tensor()
        return whole


def _group(axis_name: str | None) -> dist.ProcessGroup | None:
    """Return the group of a mesh axis of the current distribution, or of all processes; None for one process."""
    if axis_name is None:
        return dist.group.WORLD if dist.is_initialized() else None
    distribution = keras.distribution.distribution()
    names = () if distribution is None else tuple(distribution.device_mesh.axis_names)
    if axis_name not in names:
        raise ValueError(f"mesh axis {axis_name!r} is unknown; the current distribution's axes are {names}")
    group: dist.ProcessGroup = distribution.device_mesh.backend_mesh.get_group(axis_name)
    return group


def _without_gradient(x: Any, what: str) -> torch.Tensor:
    tensor: torch.Tensor = convert_to_tensor(x)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise PlanError(f"{what} passes no gradient on; give it x.detach(), or call it under torch.no_grad()")
    return tensor.detach()
