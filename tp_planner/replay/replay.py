"""Replay: calls of a model from their tape instead of its layers' code; ``jit_compile=True`` asks for it.

Keras's default lets it be done, which ``automatic.py`` is about.

A program makes the same torch functions, boundaries and collectives; ``taped_calls.py`` has those of one method.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import torch

from tp_planner.regions.functions import changed_already
from tp_planner.regions.left_out import watching
from tp_planner.replay.automatic import Automatic, State, foreign_code
from tp_planner.replay.in_place import with_sums_in_place
from tp_planner.replay.once import once_without_gradients
from tp_planner.replay.program import Step, Writing, compiled
from tp_planner.replay.reads import with_reads_together
from tp_planner.replay.rewrites import Rewriting, rewritten, with_the_same_bits
from tp_planner.replay.taped_calls import Given, Programs, Run, Sort
from tp_planner.replay.what_stays import Attributes, look_for_what_stays
from tp_planner.storage.log import logger

# The methods whose calls may be replayed, of those that a model has; of KerasHub's tasks those that generate a token.
REPLAYED = ("call", "call_with_cache", "call_decoder_with_cache")


def replaying(
    model: keras.Model,
    method: str,
    layers: Mapping[str, keras.Layer],
    makes_again: bool = False,
    in_parts: bool = False,
    write: Writing = compiled,
    automatic: bool = False,
) -> Callable[..., Any]:
    """Return what replaces a method of a model, one of ``REPLAYED``.

    Args:
        model: a parallel model.
        method: the method's name.
        layers: the model's layers by name.
        makes_again: whether what is gathered of the residual stream, or cast, is not to be kept for the backward pass.
        in_parts: whether that holds for weights, too; the plan says what of them is kept by what the code keeps.
        write: makes programs of steps.
        automatic: whether nobody has asked for it.
    """
    plain = getattr(model, method)
    what = f"model {model.name!r}" if method == "call" else f"{method} of model {model.name!r}"
    asked = "auto" if automatic else model.jit_compile  # which Keras changes while it calls models
    rewrite = once_without_gradients if in_parts else with_the_same_bits if automatic else rewritten
    if write is compiled:  # others hold what they will read again where nobody sees it
        rewrite = functools.partial(_with_less_to_do_on_the_way_back, rewrite)
    programs = Programs(asked, what, logger.info if automatic else logger.warning, write, rewrite)
    unasked = _unasked(what, layers, programs) if automatic else None
    replayed = Replayed(programs, unasked, watches=makes_again or in_parts)

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = Given(args, kwargs)
        sort = given.sort
        if sort is None or not programs.may_have(sort):
            return plain(*args, **kwargs)
        if unasked is not None and (model.run_eagerly or not unasked.lets(sort)):
            return plain(*args, **kwargs)
        if programs.has(sort):
            return replayed.run(sort, given.tensors)
        before = Attributes(layers)
        return programs.tape(sort, given, plain, lambda tape, output: look_for_what_stays(tape, before, layers, output))

    call.replayed = replayed  # type: ignore[attr-defined]
    return call


class Replayed:
    """The programs of one method of a model.

    Args:
        programs: these.
        unasked: says when they may run; None if somebody has asked for it.
        watches: whether what can be made again is not to be kept for the backward pass.
    """

    def __init__(self, programs: Programs, unasked: Automatic | None, watches: bool) -> None:
        self._programs, self._unasked, self._watches = programs, unasked, watches

    def run(self, sort: Sort, tensors: Sequence[torch.Tensor]) -> Any:
        """Return what the program of a sort makes of these tensors."""
        with changed_already(), watching() if self._watches else contextlib.nullcontext():
            return self._programs.run(sort, tensors)

    def has_run(self, run: Run) -> bool:
        """Whether a run of a program is of this method."""
        return run.programs is self._programs

    def may_run(self) -> bool:
        """Whether programs that there are may run now."""
        return self._unasked is None or self._unasked.lets_all()


def _with_less_to_do_on_the_way_back(rewrite: Rewriting, steps: Sequence[Step], output: Any) -> list[Step]:
    return with_sums_in_place(with_reads_together(rewrite(steps, output)), output)


def _unasked(what: str, layers: Mapping[str, keras.Layer], programs: Programs) -> Automatic:
    return Automatic(
        what,
        lambda: foreign_code(layers) or State(layers),
        programs.forget,
        instead="; model.compile(..., jit_compile=True) has it replayed",
    )
