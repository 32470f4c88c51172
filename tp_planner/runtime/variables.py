"""Keras variables whose value is sharded.

A parallel variable is the user's own Variable object with another class and a DTensor inside. Its shape is the
whole shape everywhere. Its ``value`` is

- during a planned layer call, what the plan says the layer reads: a plain local tensor, gradients flowing back;
- during an optimizer update, this rank's plain shard;
- anywhere else the DTensor parameter itself, the leaf that holds ``.grad``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import torch
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope
from keras.src.backend.torch.core import get_device, to_torch_dtype
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as TorchShard

from tp_planner.ir.placement import Partial, Placement, Replicate, Shard, chunk_sizes
from tp_planner.ir.plan import Boundary, Transition
from tp_planner.runtime.boundaries import Axis, cross, gather, reduce_to_shard
from tp_planner.runtime.calls import Reader, Site, running, standing_at
from tp_planner.runtime.rendezvous import meet

BackendVariable = type(keras.Variable(0.0, name="probe"))


@dataclass
class Stored:
    """How a parallel variable is stored, and what restoring it needs."""

    axis: Axis
    placement: Placement
    plain_class: type
    gathering: Callable[[Any], np.ndarray] | None = None  # set while ranks save together
    whole: torch.Tensor | None = None  # set while a non-elementwise update works on the whole value


class ParallelVariable(BackendVariable):  # type: ignore[misc,valid-type]
    """A Keras variable stored as the plan says; see the module's text. Made by ``make_parallel`` only."""

    _stored: Stored

    @property
    def value(self) -> Any:
        """The tensor that a variable of this kind stands for at this moment; see the module's text."""
        if in_stateless_scope():
            scoped = get_stateless_scope().get_current_value(self)
            if scoped is not None:
                return self._maybe_autocast(scoped)
        if str(get_device()) == "meta":
            return self._maybe_autocast(torch.empty(self._shape, dtype=to_torch_dtype(self._dtype), device="meta"))
        if self._stored.whole is not None:
            return self._stored.whole
        if running.values == "local":
            return local_tensor(self)
        for frame in reversed(running.frames):
            reader = frame.readers.get(id(self))
            if reader is not None:
                return self._read_once(frame.cache, reader)
        if running.frames:
            return read_whole(self, None)
        return self._value

    def _read_once(self, cache: dict[tuple[int, Any], torch.Tensor], reader: Reader) -> torch.Tensor:
        scope = keras.src.backend.get_autocast_scope()
        key = (id(self), None if scope is None else scope.dtype)
        if key not in cache:
            cache[key] = reader(self)
        return cache[key]

    def assign(self, value: Any) -> Any:
        """Set the value: from a whole array or tensor, a shard in an update, or an equally placed DTensor."""
        if in_stateless_scope():
            return super().assign(value)
        if isinstance(value, BackendVariable):
            value = value.value
        if not isinstance(value, DTensor):
            value = value if isinstance(value, torch.Tensor) else np.asarray(value)
        self._assign_checked(value)
        return value

    def _direct_assign(self, value: Any) -> None:
        self._assign_checked(value)

    def _assign_checked(self, value: Any) -> None:
        with running.converting():
            self._assign_part(value)

    def _assign_part(self, value: Any) -> None:
        target = local_tensor(self)
        if self._stored.whole is not None and tuple(value.shape) == tuple(self.shape):
            target = self._stored.whole
        elif isinstance(value, DTensor):
            value = value.redistribute(placements=self._value.placements).to_local()
        elif tuple(value.shape) == tuple(self.shape):
            value = own_shard(value, self._stored.placement, self._stored.axis)
        elif tuple(value.shape) != tuple(target.shape) or not (running.values == "local" or running.frames):
            raise ValueError(
                f"the value assigned to {self.path!r} has shape {tuple(value.shape)}, "
                f"the variable has shape {tuple(self.shape)}; assign the whole value"
            )
        if not isinstance(value, torch.Tensor):
            value = torch.as_tensor(np.ascontiguousarray(_numpy_for_torch(value)))
        with torch.no_grad():
            target.copy_(value)
        for frame in running.frames:  # what was read before is no longer the value
            frame.forget(id(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        gathering = self._stored.gathering
        array = gathering(self) if gathering is not None else whole_array(self)
        return array.astype(dtype) if dtype else array

    def __repr__(self) -> str:
        return f"<Variable path={self.path}, shape={self.shape}, dtype={self._dtype}, stored={self._stored.placement}>"


def make_parallel(variable: Any, value: torch.nn.Parameter, placement: Placement, axis: Axis) -> None:
    """Turn a Keras variable into a parallel one with ``value`` as its parameter."""
    variable._stored = Stored(axis, placement, type(variable))
    variable._value = value
    variable.__class__ = ParallelVariable


def make_plain(variable: Any, value: torch.nn.Parameter) -> None:
    """Undo ``make_parallel``."""
    variable.__class__ = variable._stored.plain_class
    del variable._stored
    variable._value = value


def is_sharded(variable: Any) -> bool:
    """Whether a Keras variable is stored in shards."""
    return isinstance(variable, ParallelVariable) and isinstance(variable._stored.placement, Shard)


def local_tensor(variable: Any) -> torch.Tensor:
    """Return the plain tensor that this rank stores of a variable, without gradient history."""
    value = variable._value
    tensor: torch.Tensor = value._local_tensor if isinstance(value, DTensor) else value.detach()
    return tensor


def sharded_parameter(
    local: torch.Tensor, shape: tuple[int, ...], placement: Shard, axis: Axis, requires_grad: bool
) -> torch.nn.Parameter:
    """Return a parameter of the whole ``shape`` of which this rank stores ``local``."""
    stride = tuple(math.prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape)))
    whole = DTensor.from_local(
        local, axis.mesh, [TorchShard(placement.dim)], run_check=False, shape=torch.Size(shape), stride=stride
    )
    return torch.nn.Parameter(whole, requires_grad=requires_grad)


def own_shard(value: Any, placement: Placement, axis: Axis) -> Any:
    """Return this rank's part of a whole tensor or array."""
    if not isinstance(placement, Shard):
        return value
    sizes = chunk_sizes(value.shape[placement.dim], axis.size)
    start = sum(sizes[: axis.rank])
    index = (slice(None),) * placement.dim + (slice(start, start + sizes[axis.rank]),)
    return value[index]


def read_as(boundary: Boundary, axis: Axis, site: Site) -> Reader:
    """Return the reader of a variable that a layer uses through ``boundary``, which stands at ``site``."""
    stored, used = boundary.forward.source, boundary.forward.target
    partial = isinstance(boundary.backward.source, Partial)
    if isinstance(stored, Shard) and used == stored:
        return read_shard
    if isinstance(stored, Shard) and used == Replicate():
        return lambda variable: read_whole(variable, site, gradient_is_partial=partial)
    if isinstance(stored, Shard):
        assert isinstance(used, Shard)
        cut = replace(
            boundary,
            forward=Transition(Replicate(), used),
            backward=Transition(used, Replicate()),
        )
        return lambda variable: cross(read_whole(variable, site), cut, axis, site)
    return lambda variable: cross(variable._maybe_autocast(variable._value), boundary, axis, site)


class _LocalShard(torch.autograd.Function):
    """The shard of a DTensor parameter; its gradient is a DTensor again."""

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> torch.Tensor:
        ctx.spec = parameter._spec
        return parameter._local_tensor.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> DTensor:
        # What DTensor.from_local does without its checks, which cost more than a small layer's matmul.
        return DTensor(gradient, ctx.spec, requires_grad=False)


def read_shard(variable: Any) -> torch.Tensor:
    """Return this rank's shard, gradients flowing back to the parameter."""
    with running.converting():
        local: torch.Tensor = _LocalShard.apply(variable._value)
    cast: torch.Tensor = variable._maybe_autocast(local)
    return cast


class _Gathered(torch.autograd.Function):
    """The whole value of a sharded parameter; each rank's gradient of it is whole, or a summand."""

    @staticmethod
    def forward(
        ctx: Any, parameter: DTensor, stored: Stored, gradient_is_partial: bool, site: Site | None
    ) -> torch.Tensor:
        ctx.spec, ctx.placement, ctx.axis = parameter._spec, stored.placement, stored.axis
        ctx.partial, ctx.site = gradient_is_partial, site
        return _gathered(parameter, stored, site)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[DTensor, None, None, None]:
        if ctx.partial:
            with standing_at(ctx.site):
                shard = reduce_to_shard(gradient, ctx.placement.dim, ctx.axis)
        else:
            # A copy: a slice would keep the whole gradient's storage.
            shard = own_shard(gradient, ctx.placement, ctx.axis).clone(memory_format=torch.contiguous_format)
        return DTensor(shard, ctx.spec, requires_grad=False), None, None, None


def _gathered(parameter: DTensor, stored: Stored, site: Site | None) -> torch.Tensor:
    placement = stored.placement
    assert isinstance(placement, Shard)
    with standing_at(site):
        return gather(parameter._local_tensor.detach(), placement.dim, parameter.shape[placement.dim], stored.axis)


def read_whole(variable: Any, site: Site | None, gradient_is_partial: bool = False) -> torch.Tensor:
    """Return the whole value, gathered from the ranks, gradients flowing back to each rank's shard.

    ``site`` is where the plan has the gathering, None where it has none.
    """
    with running.converting():
        value: torch.Tensor = variable._maybe_autocast(variable._value)
        if not isinstance(value, DTensor):
            return value
        whole: torch.Tensor = _Gathered.apply(value, variable._stored, gradient_is_partial, site)
        return whole


def whole_tensor(variable: Any, site: Site | None = None) -> torch.Tensor:
    """Return the whole value without gradient history; every rank has to call it."""
    value = variable._value
    with torch.no_grad():
        whole: torch.Tensor = _gathered(value, variable._stored, site) if isinstance(value, DTensor) else value.detach()
        return whole


def whole_array(variable: Any) -> np.ndarray:
    """Return the whole value as a NumPy array on every rank, which all have to ask for it.

    Raises ParallelRuntimeError if the other ranks do not ask within ``rendezvous.PATIENCE_S`` seconds.
    """
    if is_sharded(variable):
        meet(f"reading the whole value of variable {variable.path!r}")
    array: np.ndarray = keras.src.backend.convert_to_numpy(whole_tensor(variable))
    return array


def _numpy_for_torch(array: np.ndarray) -> np.ndarray:
    return array.astype("float32") if array.dtype.name == "bfloat16" else array
