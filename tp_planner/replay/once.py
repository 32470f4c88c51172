"""Once: what steps of a program compute of constants alone is computed when it is written, and what two of them make of
the same in one place.

Layers make positions, rotations and masks anew in each call, and equal ones in each layer: of a token's 600 steps, with
a cache, these are 400.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tp_planner.frontend.functions import function_name
from tp_planner.replay.program import Name, Step, names_in

SWITCH = torch._C._set_grad_enabled
MOST_KEPT = 2**12  # elements of a constant, which stays as long as its program
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_OUTSIDE = object()  # all tensors that are no steps' results


def once_without_gradients(steps: Sequence[Step], output: Any) -> list[Step]:
    """Return steps that compute the same to the bit, small constants not at all, and nothing twice without gradients.

    Gradients of what two steps make would be added up in another order where one makes it.
    """
    return computed_once(steps, output, gradients=False)


def computed_once(steps: Sequence[Step], output: Any, gradients: bool = True) -> list[Step]:
    """Return steps that compute the same, none of them twice, and no small constants.

    Without ``gradients`` those are made as often as before whose results autograd takes into account.
    """
    apart, known, constants = _apart(steps, output), dict[Name, Any](), dict[int, torch.Tensor]()
    made: dict[Hashable, Any] = {}
    result = []
    for step in steps:
        if step.function is SWITCH:
            made.clear()
        step = replace(step, args=_renamed(step.args, known), kwargs=_renamed(step.kwargs, known))
        names = list(names_in(step.result))
        may_be = step.alone and names and (gradients or not any(name.gradient for name in names))
        key = _key((step.args, step.kwargs), constants) if may_be else None
        if key is None or not apart.isdisjoint(names) or not apart.isdisjoint(step.uses()):
            result.append(step)
            continue
        key = step.function, key
        if key not in made and not any(step.uses()) and sum(math.prod(name.shape) for name in names) <= MOST_KEPT:
            with torch.no_grad():
                made[key] = step.function(*step.args, **step.kwargs)
            constants |= {id(each): each for each in _leaves(made[key])}
        if key in made:
            known |= zip(names, _leaves(made[key]), strict=True)
            continue
        made[key] = step.result
        result.append(step)
    return result


def _apart(steps: Sequence[Step], output: Any) -> set[Name]:
    """Return the names of what is changed, or returned, or a part of a tensor from outside, in whatever views."""
    memory = _Memory()
    changed: list[Any] = [_OUTSIDE]
    made: set[Name] = set()
    inputs: set[Name] = set()
    for step in steps:
        names = [*step.uses(), *names_in(step.result)]
        inputs |= set(step.uses()) - made
        made |= set(names)
        if step.views:
            given = _first_alone(step) or (step.args, step.kwargs)
            memory.join([*names_in((given, step.result)), *([_OUTSIDE] if _has_tensors(given) else [])])
        if step.changes:
            changed += names_in(_first_alone(step) or (step.args, step.kwargs, step.result))
    ends = {memory.of(each) for each in changed}
    if not ends.isdisjoint(map(memory.of, inputs)):  # one of which may be a view of another
        ends |= set(map(memory.of, inputs))
    ends |= set(map(memory.of, names_in(output)))
    return {name for name in made if memory.of(name) in ends}


def _first_alone(step: Step) -> tuple[Any, ...]:
    """Return the first argument of a function of torch's in place, which changes no other; of another none."""
    name = function_name(step.function)
    in_place = name == "__setitem__" or (name.endswith("_") and not name.startswith("_"))
    return step.args[:1] if in_place else ()


class _Memory:
    """Which names may lie in the same memory."""

    def __init__(self) -> None:
        self._next: dict[Any, Any] = {}

    def of(self, name: Any) -> Any:
        """Return one name for all that lie where this one does."""
        while name in self._next:
            name = self._next[name]
        return name

    def join(self, names: Sequence[Any]) -> None:
        """Note that these may lie in the same memory."""
        first = self.of(names[0])
        for each in names[1:]:
            other = self.of(each)
            if other != first:
                self._next[other] = first


def _has_tensors(tree: Any) -> bool:
    return any(isinstance(each, torch.Tensor) for each in _leaves(tree))


def _leaves(tree: Any) -> Iterator[Any]:
    """Yield what is in tuples, lists, dicts and slices, but for None."""
    match tree:
        case tuple() | list():
            for each in tree:
                yield from _leaves(each)
        case dict():
            yield from _leaves(list(tree.values()))
        case slice():
            yield from _leaves((tree.start, tree.stop, tree.step))
        case None:
            pass
        case _:
            yield tree


def _renamed(tree: Any, known: Mapping[Name, Any]) -> Any:
    match tree:
        case Name():
            return known.get(tree, tree)
        case tuple() if type(tree) is tuple:
            return tuple(_renamed(each, known) for each in tree)
        case list():
            return [_renamed(each, known) for each in tree]
        case dict():
            return {key: _renamed(each, known) for key, each in tree.items()}
        case slice():
            return slice(*(_renamed(each, known) for each in (tree.start, tree.stop, tree.step)))
    return tree


def _key(tree: Any, constants: Mapping[int, torch.Tensor]) -> Hashable | None:
    """Return what equal arguments have in common; None if they have more in them than names and plain constants."""
    parts: list[Hashable] = []
    match tree:
        case Name():
            return "name", tree.number
        case torch.Tensor():
            return ("constant", id(tree)) if id(tree) in constants else None
        case torch.Size():
            return torch.Size, *tree
        case tuple() | list() | slice():
            each_of = (tree.start, tree.stop, tree.step) if isinstance(tree, slice) else tree
            for each in each_of:
                if (part := _key(each, constants)) is None:
                    return None
                parts.append(part)
            return type(tree), *parts
        case dict():
            key = _key(list(tree.values()), constants)
            return None if key is None else (tuple(tree), key)
    plain = type(tree) in _PLAIN or tree is Ellipsis
    return (type(tree), repr(tree)) if plain else None  # 0.0 is no -0.0
