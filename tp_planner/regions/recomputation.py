"""Recomputation: what the forward pass does not keep runs again in the backward pass, under the same plan.

``keras.RematScope``, ``keras.remat`` and modules of torch all call ``torch.utils.checkpoint.checkpoint``. When autograd
runs such a function again, maybe on a thread of its own, the layer calls around it have ended long ago. So they are
noted when it first runs, and opened again: their layers read variables, cross boundaries and change functions as then.
So is what Keras knows of its own calls, where the autocast scope and ``training`` come from; and seeds that the
function drew are drawn again, or dropout would have another mask backward than forward.

Where such functions call each other, the inner one keeps what it is given for as long as it can run again, but for what
torch sees among its arguments: a plain tensor in its place, which the outer one makes again. So all tensors that are
given are shown to torch like this, and Keras's masks on them, which those that are made again do not have.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import torch
import torch.utils.checkpoint
from keras.src.backend.common.global_state import get_global_attribute, set_global_attribute
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from tp_planner.frontend.failed_checkpoints import ending_what_failed
from tp_planner.patches import wrap_for_good
from tp_planner.regions.calls import Frame, running

OF_KERAS = ("autocast_scope", "current_call_ctx")  # what Keras knows of the calls that are running, in this thread


class NotKept(Exception):
    """What was asked for is not kept: it would be computed again from ``inputs``, which are."""

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__("this tensor would be computed again")
        self.inputs = inputs


@dataclass(frozen=True)
class OpenCalls:
    """The layer calls of parallel models that are running, innermost last, and the layers inside whose calls they are.

    ``functions`` is how often the innermost layer's code has called each of the torch functions that are counted,
    ``of_keras`` what Keras knows of the calls, by name, ``stream_is_whole`` how they have the residual stream, and
    ``keeping`` the model whose call is for its loss, if one is.
    """

    frames: tuple[Frame, ...]
    scopes: Counter[tuple[int, str]]
    functions: Counter[str] | None
    of_keras: Mapping[str, Any]
    stream_is_whole: bool
    keeping: int | None

    @classmethod
    def now(cls) -> OpenCalls:
        """Return those of this thread."""
        frames = tuple(frame.copy() for frame in running.frames)
        watched = frames[-1].functions if frames else None
        of_keras = {name: copy.copy(get_global_attribute(name)) for name in OF_KERAS}
        functions = None if watched is None else watched.counts.copy()
        return cls(frames, running.scopes.copy(), functions, of_keras, running.stream_is_whole, running.keeping)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, they are what is running on this thread."""
        frames = [frame.copy() for frame in self.frames]
        before = running.frames, running.scopes, running.entered, running.watching, running.recomputable
        gathered, running.gathered = running.gathered, {}
        stream, running.stream_is_whole = running.stream_is_whole, self.stream_is_whole
        keeping, running.keeping = running.keeping, self.keeping
        running.frames, running.scopes, running.entered = frames, self.scopes.copy(), WeakTensorKeyDictionary()
        running.watching, running.recomputable = int(self.functions is not None), True
        try:
            with self._known_to_keras(), contextlib.ExitStack() as stack:
                for frame in frames:
                    stack.enter_context(frame.changed())
                if self.functions is not None:
                    frames[-1].functions = frames[-1].functions.again(frames[-1], self.functions)
                    stack.enter_context(frames[-1].functions)
                yield
        finally:
            running.frames, running.scopes, running.entered, running.watching, running.recomputable = before
            running.stream_is_whole, running.keeping, running.gathered = stream, keeping, gathered

    @contextlib.contextmanager
    def _known_to_keras(self) -> Iterator[None]:
        before = {name: get_global_attribute(name) for name in OF_KERAS}
        try:
            for name, value in self.of_keras.items():
                set_global_attribute(name, copy.copy(value))
            yield
        finally:
            for name, value in before.items():
                set_global_attribute(name, value)


class _Seeds:
    """The seeds that a function draws when it first runs, to be drawn again when it runs again."""

    def __init__(self) -> None:
        self._drawn: list[torch.Tensor] = []

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, what is drawn is noted."""
        outer = running.draw

        def draw(plain: Callable[[], torch.Tensor]) -> torch.Tensor:
            self._drawn.append(outer(plain))
            return self._drawn[-1]

        with _drawing(draw):
            yield

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the same seeds are drawn, in the same order."""
        left = iter(self._drawn)
        with _drawing(lambda plain: next(left)):
            yield


@contextlib.contextmanager
def _drawing(draw: Callable[[Callable[[], torch.Tensor]], torch.Tensor]) -> Iterator[None]:
    before, running.draw = running.draw, draw
    try:
        yield
    finally:
        running.draw = before


class _Arguments:
    """A function's arguments, but for the tensors in them and the masks that Keras has put on these."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        leaves, self._structure = tree_flatten((args, kwargs))
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        masks = {place: get_keras_mask(tensor) for place, tensor in enumerate(self.tensors)}
        self._masked = [place for place, mask in masks.items() if isinstance(mask, torch.Tensor)]
        self.tensors += [masks[place] for place in self._masked]
        self._leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def taken(self) -> list[torch.Tensor]:
        """Return the tensors and their masks, which are nowhere in here from then on."""
        tensors, self.tensors = self.tensors, []
        return tensors

    def filled(self, tensors: Sequence[torch.Tensor]) -> tuple[Any, Any]:
        """Return the arguments with these tensors and masks."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=False):
            leaves[place] = tensor
        for place, mask in zip(self._masked, tensors[len(self._places) :], strict=True):
            if get_keras_mask(tensors[place]) is None:
                set_keras_mask(tensors[place], mask)
        args, kwargs = tree_unflatten(leaves, self._structure)
        return args, kwargs


class _RunsAgain:
    """A function that first runs in the forward pass, and from then on in the backward pass."""

    def __init__(self, function: Callable[..., Any], arguments: _Arguments) -> None:
        self._function, self._arguments = function, arguments
        self._open: OpenCalls | None = None
        self._seeds = _Seeds()

    def __call__(self, *tensors: torch.Tensor) -> Any:
        if running.looking is not None:
            raise NotKept(list(tensors))
        args, kwargs = self._arguments.filled(tensors)
        if self._open is None:
            self._open = OpenCalls.now()
            with _keeping_nothing_but(tensors), self._seeds.noted():
                return self._function(*args, **kwargs)
        # Keras leaves tensors in reference cycles. What ran again before this keeps its whole graph by one of them.
        gc.collect(1)
        with self._open.again(), self._seeds.again(), _errors_as_they_are():
            return self._function(*args, **kwargs)


@contextlib.contextmanager
def _keeping_nothing_but(inputs: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, a function runs for the first time; of what crosses into regions, nothing but ``inputs`` outlives it."""
    before = running.recomputable, running.entered, running.gathered
    entered = WeakTensorKeyDictionary()
    for tensor in inputs:
        entered[tensor] = running.entered.setdefault(tensor, {})
    running.recomputable, running.entered, running.gathered = True, entered, {}
    try:
        yield
    finally:
        running.recomputable, running.entered, running.gathered = before


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

    Wraps that function and the draws of Keras's seed generators, once; outside such calls they do what they did.
    """
    wrap_for_good(torch.utils.checkpoint, "checkpoint", _following, "what runs again does so in its layer calls")
    wrap_for_good(keras.random.SeedGenerator, "next", _drawing_again, "what runs again draws the same seeds")


def _following(plain: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(plain).parameters.values()
    of_torch = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY} | {"preserve_rng_state"}

    @functools.wraps(plain)
    def checkpoint(function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        with ending_what_failed():
            if function is None or not running.scopes:
                return plain(function, *args, **kwargs)
            options = {name: kwargs.pop(name) for name in of_torch & kwargs.keys()}
            arguments = _Arguments(args, kwargs)
            return plain(_RunsAgain(function, arguments), *arguments.taken(), **options)

    return checkpoint


def _drawing_again(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(plain)
    def next_seed(self: keras.random.SeedGenerator, ordered: bool = True) -> torch.Tensor:
        return running.draw(functools.partial(plain, self, ordered))

    return next_seed
