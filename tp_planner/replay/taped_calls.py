"""Taped calls: the programs of one function, by sort of call: shapes, dtypes, training or not.

Of each sort the first two calls are taped: what they call makes what it keeps in the first. The others run the second
tape's program, if code did the same in both, and left nothing behind that it did not before; else a third is taped.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import torch
from keras.src.backend.common import global_state
from keras.src.backend.common.variables import get_autocast_scope
from torch.utils._pytree import tree_flatten, tree_unflatten

from tp_planner.frontend.calling import leaves_no_trace
from tp_planner.regions.calls import run_at_once, running
from tp_planner.replay.program import Program, Step, Writing, compiled
from tp_planner.replay.rewrites import Rewriting, rewritten
from tp_planner.replay.same_steps import difference
from tp_planner.replay.tape import Tape

MOST_CALLS = 3  # of one sort that are taped
MOST_PROGRAMS = 64  # of one function; further sorts of calls run as ever
MOST_SORTS = 1000
PLAIN_ARGUMENTS = (bool, int, float, str, type(None))
_LEAVES = frozenset({torch.Tensor, *PLAIN_ARGUMENTS})


class Sort:
    """What calls with the same program have in common. It takes long to hash, and is asked for it often."""

    __slots__ = ("_hash", "_parts")

    def __init__(self, *parts: Hashable) -> None:
        self._parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sort) and self._parts == other._parts


_sorts: dict[Sort, Sort] = {}  # those met last, so that equal ones are the same


class Given:
    """What a call is given: ``tensors`` are those of its arguments, each once.

    ``sort`` is None for a call that has no program. ``other`` is what beside its arguments makes it differ from others.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], other: Hashable = None) -> None:
        self._names = tuple(kwargs)
        leaves: Sequence[Any] = (*args, *kwargs.values())
        self._structure: Any = None  # that of arguments which hold others
        if not _LEAVES.issuperset(map(type, leaves)):
            leaves, self._structure = tree_flatten(leaves)
        self._leaves = [keras.ops.convert_to_tensor(leaf) if _is_numbers(leaf) else leaf for leaf in leaves]
        self.tensors = list({id(leaf): leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)}.values())
        self.sort = None if _is_special() else self._sort(other)

    def _sort(self, other: Hashable) -> Sort | None:
        forms = _forms(self._leaves, self.tensors)
        if forms is None:
            return None
        sort = Sort(self._names, self._structure, forms, _modes(), other)
        if len(_sorts) == MOST_SORTS:
            _sorts.clear()
        return _sorts.setdefault(sort, sort)

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments again, numbers of arrays as tensors."""
        leaves = self._leaves if self._structure is None else tree_unflatten(self._leaves, self._structure)
        given = len(leaves) - len(self._names)
        return tuple(leaves[:given]), dict(zip(self._names, leaves[given:], strict=True))


@dataclass(frozen=True, slots=True)
class Run:
    """A run of a program: whose it is, of which sort, what it was given and has made.

    ``autocast`` is the dtype in which it reads variables, ``stream_is_whole`` how it has the residual stream.
    """

    programs: Programs
    sort: Sort
    given: Sequence[torch.Tensor]
    output: Any
    autocast: str | None
    stream_is_whole: bool


class _Noted(threading.local):
    runs: list[Run] | None = None


_noted = _Noted()


@contextlib.contextmanager
def noting_runs() -> Iterator[list[Run]]:
    """Inside, runs of programs are added to a list."""
    before, _noted.runs = _noted.runs, []
    try:
        yield _noted.runs
    finally:
        _noted.runs = before


class Programs:
    """The programs of one function.

    Args:
        asked: what has asked for them, as ``jit_compile`` says it.
        what: what is called, in words.
        tell: logs why there is no program.
        write: makes programs of steps.
        rewrite: which steps programs are made of.
    """

    def __init__(
        self,
        asked: Any,
        what: str,
        tell: Callable[..., None],
        write: Writing = compiled,
        rewrite: Rewriting = rewritten,
    ) -> None:
        self._asked, self._what, self._tell, self._write, self._rewrite = asked, what, tell, write, rewrite
        self._programs: dict[Sort, Program] = {}
        self._taped: dict[Sort, list[Sequence[Step]]] = {}  # of the calls before
        self._refused: set[Sort] = set()

    def forget(self) -> None:
        """Let go of all of them."""
        for each in (self._programs, self._taped, self._refused):
            each.clear()

    def may_have(self, sort: Sort) -> bool:
        """Whether a call of this sort has a program, or may be taped."""
        return sort not in self._refused and (sort in self._taped or len(self._taped) < MOST_PROGRAMS)

    def has(self, sort: Sort) -> bool:
        """Whether a call of this sort has a program."""
        return sort in self._programs

    def run(self, sort: Sort, tensors: Sequence[torch.Tensor]) -> Any:
        """Return what the program of a sort makes of these tensors."""
        gradients = torch.is_grad_enabled()
        try:
            output = self._programs[sort](*tensors)
        except BaseException:
            torch._C._set_grad_enabled(gradients)  # the program may have switched them off
            raise
        if _noted.runs is not None:
            scope = get_autocast_scope()
            dtype = None if scope is None else scope.dtype
            _noted.runs.append(Run(self, sort, tensors, output, dtype, running.stream_is_whole))
        return output

    def tape(self, sort: Sort, given: Given, function: Callable[..., Any], look: Callable[[Tape, Any], None]) -> Any:
        """Return what the function makes of a call; if it is not the first of its sort, write its program.

        ``look`` lets the tape fail if the call has left anything but its output, which it is given.
        """
        args, kwargs = given.arguments
        with Tape(given.tensors) as tape:
            output = function(*args, **kwargs)
        calls = self._taped.setdefault(sort, [])
        if calls:
            look(tape, output)
            self._write_program(sort, calls, tape, output)
        calls.append(tape.steps)
        if sort in self._programs or sort in self._refused:
            calls.clear()
        return output

    def _write_program(self, sort: Sort, calls: Sequence[Sequence[Step]], tape: Tape, output: Any) -> None:
        other = difference(calls[-1], tape.steps)
        if other and len(calls) == MOST_CALLS - 1:
            tape.fail(f"code is not the same in each call: {other}")
        program = None if other else tape.program(output, self._write, self._rewrite)
        if tape.problem:
            self._refused.add(sort)
            self._tell("[ModelParallel] jit_compile=%r does nothing for %s: %s", self._asked, self._what, tape.problem)
        elif program is not None:
            self._programs[sort] = program


def _is_special() -> bool:
    """Whether a call is made for something else than its values here and now: for shapes, a tape, a recomputation."""
    in_backward = torch._C._current_graph_task_id() != -1
    transformed = torch._C._functorch.maybe_current_level() is not None  # by torch.func
    return leaves_no_trace() or in_backward or transformed or running.run is not run_at_once


def _is_numbers(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf"


def _forms(leaves: Sequence[Any], tensors: Sequence[torch.Tensor]) -> Hashable | None:
    """Return what calls with the same program have in common of their arguments; None if nothing is known of one.

    Args:
        leaves: the arguments, flattened.
        tensors: those of them that are tensors, each once.
    """
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    parts: list[Hashable] = []
    for leaf in leaves:
        if type(leaf) is torch.Tensor and not hasattr(leaf, "_keras_mask"):
            form = leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
            parts.append((places[id(leaf)], form))
        elif type(leaf) in PLAIN_ARGUMENTS:
            parts.append((type(leaf), leaf))
        else:
            return None
    return tuple(parts)


def _modes() -> Hashable:
    """Return what changes what functions do."""
    scope = get_autocast_scope()
    return (
        None if scope is None else scope.dtype,
        running.keeping is not None,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._is_any_autocast_enabled(),
        torch.get_default_dtype(),
        keras.config.floatx(),
        keras.config.is_flash_attention_enabled(),
        _call_context(),
    )


def _call_context() -> Hashable:
    """Return what layers are told by the calls around them, such as whether these are calls in training."""
    context = global_state.get_global_attribute("current_call_ctx")
    told = {} if context is None else {name: each for name, each in vars(context).items() if name != "entry_layer"}
    return tuple(sorted((name, repr(each)) for name, each in told.items()))
