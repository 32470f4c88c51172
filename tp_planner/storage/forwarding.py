"""Forwarding: what somebody took of a model before its variables changed how they are stored goes on being theirs.

A torch optimizer, a hook, an average of weights or another model holds a variable's parameter, and nobody can tell it
that the variable has another one now. So the parameter itself is changed, in one of two ways:

- A DTensor that is to be a DTensor again is given its new part in place (``fill``).
- A plain parameter cannot become a DTensor, nor the other way round: their objects differ in size. It is emptied, so
  that it keeps nothing alive, and every use of it by torch is from now on a use of what the variable holds at that
  moment (``forward``). Should the variable ever hold a parameter of its kind again, it is that one (``revive``).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree

_VARIABLE = "_tp_planner_variable"


class _Forwarding:
    """A parameter that stands for the one that its variable has."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _pytree.tree_map_only(_Forwarding, current, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(current(self), name)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return repr(current(self))

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(current(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return current(self).__reduce_ex__(protocol)


class _ForwardingParameter(_Forwarding, torch.nn.Parameter):  # type: ignore[misc]
    pass


class _ForwardingDTensor(_Forwarding, DTensor):  # type: ignore[misc]
    __slots__ = ()

    # What DTensor has in Python is not asked of torch functions.

    def full_tensor(self, **options: Any) -> Any:
        value = current(self)
        return value.full_tensor(**options) if isinstance(value, DTensor) else value

    def to_local(self, **options: Any) -> Any:
        value = current(self)
        return value.to_local(**options) if isinstance(value, DTensor) else value

    def redistribute(self, *args: Any, **options: Any) -> Any:
        return current(self).redistribute(*args, **options)

    @property
    def device_mesh(self) -> Any:
        return current(self).device_mesh

    @property
    def placements(self) -> Any:
        return current(self).placements


def current(parameter: Any) -> Any:
    """Return the parameter that stands where this one stood: itself, unless it forwards."""
    return parameter.__dict__[_VARIABLE]._value if isinstance(parameter, _Forwarding) else parameter


def forward(parameter: Any, variable: Any) -> None:
    """Empty a parameter that a variable has no more, and let it stand for the one that it has; its hooks move there."""
    hooks, late_hooks = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    parameter._backward_hooks = parameter._post_accumulate_grad_hooks = None
    parameter.grad = None
    if isinstance(parameter, DTensor):
        parameter._local_tensor = parameter._local_tensor.new_empty(0)
        parameter.__class__ = _ForwardingDTensor
    else:
        parameter.data = parameter.new_empty(0)
        parameter.__class__ = _ForwardingParameter
    parameter.__dict__[_VARIABLE] = variable
    if hooks:  # the very dicts, to which the handles that remove hooks refer
        variable._value._backward_hooks = hooks
    if late_hooks:
        variable._value._post_accumulate_grad_hooks = late_hooks


def revive(parameter: Any, value: torch.Tensor, requires_grad: bool) -> Any:
    """Return the plain parameter of a value: the given one, if it forwards, else a new one."""
    if not isinstance(parameter, _ForwardingParameter):
        return torch.nn.Parameter(value, requires_grad=requires_grad)
    revived: Any = parameter
    del revived.__dict__[_VARIABLE]
    revived.__class__ = torch.nn.Parameter
    revived.data, revived.requires_grad = value, requires_grad
    return revived


@dataclass(frozen=True, slots=True)
class Content:
    """What a parameter holds: a tensor; with ``spec``, this rank's part of a DTensor."""

    tensor: torch.Tensor
    spec: Any = None

    @classmethod
    def of(cls, parameter: torch.nn.Parameter) -> Content:
        if isinstance(parameter, DTensor):
            return cls(parameter._local_tensor, parameter._spec)
        return cls(parameter.data)

    def fill(self, parameter: torch.nn.Parameter) -> None:
        """Give a parameter of the same kind and shape this content."""
        if isinstance(parameter, DTensor):
            parameter._local_tensor, parameter._spec = self.tensor, self.spec
        else:
            parameter.data = self.tensor
