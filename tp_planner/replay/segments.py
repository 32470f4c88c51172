"""Segments: what lies between the boundaries of a program, each as one step.

Steps that do nothing but compute, and follow each other, become a function of their own, to be compiled. What a plan
adds to a call stays outside: boundaries, reads of variables, seeds; so do steps that draw random numbers or change a
tensor, which a compiler might do otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tp_planner.regions.made_again import made_again
from tp_planner.replay.program import Name, Program, Step, Written, names_in, written

SHORTEST = 2  # steps; a single one is a function already


def joined(steps: Sequence[Step], output: Any, make: Callable[[Program], Program], shared: bool = True) -> list[Step]:
    """Return the steps of a program that returns ``output``, each segment as one step.

    Args:
        steps: the steps.
        output: what the program returns, of names.
        make: given a segment's function of tensors, which returns a tuple, returns what is called in its place.
        shared: whether equal segments, as equal blocks have, share what is made.
    """
    made: dict[Hashable, Program] = {}
    found: list[Step] = []
    position = 0
    for is_segment, members in itertools.groupby(map(_as_compiled, steps), key=lambda step: step.alone):
        group = list(members)
        position += len(group)
        if not is_segment or len(group) < SHORTEST:
            found += group
            continue
        later = {*names_in(output), *(name for step in steps[position:] for name in step.uses())}
        found += _as_one(group, later, made if shared else {}, make)
    return found


def _as_compiled(step: Step) -> Step:
    """Return the step as a compiler is to have it, which decides by itself what is made again in the backward pass."""
    if step.function is not made_again or not all(map(_is_plain, tensors_in((step.args, step.kwargs)))):
        return step
    return Step(step.result, step.args[0], step.args[1:], step.kwargs, alone=True)


def _is_plain(given: Name | torch.Tensor) -> bool:
    return given.plain if isinstance(given, Name) else not isinstance(given, DTensor)


def _as_one(
    group: Sequence[Step], later: set[Name], made: dict[Hashable, Program], make: Callable[[Program], Program]
) -> Iterator[Step]:
    """Yield the step that a segment is, if anything that it makes is used ``later``."""
    takes: dict[Hashable, Name | torch.Tensor] = {}
    makes: dict[Hashable, Name] = {}
    for step in group:
        given = tensors_in((step.args, step.kwargs))
        takes.update((key_of(each), each) for each in given if key_of(each) not in makes)
        makes.update((name, name) for name in names_in(step.result) if name not in takes)  # some return one
    leaves = tuple(name for name in makes.values() if name in later)
    if leaves:
        function = in_own_names(takes, group, leaves)
        key = what_it_is(function)
        if key not in made:
            made[key] = make(function.program)
        yield Step(leaves, made[key], tuple(takes.values()), {})


def tensors_in(tree: Any) -> Iterator[Name | torch.Tensor]:
    """Yield what stands for tensors in arguments: names, and tensors from outside of the program."""
    match tree:
        case torch.Tensor():
            yield tree
        case tuple() | list():
            for each in tree:
                yield from tensors_in(each)
        case dict():
            yield from tensors_in(list(tree.values()))
        case _:
            yield from names_in(tree)


def key_of(value: Name | torch.Tensor) -> Hashable:
    """Return what a name, or a tensor from outside, is told from others by."""
    return value if isinstance(value, Name) else id(value)


def in_own_names(takes: Mapping[Hashable, Any], group: Sequence[Step], leaves: tuple[Name, ...]) -> Written:
    """Return the segment written with names of its own, which equal segments have alike."""
    own: dict[Hashable, Name] = {}
    for key in (*takes, *(name for step in group for name in names_in(step.result))):
        own.setdefault(key, Name(len(own)))
    steps = [
        Step(_renamed(step.result, own), step.function, _renamed(step.args, own), _renamed(step.kwargs, own))
        for step in group
    ]
    return written([own[key] for key in takes], steps, _renamed(leaves, own))


def _renamed(tree: Any, own: Mapping[Hashable, Name]) -> Any:
    match tree:
        case Name() | torch.Tensor():
            return own[key_of(tree)]
        case tuple() if type(tree) is tuple:
            return tuple(_renamed(each, own) for each in tree)
        case list():
            return [_renamed(each, own) for each in tree]
        case dict():
            return {key: _renamed(each, own) for key, each in tree.items()}
        case slice():
            return slice(*(_renamed(each, own) for each in (tree.start, tree.stop, tree.step)))
    return tree


def what_it_is(function: Written) -> Hashable:
    """Return what equal segments have in common: their text, and the constants in it."""
    return function.text, tuple(map(_identity, function.constants))


def _identity(constant: Any) -> Hashable:
    return (type(constant), constant) if isinstance(constant, Hashable) else id(constant)
