"""Left out: tensors that autograd does not keep for the backward pass, because they can be made again there.

While a layer's call runs whose tensors are watched, what it would keep of them is replaced by a note of how to make
them. Some are made again by communicating, so when that happens depends on what the layer's code does, which is the
same on all ranks, and on nothing that may still be alive on one of them.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import torch
from torch.distributed.tensor import DTensor

from tp_planner.regions.calls import running


class Source(Protocol):
    """What a tensor can be made of again: what is ``kept`` for that, without gradient history."""

    @property
    def kept(self) -> Sequence[torch.Tensor]: ...

    def whole(self) -> torch.Tensor:
        """Return the tensor, made anew."""
        ...


class LeftOut:
    """One tensor that is left out of what autograd keeps, made again for the first of those who ask for it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._left_out = 0  # how many tensors are left out of what autograd keeps
        self._put_back = 0  # how many of them the running backward pass has asked for
        self._whole: torch.Tensor | None = None  # from the first of these to the last

    @property
    def is_left_out(self) -> bool:
        """Whether autograd will ask for the tensor."""
        return self._left_out > 0

    def leave_out(self) -> None:
        """Note that autograd will ask for the tensor once more."""
        self._left_out += 1

    def put_back(self) -> torch.Tensor:
        """Return the tensor for one of those that were left out."""
        whole = self.whole()
        self._put_back += 1
        self._whole = whole
        if self._put_back == self._left_out:
            self.let_go()
        return whole

    def whole(self) -> torch.Tensor:
        """Return the tensor for another that is made of it."""
        return self.source.whole() if self._whole is None else self._whole

    def let_go(self) -> None:
        """Make the tensor anew for the next who asks for it."""
        self._put_back, self._whole = 0, None


@dataclass(frozen=True, slots=True)
class View:
    """A view of a tensor that is left out."""

    of: LeftOut
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any

    def on(self, whole: torch.Tensor) -> torch.Tensor:
        """Return it as a view of that tensor, made again."""
        return whole.as_strided(self.size, self.stride, self.offset)


class Undecided:
    """What autograd keeps of a function that is running, which may be what it returns."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.kept: torch.Tensor | View = tensor

    def decide(self) -> None:
        """Leave the tensor out if it can be made again."""
        assert isinstance(self.kept, torch.Tensor)
        self.kept = _leave_out(self.kept)


class _Running(threading.local):
    def __init__(self) -> None:
        self.undecided: list[Undecided] | None = None
        self.known: dict[int, tuple[LeftOut, int, weakref.ref[Any]]] = {}  # by storage, as long as that is there


_running = _Running()


def can_be_made_again(tensor: torch.Tensor, left_out: LeftOut) -> None:
    """Let watched calls leave a tensor out of what autograd keeps."""
    storage, known = tensor.untyped_storage(), _running.known
    key = storage._cdata
    version = 0 if tensor.is_inference() else tensor._version
    known[key] = left_out, version, weakref.ref(storage, lambda _: known.pop(key, None))


def cannot_be_made_again(tensor: torch.Tensor) -> None:
    """Let autograd keep a tensor from now on."""
    _running.known.pop(tensor.untyped_storage()._cdata, None)


def as_left_out(tensor: torch.Tensor) -> View | None:
    """Return the tensor as a view of what can be made again; None if it has to be kept."""
    if isinstance(tensor, DTensor) or tensor.untyped_storage()._cdata not in _running.known:
        return None
    left_out, version, _ = _running.known[tensor.untyped_storage()._cdata]
    if tensor._version != version:  # what code has written into it would not be there again
        return None
    return View(left_out, tensor.shape, tensor.stride(), tensor.storage_offset())


@contextlib.contextmanager
def deciding_later() -> Iterator[list[Undecided]]:
    """Inside, what watched calls keep is added to a list, if it cannot be made again; when more is known it may be."""
    before, _running.undecided = _running.undecided, []
    try:
        yield _running.undecided
    finally:
        _running.undecided = before


def watching() -> contextlib.AbstractContextManager[None]:
    """Return a context inside which autograd keeps nothing that can be made again.

    It changes nothing inside of hooks that say what is kept: these, or those of somebody who keeps it elsewhere.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # True: also where torch traces
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def watch_calls(layer: keras.Layer) -> list[Any]:
    """Watch what the layer's calls keep for the backward pass; return handles that end this."""
    open_calls: list[object] = []

    def begin(layer: keras.Layer, args: Any) -> None:
        call, hooks = object(), contextlib.ExitStack()
        if not running.recomputable:  # of a call that the backward pass runs again nothing is kept
            hooks.enter_context(watching())
        open_calls.append(call)
        running.open[call] = hooks.close

    def end(layer: keras.Layer, args: Any, output: Any) -> None:
        if open_calls and (close := running.open.pop(open_calls.pop(), None)) is not None:
            close()

    before = layer.register_forward_pre_hook(begin)
    after = layer.register_forward_hook(end, always_call=True)
    return [before, after]


def _pack(tensor: torch.Tensor) -> torch.Tensor | View | Undecided:
    kept = _leave_out(tensor)
    if _running.undecided is None or isinstance(kept, View):
        return kept
    _running.undecided.append(Undecided(tensor))
    return _running.undecided[-1]


def _leave_out(tensor: torch.Tensor) -> torch.Tensor | View:
    view = as_left_out(tensor)
    if view is None:
        return tensor
    view.of.leave_out()
    return view


def _unpack(packed: torch.Tensor | View | Undecided) -> torch.Tensor:
    kept = packed.kept if isinstance(packed, Undecided) else packed
    if isinstance(kept, torch.Tensor):
        return kept
    if running.looking is not None:
        running.looking += kept.of.source.kept
        return kept.of.source.kept[0]
    return kept.on(kept.of.put_back())
