"""Tape: the torch functions that a call makes, as a program that makes them again without the code that called them.

A torch-function mode sees every call of torch, with its arguments. What a plan adds is on the tape as one step each:
how a layer reads a variable, and each boundary. A dispatch mode below sees what the first does not: tensors made by
other means, and values that code looks at. A call with any of these has no program, and the tape says why.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from keras.src.backend.common.variables import AutocastScope, get_autocast_scope
from keras.src.backend.torch import random as keras_random
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from tp_planner.frontend.dispatch import WatchingMode, tensors_in
from tp_planner.frontend.functions import function_name
from tp_planner.frontend.keras_internals import core
from tp_planner.patches import replaced, wrapped
from tp_planner.regions.calls import run_at_once, running
from tp_planner.regions.functions import beneath_the_calls
from tp_planner.regions.made_again import made_again
from tp_planner.replay.program import Name, Program, Step, Writing, compiled
from tp_planner.replay.rewrites import Rewriting, rewritten
from tp_planner.storage.variables import BackendVariable, ParallelVariable

# What a function may tell about a tensor without its values.
METADATA = (int, float, str, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format)
# They return the tensor itself where it is as wanted, which is so each time the program runs.
NOTHING_TO_DO = ("to", "contiguous")

# Functions that no tape sees, and on which all random numbers depend.
SEEDING = (
    *((torch, name) for name in ("manual_seed", "seed", "set_rng_state")),
    *((torch.random, name) for name in ("manual_seed", "seed", "set_rng_state", "fork_rng")),
)
# Functions of Keras that look at values of their arguments, a seed or where a slice begins, and nowhere else.
READING_VALUES = ((keras_random, "torch_seed_generator"), (core, "slice"))


class Tape:
    """Records one call while it is entered; ``problem`` says why it has no program, if it has none."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        self.problem = ""
        self._thread = threading.get_ident()  # that of the call; modules are the same on all of them
        self.draws = 0  # of random numbers, by ops
        self.written: set[int] = set()  # storages that ops have written into, since a function was called
        self._names = WeakTensorKeyDictionary()
        self._generators: dict[int, tuple[torch.Generator, Name]] = {}
        self._count = 0  # of names
        self._steps: list[Step] = []
        self._modes, self._autocast = _modes(), _autocast()
        self._functions, self._made = _Functions(self), _MadeStorages(self, inputs)
        self._inputs = [self._name(tensor) for tensor in inputs]

    def __enter__(self) -> Tape:
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced(running, "run", self._run_as_step, "what a plan adds is a step"))
            for module, name in READING_VALUES:
                stack.enter_context(wrapped(module, name, self._on_values, "it looks at values, and is a step"))
            for module, name in SEEDING:
                stack.enter_context(wrapped(module, name, self._refused, "no program may do this"))
            stack.enter_context(self._made)
            stack.enter_context(beneath_the_calls(self._functions))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def fail(self, problem: str) -> None:
        """Note why there is no program; the first reason counts."""
        self.problem = self.problem or problem

    def add(
        self, function: Any, args: Any, kwargs: Any, result: Any, changes: bool = False, alone: bool = False
    ) -> None:
        """Write down a call of a function; see ``Step`` for what is said of it."""
        if function is torch._C._set_grad_enabled:
            self._modes = _modes()
        elif self._modes != _modes():
            self.fail("code switches gradients or dtypes by other means than torch functions")
        if running.recomputable:
            self.fail("code runs again in the backward pass")
        if self.problem:
            return
        given, named = self._with_names(args), self._with_names(kwargs)
        if not self.problem:
            views = _share_memory((args, kwargs), result)
            self._steps.append(Step(self._result(result), function, given, named, changes, alone, views))

    @property
    def steps(self) -> Sequence[Step]:
        """What is written down, up to the first problem."""
        return self._steps

    def program(self, output: Any, write: Writing = compiled, rewrite: Rewriting = rewritten) -> Program | None:
        """Return the function of the call's input tensors that returns ``output`` anew; None if there is none.

        ``write`` makes it of the names of the inputs, the steps, and the output in names; ``rewrite`` says which steps
        it is made of, given those on the tape and the output.
        """
        if self._modes != _modes():
            self.fail("code switches gradients or dtypes by other means than torch functions")
        if not _is_of_plain_containers(output):
            self.fail("the output is in containers of a kind of their own")
        result = self._with_names(output)
        if self.problem:
            return None
        return write(self._inputs, rewrite(self._steps, result), result)

    def has_made(self, value: Any) -> bool:
        """Whether a value is a tensor that the call has made."""
        return isinstance(value, torch.Tensor) and value in self._made

    def _refused(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(self._run_refused, function)

    def _on_values(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(self._run_on_values, function)

    def _run_refused(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == self._thread:
            self.fail("code changes torch's random state")
        return function(*args, **kwargs)

    def _run_on_values(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function as a step, having read the variables among its arguments before."""
        if threading.get_ident() != self._thread:
            return function(*args, **kwargs)
        return self._run_as_step(function, *self.values_of_variables(args), **self.values_of_variables(kwargs))

    def _run_as_step(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if _autocast() != self._autocast and any(isinstance(each, BackendVariable) for each in args):
            function = functools.partial(_with_autocast, _autocast(), function)
        with self._looking_away(), replaced(running, "run", run_at_once, "one step is no more steps"):
            result = function(*args, **kwargs)
            if function is not made_again or not any(result is each for each in args):  # as of NOTHING_TO_DO
                self.add(function, args, kwargs, result)
        return result

    def values_of_variables(self, tree: Any) -> Any:
        """Return a function's arguments with values in place of variables; to read one in another dtype is a step."""
        if isinstance(tree, BackendVariable):
            value = tree.value
            is_cast = not isinstance(tree, ParallelVariable) and value is not tree._value
            return self._run_as_step(_read, tree) if is_cast else value
        if type(tree) in (list, tuple):
            return type(tree)(map(self.values_of_variables, tree))
        if type(tree) is dict:
            return {key: self.values_of_variables(each) for key, each in tree.items()}
        return tree

    @contextlib.contextmanager
    def _looking_away(self) -> Iterator[None]:
        """Inside, functions are not written down, and may look at values."""
        why = "what a step does is not on the tape"
        with replaced(self._functions, "away", True, why), replaced(self._made, "away", True, why):
            yield

    def _name(self, tensor: torch.Tensor) -> Name:
        if tensor not in self._names:
            self._names[tensor] = Name(
                self._next(),
                tensor.shape,
                tensor.stride(),
                tensor.dtype,
                not isinstance(tensor, DTensor),
                tensor.requires_grad,
                tensor.is_cpu,
            )
        name: Name = self._names[tensor]
        return name

    def _next(self) -> int:
        self._count += 1
        return self._count - 1

    def _result(self, result: Any) -> Any:
        """Return the names of what a function has made, as a step has them."""
        if isinstance(result, torch.Tensor):
            return self._name(result)
        if isinstance(result, torch.Generator):
            name = Name(self._next())
            self._generators[id(result)] = result, name
            return name
        if isinstance(result, list | tuple) and result:
            return tuple(map(self._result, result))
        return None

    def _with_names(self, value: Any) -> Any:
        """Return a value with names in place of what steps have made."""
        match value:
            case torch.Tensor():
                return self._names[value] if value in self._names else self._from_outside(value)
            case torch.Generator():
                return self._generator(value)
            case tuple():
                return tuple(map(self._with_names, value))
            case list():
                return list(map(self._with_names, value))
            case dict():
                return {key: self._with_names(each) for key, each in value.items()}
            case slice():
                return slice(*map(self._with_names, (value.start, value.stop, value.step)))
        return value

    def _from_outside(self, tensor: torch.Tensor) -> torch.Tensor:
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            self.fail("code runs inside a transform of torch.func")
        elif tensor in self._made or tensor.grad_fn is not None:
            self.fail("a tensor is made by other means than torch functions")
        return tensor

    def _generator(self, generator: torch.Generator) -> Any:
        if id(generator) not in self._generators:
            self.fail("code draws from a torch.Generator of its own")
            return None
        return self._generators[id(generator)][1]


def _is_of_plain_containers(tree: Any) -> bool:
    """Whether a program can put the tensors of an output together as they were."""
    if isinstance(tree, dict):
        return type(tree) is dict and all(map(_is_of_plain_containers, tree.values()))
    if isinstance(tree, tuple | list):
        return type(tree) in (tuple, list, torch.Size) and all(map(_is_of_plain_containers, tree))
    return isinstance(tree, torch.Tensor) or tree_flatten(tree)[0] == [tree]


def _modes() -> tuple[bool, ...]:
    """Return what decides how ops run, and changes without a torch function."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._C._is_any_autocast_enabled()


def _autocast() -> str | None:
    """Return the dtype in which variables are read, if it is another one than theirs."""
    scope = get_autocast_scope()
    dtype: str | None = None if scope is None else scope.dtype
    return dtype


def _with_autocast(dtype: str | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call what reads a variable as it is read in a layer that has another dtype than the model."""
    with AutocastScope(dtype):
        return function(*args, **kwargs)


def _read(variable: Any) -> torch.Tensor:
    value: torch.Tensor = variable.value
    return value


class _Functions(TorchFunctionMode):
    """Writes the torch functions that are called on the tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape, self.away = tape, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.away:
            return func(*args, **kwargs)
        args, kwargs = self._tape.values_of_variables(args), self._tape.values_of_variables(kwargs)
        before, draws = _versions((args, kwargs)), self._tape.draws
        self._tape.written.clear()
        result = func(*args, **kwargs)
        name = function_name(func)
        if name in NOTHING_TO_DO and result is args[0]:
            return result
        if result is None or any(True for _ in tensors_in(result)):
            changes = before is None or before != _versions((args, kwargs)) or self._has_written_into((args, kwargs))
            alone = not changes and draws == self._tape.draws and _are_plain((args, kwargs, result))
            self._tape.add(func, args, kwargs, result, changes, alone)
        elif not _is_metadata(result):
            self._tape.fail(f"torch's {name} returns a {type(result).__name__}")
        return result

    def _has_written_into(self, tree: Any) -> bool:
        """Whether ops have, who do not count it: those on lists of tensors, and fused ones."""
        with torch._C.DisableTorchFunction():
            return bool(self._tape.written) and any(
                _storage_key(each) in self._tape.written for each in tensors_in(tree)
            )


def _are_plain(tree: Any) -> bool:
    return not any(isinstance(each, DTensor) for each in tensors_in(tree))


def _versions(tree: Any) -> list[int] | None:
    """Return how often each tensor was changed; None where torch does not count it."""
    with torch._C.DisableTorchFunction():
        tensors = list(tensors_in(tree))
        return None if any(each.is_inference() for each in tensors) else [each._version for each in tensors]


def _is_metadata(result: Any) -> bool:
    if type(result) is tuple:
        return all(map(_is_metadata, result))
    return isinstance(result, METADATA)


class _MadeStorages(WatchingMode):
    """Knows the storages that ops have made; tells the tape where code looks at values."""

    def __init__(self, tape: Tape, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._tape, self.away = tape, False
        self._storages: dict[int, Any] = {}
        for tensor in inputs:
            self._add(tensor)

    def watch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor runs the op on local tensors, under this mode again
        with torch._C.DisableTorchFunction():  # what is called here is no code of the model
            if not self.away and _shows_values(func, args):
                self._tape.fail(f"code depends on values, by {func}")
            self._tape.draws += torch.Tag.nondeterministic_seeded in func.tags
            result = func(*args, **kwargs)
            if func._schema.is_mutable:
                self._tape.written.update(map(_storage_key, tensors_in(_written_by(func, args, kwargs))))
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


def _share_memory(given: Any, result: Any) -> bool:
    with torch._C.DisableTorchFunction():
        memory = set(map(_storage_key, tensors_in(given)))
        return any(_storage_key(each) in memory for each in tensors_in(result))


def _written_by(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments that an op writes into."""
    declared = func._schema.arguments
    given = dict(zip((each.name for each in declared), args, strict=False)) | kwargs
    return [given.get(each.name) for each in declared if each.alias_info is not None and each.alias_info.is_write]


def _shows_values(func: Any, args: Any) -> bool:
    """Whether an op's result, or its shape, tells values of a tensor."""
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if func.overloadpacket is torch.ops.aten.index:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags
