"""Recomputation: what the forward pass does not keep runs again in the backward pass, under the same plan.

``keras.RematScope``, ``keras.remat`` and modules of torch all call ``torch.utils.checkpoint.checkpoint``. When autograd
runs such a function again, maybe on a thread of its own, the layer calls around it have ended long ago. So they are
noted when it first runs, and opened again: their layers read variables, cross boundaries and change functions as then.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import torch
import torch.utils.checkpoint
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from tp_planner.regions.calls import Frame, running


class NotKept(Exception):
    """What was asked for is not kept: it would be computed again from ``inputs``, which are."""

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__("this tensor would be computed again")
        self.inputs = inputs


@dataclass(frozen=True)
class OpenCalls:
    """The layer calls of parallel models that are running, innermost last, and the layers inside whose calls they are.

    ``functions`` is how often the innermost layer's code has called each of the torch functions that are counted.
    """

    frames: tuple[Frame, ...]
    scopes: Counter[tuple[int, str]]
    functions: Counter[str] | None

    @classmethod
    def now(cls) -> OpenCalls:
        """Return those of this thread."""
        frames = tuple(frame.copy() for frame in running.frames)
        watched = frames[-1].functions if frames else None
        return cls(frames, running.scopes.copy(), None if watched is None else watched.counts.copy())

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, they are what is running on this thread."""
        frames = [frame.copy() for frame in self.frames]
        before = running.frames, running.scopes, running.entered, running.watching, running.recomputable
        running.frames, running.scopes, running.entered = frames, self.scopes.copy(), WeakTensorKeyDictionary()
        running.watching, running.recomputable = int(self.functions is not None), True
        try:
            with contextlib.ExitStack() as stack:
                for frame in frames:
                    stack.enter_context(frame.changed())
                if self.functions is not None:
                    frames[-1].functions = frames[-1].functions.again(frames[-1], self.functions)
                    stack.enter_context(frames[-1].functions)
                yield
        finally:
            running.frames, running.scopes, running.entered, running.watching, running.recomputable = before


class _RunsAgain:
    """A function that first runs in the forward pass, and from then on in the backward pass."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._open: OpenCalls | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        if running.looking:
            raise NotKept(inputs)
        if self._open is None:
            self._open = OpenCalls.now()
            with _keeping_nothing_but(inputs):
                return self._function(*args, **kwargs)
        # Keras leaves tensors in reference cycles. What ran again before this keeps its whole graph by one of them.
        gc.collect(1)
        with self._open.again(), _errors_as_they_are():
            return self._function(*args, **kwargs)


@contextlib.contextmanager
def _keeping_nothing_but(inputs: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, a function runs for the first time; of what crosses into regions, nothing but ``inputs`` outlives it."""
    before = running.recomputable, running.entered
    entered = WeakTensorKeyDictionary()
    for tensor in inputs:
        entered[tensor] = running.entered.setdefault(tensor, {})
    running.recomputable, running.entered = True, entered
    try:
        yield
    finally:
        running.recomputable, running.entered = before


@contextlib.contextmanager
def _errors_as_they_are() -> Iterator[None]:
    """Inside, Keras does not raise errors anew in each layer.

    It does so in frames that the error then holds on to. Torch ends what runs again by an error, as soon as it has all
    that it needs, which would keep every tensor that was computed again.
    """
    filters = keras.config.is_traceback_filtering_enabled()
    keras.config.disable_traceback_filtering()
    try:
        yield
    finally:
        if filters:
            keras.config.enable_traceback_filtering()


def follow_recomputation() -> None:
    """Let what runs inside a parallel model's call under torch's ``checkpoint`` run again as it ran at first.

    Wraps that function, once; outside such calls it does what it did.
    """
    if not hasattr(torch.utils.checkpoint.checkpoint, "follows"):
        torch.utils.checkpoint.checkpoint = _following(torch.utils.checkpoint.checkpoint)


def _following(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return plain(_RunsAgain(function) if running.scopes else function, *args, **kwargs)

    checkpoint.follows = True  # type: ignore[attr-defined]
    return checkpoint
