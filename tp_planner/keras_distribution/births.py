"""Births: variables that are created under a distribution, each as this process's shard.

The value is made on the host, one variable at a time, and rank 0's is the truth: it sends each process its shard.
Until a plan says how layers read it, such a variable is an ``UnplannedVariable``.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import torch
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from tp_planner.frontend.calling import in_layer_call, is_symbolic, leaves_no_trace
from tp_planner.frontend.keras_internals import convert_to_numpy, to_torch_dtype
from tp_planner.job.rendezvous import meet
from tp_planner.keras_distribution.backend import BackendLayout, own_part, scatter_from_rank_zero, whole_of
from tp_planner.storage.variables import BackendVariable


class UnplannedVariable(BackendVariable):
    """A Keras variable stored in shards before a plan says how layers read it.

    A layer that is called alone reads the whole value, gathered, gradients flowing back to the shards. Elsewhere
    ``value`` is the DTensor parameter, the leaf that holds ``.grad``.
    """

    _gathering: Callable[[Any], torch.Tensor] | None = None  # set while ranks save together

    @property
    def value(self) -> Any:
        """The tensor that the variable stands for at this moment; see the class's text."""
        value = self._value
        if not isinstance(value, DTensor):
            return super().value
        if self._gathering is not None:
            return self._gathering(self)
        if is_symbolic():
            return self._maybe_autocast(torch.empty(self._shape, dtype=to_torch_dtype(self._dtype), device="meta"))
        if in_stateless_scope():  # where Keras cannot infer shapes on meta tensors it calls on others
            scoped = get_stateless_scope().get_current_value(self)
            return self._maybe_autocast(value.full_tensor() if scoped is None else scoped)
        return self._maybe_autocast(value.full_tensor()) if in_layer_call() else value

    def assign(self, value: Any) -> Any:
        """Set the value from a whole array, tensor or variable; each process keeps its shard."""
        if not isinstance(self._value, DTensor):
            return super().assign(value)
        if isinstance(value, BackendVariable):
            value = value.value
        value = value if isinstance(value, torch.Tensor) else np.asarray(value)
        self._direct_assign(value)
        return value

    def _direct_assign(self, value: Any) -> None:
        own = self._value
        if not isinstance(own, DTensor):
            super()._direct_assign(value)
            return
        if tuple(value.shape) != tuple(self.shape):
            raise ValueError(
                f"the value assigned to {self.path!r} has shape {tuple(value.shape)}, "
                f"the variable has shape {tuple(self.shape)}; assign the whole value"
            )
        if isinstance(value, DTensor):
            part: Any = value.redistribute(own.device_mesh, own.placements).to_local()
        else:
            part = own_part(value, BackendLayout(own.device_mesh, tuple(own.placements)))
        if isinstance(part, np.ndarray):
            part = part.astype("float32") if part.dtype.name == "bfloat16" else part
            part = torch.as_tensor(np.ascontiguousarray(part))
        with torch.no_grad():
            own._local_tensor.copy_(part)

    def whole(self) -> torch.Tensor:
        """Return the whole value without gradient history; every process has to call it."""
        return whole_of(self._value)

    def let_gather(self, gather: Callable[[Any], torch.Tensor] | None) -> None:
        """Let the value be what ``gather`` returns of the variable, until it is None again."""
        self._gathering = gather

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self._gathering is not None:
            array: np.ndarray = convert_to_numpy(self._gathering(self))
        elif isinstance(self._value, DTensor):
            meet(f"reading the whole value of variable {self.path!r}")
            array = convert_to_numpy(self.whole())
        else:
            array = convert_to_numpy(self._value)
        return array.astype(dtype) if dtype else array

    def __repr__(self) -> str:
        return f"<Variable path={self.path}, shape={self.shape}, dtype={self._dtype}, stored in shards>"


def is_unplanned(variable: Any) -> bool:
    """Whether a Keras variable is stored in shards that no plan reads yet."""
    return isinstance(variable, UnplannedVariable) and isinstance(variable._value, DTensor)


@contextlib.contextmanager
def not_sharding() -> Iterator[None]:
    """Inside, variables are created whole, whatever the distribution says."""
    before = _Births.paused
    _Births.paused = True
    try:
        yield
    finally:
        _Births.paused = before


class _Births:
    paused = False


_paths: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()  # of what is born, by distribution


def paths_born_under(distribution: Any) -> frozenset[str]:
    """Return the paths of all variables that were created under a distribution, whatever model they belong to."""
    return frozenset(_paths.get(distribution, ()))


def born_with_initializer(plain: Callable[..., None]) -> Callable[..., None]:
    """Return Keras's creation of a variable from an initializer, with sharding at birth."""

    def _initialize_with_initializer(self: Any, initializer: Any) -> None:
        if _layout_of(self, tuple(self._shape), self._dtype) is None:
            plain(self, initializer)
            return
        with keras.device("cpu"):
            value = self._convert_to_tensor(initializer(self._shape, dtype=self._dtype))
        self._initialize(value)

    return _initialize_with_initializer


def born_with_value(plain: Callable[..., None]) -> Callable[..., None]:
    """Return Keras's creation of a variable from its value, with sharding at birth."""

    def _initialize(self: Any, value: Any) -> None:
        if isinstance(value, torch.nn.Parameter | FakeTensor):
            plain(self, value)
            return
        layout = _layout_of(self, tuple(value.shape), self._dtype)
        if layout is None:
            _whole(plain, self, value)
            return
        value = value.detach().to(to_torch_dtype(self._dtype))
        meet(f"creating variable {self.path!r}")
        self._value = torch.nn.Parameter(scatter_from_rank_zero(value, layout), self._trainable)
        self.__class__ = UnplannedVariable
        self._born_under = keras.distribution.distribution()

    return _initialize


def _whole(plain: Callable[..., None], variable: Any, value: Any) -> None:
    """Create a variable as Keras does; of integers, which take no gradient, torch's Keras creates no trainable ones."""
    dtype, trainable = to_torch_dtype(variable._dtype), variable._trainable
    variable._trainable = trainable and (dtype.is_floating_point or dtype.is_complex)
    try:
        plain(variable, value)
    finally:
        variable._trainable = trainable


def _layout_of(variable: Any, shape: tuple[int, ...], dtype: str) -> BackendLayout | None:
    """Return the layout under which a variable is born in shards; None for one that is born whole.

    A variable whose layout does not fit is born whole: the planner lists these problems, all at once.
    """
    distribution = keras.distribution.distribution()
    if _Births.paused or leaves_no_trace():
        return None
    if distribution is not None:
        _paths.setdefault(distribution, set()).add(variable.path)
    if variable._layout is None and distribution is not None:
        variable._shape = shape
        with contextlib.suppress(ValueError):  # two patterns match
            variable._layout = distribution.get_variable_layout(variable)
    layout = variable._layout
    if isinstance(layout, BackendLayout):
        return layout
    if layout is None or layout.device_mesh is None or not keras.backend.is_float_dtype(dtype):
        return None
    sizes = dict(zip(layout.device_mesh.axis_names, layout.device_mesh.shape, strict=True))
    named = [axis for axis in layout.axes if axis is not None]
    if len(layout.axes) != len(shape) or len(set(named)) < len(named) or all(sizes[axis] == 1 for axis in named):
        return None
    backend_layout: BackendLayout = layout.backend_layout
    return backend_layout
