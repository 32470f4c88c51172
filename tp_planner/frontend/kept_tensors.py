"""Kept tensors: what layers keep from one call to the next in attributes of their own, beside their variables."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Set
from typing import Any

import keras
import torch
from torch._subclasses.fake_tensor import FakeTensor

from tp_planner.frontend.layer_tree import BOOKKEEPING, named_layers
from tp_planner.frontend.torch_modules import Wrapper

Holder = dict[Any, Any] | list[Any]
# They have tensors of their own, which are no others' to look after.
_APART = (keras.Variable, keras.Layer, torch.nn.Module, torch.Tensor, keras.random.SeedGenerator, type)
_PLAIN = frozenset((int, float, str, bool, bytes, type(None)))  # most of what layers hold


def kept_tensors(layer: keras.Layer) -> Iterator[torch.Tensor]:
    """Yield the tensors that the layer holds in attributes, in containers there, and in buffers of its torch module."""
    for holder in holders(layer):
        yield from (value for value in _values(holder) if isinstance(value, torch.Tensor))


@contextlib.contextmanager
def no_fakes_left(model: keras.Model, not_called: Set[str] = frozenset()) -> Iterator[None]:
    """Inside, the model runs on fake tensors; afterwards its layers keep none of them, but what they kept before.

    A layer that was built there, and has kept some, is to be built again. Layers that are ``not_called`` keep nothing.
    """
    called = [layer for name, layer in named_layers(model).items() if name not in not_called]
    unbuilt = [layer for layer in called if not layer.built]
    before = [(holder, holder.copy()) for layer in called for holder in holders(layer)]
    try:
        yield
    finally:
        for layer in unbuilt:
            if layer.built and any(isinstance(tensor, FakeTensor) for tensor in kept_tensors(layer)):
                layer.built = False
                layer._tracker.unlock()
        for holder, kept in before:
            _put_back(holder, kept)


def _put_back(holder: Holder, kept: Holder) -> None:
    """Take fakes out of a holder. What it held before is as it was, for containers in it are holders, too."""
    if isinstance(holder, list):
        assert isinstance(kept, list)
        is_same = len(holder) == len(kept) and all(map(operator.is_, holder, kept))
        if not is_same and any(map(_has_fakes, holder)):
            holder[:] = kept
        return
    assert isinstance(kept, dict)
    if len(holder) == len(kept) and all(map(operator.is_, holder.values(), kept.values())):
        return
    new = [(key, value) for key, value in holder.items() if key not in kept or value is not kept[key]]
    for key in [key for key, value in new if key not in BOOKKEEPING and _has_fakes(value)]:
        if key in kept:
            holder[key] = kept[key]
        else:
            del holder[key]


def _has_fakes(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_has_fakes, value))
    return isinstance(value, FakeTensor) or any(
        isinstance(each, FakeTensor) for holder in _below(value, set()) for each in _values(holder)
    )


def holders(layer: keras.Layer) -> Iterator[Holder]:
    """Yield what holds the layer's attributes, and the containers among them."""
    seen: set[int] = set()
    yield vars(layer)
    own = [value for name, value in vars(layer).items() if name not in BOOKKEEPING and type(value) not in _PLAIN]
    for value in own:
        if not isinstance(value, _APART):
            yield from _below(value, seen)
    if isinstance(layer, Wrapper):
        for module in layer.module.modules():
            yield from _below(vars(module), seen)


def _below(value: Any, seen: set[int]) -> Iterator[Holder]:
    """Yield the dicts and lists that a value is or holds, each once; of an object of plain Python, its attributes."""
    if type(value) in _PLAIN or id(value) in seen or isinstance(value, _APART):
        return
    seen.add(id(value))
    if isinstance(value, tuple):
        for each in value:
            yield from _below(each, seen)
    elif isinstance(value, dict | list):
        yield value
        for each in _values(value):
            yield from _below(each, seen)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from _below(vars(value), seen)


def _values(holder: Holder) -> list[Any]:
    return list(holder.values() if isinstance(holder, dict) else holder)
