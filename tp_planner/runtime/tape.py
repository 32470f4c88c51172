"""Tape: the torch functions that a call makes, as a program that makes them again without the code that called them.

A torch-function mode sees every call of torch, with its arguments. What a plan adds is on the tape as one step each:
how a layer reads a variable, and each boundary. A dispatch mode below sees what the first does not: tensors made by
other means, and values that code looks at. A call with any of these has no program, and the tape says why.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from tp_planner.frontend.dispatch import WatchingMode, tensors_in
from tp_planner.frontend.functions import function_name
from tp_planner.runtime.calls import run_at_once, running
from tp_planner.runtime.products import contracted_dims, product
from tp_planner.runtime.variables import BackendVariable

Program = Callable[..., Any]
# What a function may tell about a tensor without its values.
METADATA = (int, float, str, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format)
# They return the tensor itself where it is as wanted, which is so each time the program runs.
NOTHING_TO_DO = ("to", "contiguous")


class Tape:
    """Records one call while it is entered; ``problem`` says why it has no program, if it has none."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        self.problem = ""
        self._names = WeakTensorKeyDictionary()
        self._constants: list[Any] = []
        self._steps: list[tuple[str, str]] = []  # what a step's result is called, and the step as an expression
        self._last_step_with: dict[str, int] = {}  # by name
        self._modes = _modes()
        self._functions, self._made = _Functions(self), _MadeStorages(self, inputs)
        self._inputs = [self._name(tensor) for tensor in inputs]

    def __enter__(self) -> Tape:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(running, "run", self._run_as_step))
            stack.enter_context(self._made)
            stack.enter_context(self._functions)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def fail(self, problem: str) -> None:
        """Note why there is no program; the first reason counts."""
        self.problem = self.problem or problem

    def add(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Write down a call of a function."""
        if function is torch._C._set_grad_enabled:
            self._modes = _modes()
        elif self._modes != _modes():
            self.fail("code switches gradients or dtypes by other means than torch functions")
        if running.recomputable:
            self.fail("code runs again in the backward pass")
        if self.problem:
            return
        given = [self._expression(each) for each in args]
        given += [f"{name}={self._expression(each)}" for name, each in kwargs.items()]
        self._steps.append((self._target(result), f"{self._constant(function)}({', '.join(given)})"))

    def program(self, output: Any) -> Program | None:
        """Return the function of the call's input tensors that returns ``output`` anew; None if there is none."""
        if self._modes != _modes():
            self.fail("code switches gradients or dtypes by other means than torch functions")
        result = self._expression(output)
        if self.problem:
            return None
        unused: dict[int, list[str]] = {}
        for name, step in self._last_step_with.items():
            unused.setdefault(step, []).append(name)
        lines = [f"def program({', '.join(self._inputs)}):"]
        for number, (target, expression) in enumerate(self._steps):
            lines.append(f"    {target} = {expression}")
            lines += [f"    del {', '.join(names)}" for names in [unused.get(number)] if names]
        scope: dict[str, Any] = {f"c{number}": constant for number, constant in enumerate(self._constants)}
        exec("\n".join([*lines, f"    return {result}"]), scope)
        program: Program = scope["program"]
        return program

    def has_made(self, value: Any) -> bool:
        """Whether a value is a tensor that the call has made."""
        return isinstance(value, torch.Tensor) and value in self._made

    def _run_as_step(self, function: Callable[..., Any], *args: Any) -> Any:
        with self._functions.looking_away(), mock.patch.object(running, "run", run_at_once):
            result = function(*args)
            self.add(function, args, {}, result)
        return result

    def _name(self, tensor: torch.Tensor) -> str:
        name: str = self._names.setdefault(tensor, f"t{len(self._last_step_with)}")
        self._last_step_with[name] = len(self._steps)
        return name

    def _target(self, result: Any) -> str:
        if isinstance(result, torch.Tensor):
            return self._name(result)
        if isinstance(result, list | tuple) and result:
            return f"({', '.join(map(self._target, result))},)"
        return "_"

    def _constant(self, value: Any) -> str:
        self._constants.append(value)
        return f"c{len(self._constants) - 1}"

    def _expression(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return self._name(value) if value in self._names else self._from_outside(value)
        match value:
            case torch.Size() | tuple() if type(value) in (torch.Size, tuple):
                return f"({''.join(f'{self._expression(each)}, ' for each in value)})"
            case list():
                return f"[{', '.join(map(self._expression, value))}]"
            case dict():
                return f"{{{', '.join(f'{key!r}: {self._expression(each)}' for key, each in value.items())}}}"
            case slice():
                return f"slice({', '.join(map(self._expression, (value.start, value.stop, value.step)))})"
            case bool() | int() | str() | None if type(value) in (bool, int, str, type(None)):
                return repr(value)
        return self._constant(value)

    def _from_outside(self, tensor: torch.Tensor) -> str:
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            self.fail("code runs inside a transform of torch.func")
            return ""
        if tensor in self._made or tensor.grad_fn is not None:
            self.fail("a tensor is made by other means than torch functions")
        return self._constant(tensor)


def _modes() -> tuple[bool, ...]:
    """Return what decides how ops run, and changes without a torch function."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._C._is_any_autocast_enabled()


class _Functions(TorchFunctionMode):
    """Writes the torch functions that are called on the tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape, self._away = tape, False

    def looking_away(self) -> Any:
        """Inside, functions are not written down."""
        return mock.patch.object(self, "_away", True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._away:
            return func(*args, **kwargs)
        args, kwargs = _values_of_variables(args), _values_of_variables(kwargs)
        if func is torch.einsum and (dims := contracted_dims(args)) is not None:
            func, args = product, (*args[1:], dims)
        result = func(*args, **kwargs)
        name = function_name(func)
        if name in NOTHING_TO_DO and result is args[0]:
            return result
        if result is None or any(True for _ in tensors_in(result)):
            self._tape.add(func, args, kwargs, result)
        elif not _is_metadata(result):
            self._tape.fail(f"torch's {name} returns a {type(result).__name__}")
        return result


def _values_of_variables(tree: Any) -> Any:
    if isinstance(tree, BackendVariable):
        return tree.value
    if type(tree) in (list, tuple):
        return type(tree)(map(_values_of_variables, tree))
    if type(tree) is dict:
        return {key: _values_of_variables(each) for key, each in tree.items()}
    return tree


def _is_metadata(result: Any) -> bool:
    if type(result) is tuple:
        return all(map(_is_metadata, result))
    return isinstance(result, METADATA)


class _MadeStorages(WatchingMode):
    """Knows the storages that ops have made; tells the tape where code looks at values."""

    def __init__(self, tape: Tape, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._tape = tape
        self._storages: dict[int, Any] = {}
        for tensor in inputs:
            self._add(tensor)

    def watch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor runs the op on local tensors, under this mode again
        with torch._C.DisableTorchFunction():  # what is called here is no code of the model
            if _shows_values(func, args):
                self._tape.fail(f"code depends on values, by {func}")
            result = func(*args, **kwargs)
            given = set(map(_storage_key, tensors_in((args, kwargs))))
            for leaf in tensors_in(result):
                if _storage_key(leaf) not in given:
                    self._add(leaf)
            return result

    def _add(self, tensor: torch.Tensor) -> None:
        key = _storage_key(tensor)
        self._storages[key] = weakref.ref(tensor.untyped_storage(), lambda _: self._storages.pop(key, None))

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return _storage_key(tensor) in self._storages


def _storage_key(tensor: torch.Tensor) -> int:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    key: int = local.untyped_storage()._cdata
    return key


def _shows_values(func: Any, args: Any) -> bool:
    """Whether an op's result, or its shape, tells values of a tensor."""
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if func.overloadpacket is torch.ops.aten.index:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags
