"""What is running: layer calls, how each reads its variables, which regions are open, where a collective stands."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

Reader = Callable[[Any], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Site:
    """Where the plan has a collective: at a layer ("" for none), and at which place there; whether it starts early.

    One that is ``moved`` starts elsewhere in a real step than in a simulated one.
    """

    layer: str
    place: str
    early: bool = False
    moved: bool = False


METRICS = Site("", "metrics")  # what they and losses communicate depends on how the model is compiled: in no plan


class Frame:
    """One running call: whose it is, a reader for each variable it uses, what its hooks keep until it returns."""

    __slots__ = ("alone", "cache", "changed", "functions", "kept", "owner", "readers", "undo")

    def __init__(self, owner: object, readers: dict[int, Reader], alone: bool = False) -> None:
        self.owner, self.readers = owner, readers
        self.alone = alone  # whether it works on whole tensors, outside of the region that the plan has it in
        self.functions: Any = None  # the mode that watches the layer's own code
        self.changed: Callable[[], AbstractContextManager[None]] = nullcontext  # what the layer is while it runs
        self.cache: dict[tuple[Any, ...], torch.Tensor] = {}
        self.kept: Any = None
        self.undo: list[Callable[[], object]] = []  # what gives back what the call has changed, last change last

    def leave(self) -> None:
        """Give back what the call has changed; what it has read goes with it, for nothing knows it any more."""
        while self.undo:
            self.undo.pop()()
        self.functions = None

    def copy(self) -> Frame:
        """Return the call as it is now; what is read in the copy is not read in the call."""
        copied = Frame(self.owner, self.readers, self.alone)
        copied.functions, copied.changed, copied.cache = self.functions, self.changed, dict(self.cache)
        return copied

    def forget(self, variable: int) -> None:
        """Read a variable anew the next time, for it has another value."""
        for key in [key for key in self.cache if key[0] == variable]:
            del self.cache[key]


def run_at_once(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what the function returns."""
    return function(*args, **kwargs)


def ignore(*_: object) -> None:
    """Do nothing."""


class _Running(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.guarded = False  # whether a call runs that ends all that calls inside of it leave open
        self.open: dict[object, Callable[[], object]] = {}  # what ends what calls have begun beside their frames
        self.watching = 0  # how many running calls have their own code watched
        self.scopes: Counter[tuple[int, str]] = Counter()
        self.entered: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.gathered: dict[Hashable, Any] = {}  # what was put together over the batch axis and is not all read yet
        self.started: dict[Hashable, Any] = {}  # what was begun to be put together before it is read
        self.parts: Any = None  # what was put together last, of all that is so in turn
        self.values: str = "dtensor"
        self.stream_is_whole = True  # whether every rank has the whole residual stream; in planned calls a shard
        self.indivisible = 0  # the length of a sequence that was to be sharded, and cannot be
        self.updating = False  # whether an optimizer applies gradients
        self.loss_of: int | None = None  # the model whose training or test step runs, by id
        self.keeping: int | None = None  # that model while it is called: what its loss reads stays in shards
        self.for_metrics = False  # whether what is computed now is for metrics
        self.gathered_for_metrics: Callable[[int], None] = ignore  # told of the bytes of what they read whole
        self.updated_alone: torch.Tensor | None = None  # what an optimizer updates, where that is but one variable
        self.site: Site | None = None  # where the collectives that run now stand in the plan
        self.recomputable = False  # whether the backward pass runs again what runs now, or is at it
        self.looking: list[torch.Tensor] | None = None  # takes what is kept in order to make again what is not
        self.converting: Callable[[], AbstractContextManager[None]] = nullcontext  # entered around every conversion
        self.draw: Callable[[Callable[[], torch.Tensor]], torch.Tensor] = run_at_once  # draws a seed
        self.run: Callable[..., Any] = run_at_once  # runs what a plan adds to a call: boundaries, reads

    def forget_what_crossed(self) -> None:
        """Let go of what calls share: no call of a model is open any more."""
        self.entered.clear()
        self.gathered.clear()
        for uses in self.started.values():  # which this call has not read
            uses.wait()
        self.started.clear()
        self.parts = None


running = _Running()


def end_with_call(layer: Any) -> Callable[[], None]:
    """Let calls of the layer that are inside no other end what they have begun, if they fail; return what undoes this.

    torch tells its hooks of an exception only if it is no interrupt, and not at all while it traces.
    """
    layer.__dict__["_call_impl"] = MethodType(_call_and_end, layer)  # a method, which a copy has of its own
    return lambda: layer.__dict__.pop("_call_impl", None)


def _call_and_end(layer: Any, *args: Any, **kwargs: Any) -> Any:
    if running.guarded:
        return type(layer)._call_impl(layer, *args, **kwargs)
    return _call_from_outside(layer, *args, **kwargs)


# In what users compile, its graph would break at each hook, and what lies between be compiled.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _call_from_outside(layer: Any, *args: Any, **kwargs: Any) -> Any:
    frames, opened, scopes, watching = len(running.frames), len(running.open), +running.scopes, running.watching
    running.guarded = True
    try:
        return type(layer)._call_impl(layer, *args, **kwargs)
    except BaseException:
        while len(running.frames) > frames:
            running.frames.pop().leave()
        while len(running.open) > opened:
            running.open.popitem()[1]()
        running.scopes, running.watching = scopes, watching
        if not scopes:
            running.started.clear()  # others may have failed too, and not send what would be waited for
            running.forget_what_crossed()
        raise
    finally:
        running.guarded = False


@contextmanager
def standing_at(site: Site | None) -> Iterator[None]:
    """Inside, collectives are those that the plan has at ``site``."""
    before, running.site = running.site, site
    try:
        yield
    finally:
        running.site = before


@contextmanager
def stream_in_shards() -> Iterator[None]:
    """Inside, ranks have shards of the residual stream, where the plan has it so."""
    running.stream_is_whole = False
    try:
        yield
    finally:
        running.stream_is_whole = True


@contextmanager
def in_a_step_of(model: object) -> Iterator[None]:
    """Inside, a step of the model runs: what its call returns is for its loss and its metrics."""
    before, running.loss_of = running.loss_of, id(model)
    try:
        yield
    finally:
        running.loss_of, running.keeping = before, None


@contextmanager
def for_metrics(gathered: Callable[[int], None] = ignore) -> Iterator[None]:
    """Inside, metrics are computed; ``gathered`` is told of the bytes of all that they read whole."""
    before = running.for_metrics, running.gathered_for_metrics
    running.for_metrics, running.gathered_for_metrics = True, gathered
    try:
        yield
    finally:
        running.for_metrics, running.gathered_for_metrics = before


@contextmanager
def reading_local_values() -> Iterator[None]:
    """Inside, ``variable.value`` of a sharded variable is this rank's plain shard, without gradient."""
    before, running.values = running.values, "local"
    try:
        yield
    finally:
        running.values = before


@contextmanager
def looking_at_what_is_kept() -> Iterator[list[torch.Tensor]]:
    """Inside, what is kept for the backward pass can be read, and nothing is made again for that.

    Yields a list, to which what something can be made of is added when that is read.
    """
    before, running.looking = running.looking, []
    try:
        yield running.looking
    finally:
        running.looking = before
