"""Program: steps that call torch functions on tensors with names, as one Python function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Program = Callable[..., Any]
Writing = Callable[[Sequence["Name"], Sequence["Step"], Any], Program]  # of inputs, steps and an output made of names


@dataclass(frozen=True, slots=True)
class Name:
    """What a value is called that a step makes, with its form if it is a tensor; ``plain`` if it is no DTensor.

    ``gradient`` says whether autograd takes it into account.
    """

    number: int
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    plain: bool = False
    gradient: bool = False
    on_cpu: bool = False

    def __str__(self) -> str:
        return f"t{self.number}"


@dataclass(frozen=True, slots=True)
class Step:
    """A call of a function. Names stand in its arguments for what earlier steps made; its ``result`` is made of names.

    ``changes`` says that the function changes one of its arguments, ``alone`` that it is a torch function which, given
    plain tensors, does nothing but compute: it changes none, draws no random numbers and communicates nothing.
    ``views`` says that its result lies in memory of an argument, or may.
    """

    result: Any
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    changes: bool = False
    alone: bool = False
    views: bool = False

    def uses(self) -> Iterator[Name]:
        """Yield the names in its arguments, as often as they stand there."""
        yield from names_in((self.args, self.kwargs))


def names_in(tree: Any) -> Iterator[Name]:
    """Yield the names in tuples, lists, dicts and slices."""
    match tree:
        case Name():
            yield tree
        case tuple() | list():
            for each in tree:
                yield from names_in(each)
        case dict():
            yield from names_in(list(tree.values()))
        case slice():
            yield from names_in((tree.start, tree.stop, tree.step))


def compiled(inputs: Sequence[Name], steps: Sequence[Step], output: Any) -> Program:
    """Return the function of ``inputs`` that runs the steps and returns ``output``; each value goes at its last use."""
    return written(inputs, steps, output).program


@dataclass(frozen=True, slots=True)
class Written:
    """A program, its text, and what the text has no literals for, in the order of its globals."""

    program: Program
    text: str
    constants: tuple[Any, ...]


def written(inputs: Sequence[Name], steps: Sequence[Step], output: Any) -> Written:
    """Return the program that ``compiled`` does, and how it is written."""
    writer = _Writer()
    text = writer.text(inputs, steps, output)
    constants = tuple(writer.scope.values())
    exec(text, writer.scope)
    return Written(writer.scope["program"], text, constants)


class _Writer:
    """Writes a program as Python; what has no literal becomes a global of it, in ``scope``."""

    def __init__(self) -> None:
        self.scope: dict[str, Any] = {}

    def text(self, inputs: Sequence[Name], steps: Sequence[Step], output: Any) -> str:
        last: dict[Name, int] = dict.fromkeys(inputs, -1)
        for number, step in enumerate(steps):
            last.update(dict.fromkeys((*names_in(step.result), *step.uses()), number))
        last.update(dict.fromkeys(names_in(output), len(steps)))
        unused: dict[int, list[str]] = {}
        for name, number in last.items():
            unused.setdefault(number, []).append(str(name))
        lines = [f"def program({', '.join(map(str, inputs))}):"]
        for number, step in enumerate(steps):
            lines.append(f"    {self._target(step.result)} = {self._call(step)}")
            lines += [f"    del {', '.join(names)}" for names in [unused.get(number)] if names]
        return "\n".join([*lines, f"    return {self._expression(output)}"])

    def _target(self, result: Any) -> str:
        if isinstance(result, tuple):
            return f"({', '.join(map(self._target, result))},)"
        return "_" if result is None else str(result)

    def _call(self, step: Step) -> str:
        given = [self._expression(each) for each in step.args]
        given += [f"{name}={self._expression(each)}" for name, each in step.kwargs.items()]
        return f"{self._constant(step.function)}({', '.join(given)})"

    def _expression(self, value: Any) -> str:
        match value:
            case Name():
                return str(value)
            case tuple() if type(value) is tuple:
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

    def _constant(self, value: Any) -> str:
        name = f"c{len(self.scope)}"
        self.scope[name] = value
        return name
