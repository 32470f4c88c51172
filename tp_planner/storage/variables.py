"""Keras variables whose value is sharded.

A parallel variable is the user's own Variable object with another class and a DTensor inside. Its shape is the
whole shape everywhere. It is cut over the model axis, and what a rank holds of it there may be cut once more over the
batch axis: then the parts are put together before each use, and let go after it. Of an optimizer's sums of gradients
replicas may hold summands there, which are added wherever the whole value is read. Its ``value`` is

- during a planned layer call, what the plan says the layer reads: a plain local tensor, gradients flowing back;
- during an optimizer update, this rank's plain shard;
- while ranks save it together, the whole value;
- anywhere else the DTensor parameter itself, the leaf that holds ``.grad``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
import torch
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope
from keras.src.backend.common.variables import get_autocast_scope
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Partial as TorchPartial
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils.weak import WeakIdKeyDictionary

from tp_planner.frontend.keras_internals import convert_to_numpy, get_device, to_torch_dtype
from tp_planner.ir.errors import PlanError
from tp_planner.ir.placement import (
    Partial,
    Placement,
    Replicate,
    SequencePartial,
    Shard,
    parts_of,
)
from tp_planner.ir.plan import Boundary, Transition
from tp_planner.job.axes import Axis
from tp_planner.job.rendezvous import meet
from tp_planner.regions.backward import without_gradients
from tp_planner.regions.boundaries import cross, gather, reduce_to_shard
from tp_planner.regions.calls import Reader, Site, running, standing_at
from tp_planner.regions.replicas import Replicas
from tp_planner.regions.summands import Summands
from tp_planner.storage.casts import cast_again
from tp_planner.storage.local_shards import local_shard, local_shards
from tp_planner.storage.parts import ReadTogether
from tp_planner.storage.sharding import Sharding, own_shard
from tp_planner.storage.unequal_parts import has_unequal_parts, mesh_of_parts

BackendVariable = type(keras.Variable(0.0, name="probe"))


_stored_in_parts = WeakIdKeyDictionary()  # by parameter


@dataclass
class Stored:
    """How a parallel variable is stored, and what restoring it needs."""

    sharding: Sharding
    plain_class: type
    replicas: Replicas | None = None  # of a variable whose gradients the batch axis averages
    gathering: Callable[[Any], torch.Tensor] | None = None  # set while ranks save together
    together: dict[Site, ReadTogether] = field(default_factory=dict)  # what is read with it, by where it is read
    whole: torch.Tensor | None = None  # set while a non-elementwise update works on the whole value

    @property
    def placement(self) -> Placement:
        return self.sharding.placement


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
        if self._stored.gathering is not None:  # Keras 3.16 saves values; Keras 3.15 asks for arrays
            return self._stored.gathering(self)
        if running.values == "local":
            return local_tensor(self)
        for frame in reversed(running.frames):
            reader = frame.readers.get(id(self))
            if reader is not None:
                return self._read_once(frame.cache, reader)
        if running.frames:
            return running.run(read_whole, self, None)
        return self._value

    @property
    def regularizer(self) -> Any:
        """A function of the variable whose result is added to losses."""
        return self._regularizer

    @regularizer.setter
    def regularizer(self, value: Any) -> None:
        self._refuse_another("regularizer", self._regularizer, value)

    @property
    def constraint(self) -> Any:
        """A function of the variable that is its value after an update."""
        return self._constraint

    @constraint.setter
    def constraint(self, value: Any) -> None:
        self._refuse_another("constraint", self._constraint, value)

    def _refuse_another(self, what: str, before: Any, value: Any) -> None:
        """Raise PlanError for a function that is not the plan's: it would be one of this rank's shard."""
        if value is not before:
            raise PlanError(
                f"variable {self.path!r} is parallelized, and its plan has what its {what} communicates; set it before "
                f"the model is parallelized, or call tp_planner.restore(model) first on all ranks, and parallelize the "
                f"model again"
            )

    def _read_once(self, cache: dict[tuple[Any, ...], torch.Tensor], reader: Reader) -> torch.Tensor:
        scope = get_autocast_scope()
        key = (id(self), None if scope is None else scope.dtype, torch.is_grad_enabled())
        if key not in cache:
            cache[key] = running.run(reader, self)
        return cache[key]

    def assign(self, value: Any) -> Any:
        """Set the value: from a whole array or tensor, a shard in an update, or an equally placed DTensor."""
        if in_stateless_scope():
            return super().assign(value)
        if isinstance(value, BackendVariable):
            value = value.value
        if isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
            value = self._convert_to_tensor(value, dtype=self._dtype)  # as of any variable: an op of its own
        elif not isinstance(value, DTensor):
            value = np.asarray(value)
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
            value = self._part_of(value)
        elif running.values == "local" and tuple(value.shape) == tuple(target.shape):
            pass  # what this rank has made of its own
        elif tuple(value.shape) == tuple(self.shape):
            value = self._stored.sharding.own(value)
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
        for together in self._stored.together.values():
            together.forget(self)

    def _part_of(self, value: DTensor) -> torch.Tensor:
        """Return what this rank stores of a value that is a DTensor; nothing moves if it is cut as the variable is."""
        own = self._value
        alike = isinstance(own, DTensor) and value.device_mesh == own.device_mesh and value.placements == own.placements
        if not alike and (parts_of(self._stored.placement) or self._stored.sharding.is_summed):
            part: torch.Tensor = self._stored.sharding.own(value.full_tensor())
            return part
        return value.redistribute(placements=own.placements).to_local()

    def whole(self) -> torch.Tensor:
        """Return the whole value without gradient history; every rank has to call it."""
        return whole_tensor(self)

    def let_gather(self, gather: Callable[[Any], torch.Tensor] | None) -> None:
        """Let the value be what ``gather`` returns of the variable, until it is None again."""
        self._stored.gathering = gather

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        gathering = self._stored.gathering
        array = convert_to_numpy(gathering(self)) if gathering is not None else whole_array(self)
        return array.astype(dtype) if dtype else array

    def __repr__(self) -> str:
        return f"<Variable path={self.path}, shape={self.shape}, dtype={self._dtype}, stored={self._stored.placement}>"


def make_parallel(
    variable: Any, value: torch.nn.Parameter, sharding: Sharding, replicas: Replicas | None = None
) -> None:
    """Turn a Keras variable into a parallel one with ``value`` as its parameter."""
    variable._stored = Stored(sharding, type(variable), replicas)
    variable._value = value
    if parts_of(sharding.placement):
        _stored_in_parts[value] = sharding
    variable.__class__ = ParallelVariable


def stored_in_parts(parameter: torch.Tensor) -> Sharding | None:
    """Return how a parameter is cut that is stored in parts side by side; None for any other."""
    sharding: Sharding | None = _stored_in_parts.get(parameter)
    return sharding


def make_plain(variable: Any, value: torch.nn.Parameter) -> None:
    """Undo ``make_parallel``."""
    _stored_in_parts.pop(variable._value, None)
    variable.__class__ = variable._stored.plain_class
    del variable._stored
    variable._value = value


def is_sharded(variable: Any) -> bool:
    """Whether a Keras variable is stored in shards."""
    return isinstance(variable, ParallelVariable) and bool(variable._stored.sharding.cuts)


def is_in_shards(variable: Any) -> bool:
    """Whether ranks store shards of a Keras variable, by a plan or before there is one."""
    return isinstance(variable._value, DTensor)


def local_tensor(variable: Any) -> torch.Tensor:
    """Return the plain tensor that this rank stores of a variable, without gradient history."""
    value = variable._value
    tensor: torch.Tensor = value._local_tensor if isinstance(value, DTensor) else value.detach()
    return tensor


def sharded_parameter(
    local: torch.Tensor, shape: tuple[int, ...], sharding: Sharding, requires_grad: bool
) -> torch.nn.Parameter:
    """Return a parameter of the whole ``shape`` of which this rank stores ``local``."""
    stride = tuple(math.prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape)))
    placements = [_torch_placement(each) for each in (sharding.placement, sharding.batch_placement)]
    mesh = sharding.axes.mesh
    if not (isinstance(sharding.batch_placement, Shard) or sharding.is_summed):
        mesh, placements = sharding.axes.model.mesh, placements[:1]
    if has_unequal_parts(sharding.placement):
        mesh = mesh_of_parts(mesh, parts_of(sharding.placement))
    whole = DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    return torch.nn.Parameter(whole, requires_grad=requires_grad)


def _torch_placement(placement: Placement) -> Any:
    """Return what DTensor calls a placement.

    Of equal parts side by side it has a name. Unequal ones it has none for: their mesh has; see ``unequal_parts``.
    """
    if not isinstance(placement, Shard):
        return TorchPartial() if isinstance(placement, Partial) else TorchReplicate()
    if parts_of(placement) and not has_unequal_parts(placement):
        return _StridedShard(placement.dim, split_factor=len(parts_of(placement)))
    return TorchShard(placement.dim)


def read_as(boundary: Boundary, axis: Axis, site: Site) -> Reader:
    """Return the reader of a variable that a layer uses through ``boundary``, which stands at ``site``."""
    stored, used = boundary.forward.source, boundary.forward.target
    partial = isinstance(boundary.backward.source, Partial)
    if isinstance(stored, Shard) and used == stored:
        return functools.partial(read_shard, site=site)  # which programs know
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
    return lambda variable: cross(read_shard(variable, site), boundary, axis, site)


def read_on_stream(boundary: Boundary, axis: Axis, site: Site, summands: Summands) -> Reader:
    """Return the reader of a variable that a layer uses on the residual stream, be that sharded or whole.

    The gradient of one that is stored whole is left to ``summands``, which adds up those of the ranks.
    """
    whole, sharded = read_as(boundary.where_stream_is_whole, axis, site), read_as(boundary, axis, site)

    def read(variable: Any) -> torch.Tensor:
        if running.stream_is_whole:
            return whole(variable)
        if is_sharded(variable):
            return sharded(variable)
        with running.converting():
            value = summands.read(variable)
        value = variable._maybe_autocast(value)
        return cross(value, cut, axis, site) if isinstance(boundary.forward.target, Shard) else value

    cut = replace(boundary, backward=Transition(boundary.forward.target, SequencePartial()))
    return read


def read_shard(variable: Any, site: Site | None) -> torch.Tensor:
    """Return this rank's shard on the model axis, gradients flowing back to the parameter.

    ``site`` is where the plan has what the batch axis communicates for it, None where it has nothing.
    """
    stored, value = variable._stored, variable._value
    if isinstance(stored.sharding.batch_placement, Shard):
        with running.converting():
            return _read_parts(variable, stored, site)
    if isinstance(value, DTensor):
        with running.converting():
            value = local_shard(value)
    cast: torch.Tensor = variable._maybe_autocast(value)
    if cast is not value:
        cast_again(cast, local_tensor(variable), variable.path)
    return cast


def read_shards(variables: Sequence[Any]) -> Sequence[torch.Tensor]:
    """Return what ``read_shard`` does of each variable, of those that a program may read together."""
    with running.converting():
        return local_shards([variable._value for variable in variables])


def may_be_read_together(variable: Any, dtype: torch.dtype | None) -> bool:
    """Whether to read a variable in shards is but to take this rank's, where it is read in a dtype.

    Replicas average gradients while others are computed, so theirs are not to wait for each other.
    """
    if isinstance(variable._stored.sharding.batch_placement, Shard) or variable._stored.replicas is not None:
        return False
    value = variable._value
    return isinstance(value, DTensor) and value.dtype == dtype and value.requires_grad


def _read_parts(variable: Any, stored: Stored, site: Site | None) -> torch.Tensor:
    dtype = _dtype_of_reads(variable)
    together = stored.together.get(site) if site is not None and running.scopes else None
    if together is None or not together.serves(variable, dtype):
        return ReadTogether([variable], [dtype], site).begin().take(0)
    return together.read(variable).to(dtype)


def _dtype_of_reads(variable: Any) -> torch.dtype:
    """Return the dtype as which Keras reads a variable here."""
    scope, dtype = get_autocast_scope(), variable._value.dtype
    casts = scope is not None and scope.dtype is not None and variable._autocast and dtype.is_floating_point
    read: torch.dtype = to_torch_dtype(scope.dtype) if casts else dtype
    return read


class _Gathered(torch.autograd.Function):
    """The whole of what the model axis stores in shards; each rank's gradient of it is whole, or a summand."""

    @staticmethod
    def forward(
        ctx: Any,
        shard: torch.Tensor,
        placement: Shard,
        length: int,
        axis: Axis,
        gradient_is_partial: bool,
        site: Site | None,
    ) -> torch.Tensor:
        ctx.placement, ctx.axis, ctx.partial, ctx.site = placement, axis, gradient_is_partial, site
        with standing_at(site):
            return gather(shard.detach(), placement, length, axis)

    @staticmethod
    @without_gradients
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        if ctx.partial:
            with standing_at(ctx.site):
                shard = reduce_to_shard(gradient, ctx.placement, ctx.axis)
        else:
            # A copy: a slice would keep the whole gradient's storage.
            shard = own_shard(gradient, ctx.placement, ctx.axis).clone(memory_format=torch.contiguous_format)
        return shard, None, None, None, None, None


def read_whole(variable: Any, site: Site | None, gradient_is_partial: bool = False) -> torch.Tensor:
    """Return the whole value, gathered from the ranks, gradients flowing back to each rank's shard.

    ``site`` is where the plan has the gathering, None where it has none.
    """
    with running.converting():
        shard = read_shard(variable, site)
        sharding = variable._stored.sharding
        if not isinstance(sharding.placement, Shard):
            return shard
        length = variable.shape[sharding.placement.dim]
        whole: torch.Tensor = _Gathered.apply(
            shard, sharding.placement, length, sharding.axes.model, gradient_is_partial, site
        )
        return whole


def whole_tensor(variable: Any, site: Site | None = None) -> torch.Tensor:
    """Return the whole value without gradient history; every rank has to call it."""
    value = variable._value
    with torch.no_grad(), standing_at(site):
        if not isinstance(value, DTensor):
            plain: torch.Tensor = value.detach()
            return plain
        whole: torch.Tensor = variable._stored.sharding.whole(value._local_tensor.detach(), tuple(variable.shape))
        return whole


def whole_array(variable: Any) -> np.ndarray:
    """Return the whole value as a NumPy array on every rank, which all have to ask for it.

    Raises ParallelRuntimeError as ``rendezvous.meet`` does.
    """
    if is_in_shards(variable):
        meet(f"reading the whole value of variable {variable.path!r}")
    array: np.ndarray = convert_to_numpy(whole_tensor(variable))
    return array


def _numpy_for_torch(array: np.ndarray) -> np.ndarray:
    return array.astype("float32") if array.dtype.name == "bfloat16" else array
