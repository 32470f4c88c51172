"""Made again: what torch functions make element by element, left out of what autograd keeps.

The backward pass calls the same functions on the same tensors, so that it gets the same bits; these may have been left
out themselves. A tensor is kept all the same where what would be kept in its place takes more than half as much memory,
where many functions would have to be called, and where it is made of something that is made again by other means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tp_planner.frontend.dispatch import tensors_in
from tp_planner.ir.errors import ParallelRuntimeError
from tp_planner.regions.calls import running
from tp_planner.regions.left_out import (
    LeftOut,
    View,
    as_left_out,
    can_be_made_again,
    cannot_be_made_again,
    deciding_later,
)

MOST_FUNCTIONS = 8  # that are called for one tensor
CONSTANTS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.memory_format)


def made_again(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what an elementwise function returns; watched calls may leave it out of what autograd keeps."""
    with deciding_later() as undecided:  # some functions keep what they return
        result = function(*args, **kwargs)
    if args and result is args[0]:  # a cast to the dtype that it has
        return result
    if isinstance(result, torch.Tensor) and torch.is_grad_enabled() and not running.recomputable:
        with torch._C.DisableTorchFunction():  # what is asked here the code does not ask
            call = _Call.of(function, args, kwargs)
            if call is not None and call.is_worth_it_for(result):
                can_be_made_again(result, LeftOut(call))
                for each in undecided:
                    each.decide()
    return result


def keep_what_is_returned(output: Any) -> None:
    """Let autograd keep what a call returns: it is there for as long as others need it, whatever it was made of."""
    running.run(_keep, *tensors_in(output))


def _keep(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        cannot_be_made_again(tensor)


class _Unknown(Exception):
    """An argument may be another one in the backward pass."""


class _Call:
    """A call of a function, from which its result can be made again."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._function, self.functions = function, 1
        self._own: list[tuple[torch.Tensor, int]] = []  # that no other call makes, with their versions
        self._calls: list[_Call] = []  # that make others
        self._args = [self._as_kept(each) for each in args]
        self._kwargs = {name: self._as_kept(each) for name, each in kwargs.items()}

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """Return the call; None if it may be another one in the backward pass."""
        if torch._C._is_any_autocast_enabled():
            return None
        try:
            return cls(function, args, kwargs)
        except _Unknown:
            return None

    def _as_kept(self, value: Any) -> Any:
        if isinstance(value, CONSTANTS):
            return value
        if not isinstance(value, torch.Tensor) or isinstance(value, DTensor) or value.is_inference():
            raise _Unknown
        view = as_left_out(value)
        if view is None:
            self._own.append((value.detach(), value._version))
            return self._own[-1][0]
        if not isinstance(view.of.source, _Call):
            raise _Unknown
        self._calls.append(view.of.source)
        self.functions += view.of.source.functions
        return view

    @property
    def kept(self) -> list[torch.Tensor]:
        """What is kept, here and for the calls that make what this one is given."""
        return [tensor for tensor, _ in self._own] + [each for call in self._calls for each in call.kept]

    def is_worth_it_for(self, result: torch.Tensor) -> bool:
        """Whether to leave out the result takes much less memory, and little time."""
        storage = result.untyped_storage()
        storages = [each.untyped_storage() for each, _ in self._own if each.ndim]  # of numbers memory is no matter
        given = {each._cdata: each.nbytes() for each in storages}
        is_new = not isinstance(result, DTensor) and storage._cdata not in given and as_left_out(result) is None
        return is_new and self.functions <= MOST_FUNCTIONS and 2 * sum(given.values()) <= storage.nbytes()

    def whole(self) -> torch.Tensor:
        """Return the result, made anew.

        Raises ParallelRuntimeError if what it is made of was changed since.
        """
        if any(tensor._version != version for tensor, version in self._own):
            raise ParallelRuntimeError(
                f"what torch's {self._function.__name__} was given in the forward pass was changed in place before the "
                f"backward pass, which needs it as it was; write x = x + y for x += y in layers, or run the backward "
                f"pass first"
            )
        with torch.no_grad():
            result: torch.Tensor = self._function(*map(_there, self._args), **_there_by_name(self._kwargs))
            return result


def _there(value: Any) -> Any:
    return value.on(value.of.whole()) if isinstance(value, View) else value


def _there_by_name(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _there(each) for name, each in values.items()}
