"""Pieces: what a training step computes beside the model's call, replayed where all of it is Keras's own.

Losses, metrics and updates are a few torch functions each, and much of Keras's Python around them. A program makes the
very functions that the code made, so that results are the same to the bit, whoever has asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from tp_planner.replay.automatic import Automatic, Written
from tp_planner.replay.once import once_without_gradients
from tp_planner.replay.tape import Tape
from tp_planner.replay.taped_calls import Given, Programs, Run, Sort
from tp_planner.storage.log import logger


class Piece:
    """Calls of one function, which differ in their arguments and in what ``look`` says.

    Args:
        what: what is called, in words.
        look: returns what programs have written into them, as it is now, or why there may be none.
        asked: whether somebody has asked for it.
    """

    def __init__(self, what: str, look: Callable[[], Written | str], asked: bool) -> None:
        self._programs = Programs(asked or "auto", what, logger.info, rewrite=once_without_gradients)
        self._automatic = Automatic(what, look, self._programs.forget, asked)

    def call(self, function: Callable[..., Any], *args: Any, other: Hashable = None) -> Any:
        """Return what the function returns, and do what it does; ``other`` is what else makes calls differ."""
        given = Given(args, {}, other)
        sort = given.sort
        if sort is None or not self._programs.may_have(sort) or not self._automatic.lets(sort):
            return function(*args)
        if self._programs.has(sort):
            return self.run(sort, given.tensors)
        return self._programs.tape(sort, given, function, self._look_for_what_stays)

    def run(self, sort: Sort, tensors: Sequence[torch.Tensor]) -> Any:
        """Return what the program of a sort makes of these tensors."""
        return self._programs.run(sort, tensors)

    def has_run(self, run: Run) -> bool:
        """Whether a run of a program is of a call."""
        return run.programs is self._programs

    def may_run(self) -> bool:
        """Whether programs that there are may run now."""
        return self._automatic.lets_all()

    def _look_for_what_stays(self, tape: Tape, output: Any) -> None:
        if self._automatic.has_changed():
            tape.fail("it changes what it holds")
