"""Watching: what every layer of a model returns, and the gradients that come back to it, in the order of events."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from tp_planner.frontend.contractions import call_mode
from tp_planner.frontend.layer_tree import layers_of_variables, named_layers, named_variables
from tp_planner.ir.verdict import Event


@dataclass(slots=True)
class Seen:
    """What one process saw: tensors by event, in order, each as this process holds it (NumPy, float32 for bfloat16).

    Of what all ranks hold whole the first has the tensor, all have ``digests``. ``modes`` are those of layers' calls,
    which have plans of their own; ``readers`` are the layers that take a layer's output, by the event of the output.
    ``owners`` are the layers of variables. ``failure`` is what ended the run.
    """

    tensors: dict[Event, np.ndarray] = field(default_factory=dict)
    digests: dict[Event, bytes] = field(default_factory=dict)
    failure: str = ""
    modes: dict[Event, str] = field(default_factory=dict)
    readers: dict[Event, list[str]] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)

    def note(self, event: Event, tensor: Any) -> None:
        """Keep a copy of the tensor; of equal events the first."""
        self.tensors.setdefault(event, _array(tensor) if isinstance(tensor, torch.Tensor) else np.asarray(tensor))

    def note_whole(self, event: Event, tensor: torch.Tensor, keep: bool) -> None:
        """Keep the digest of a tensor that all ranks have, whole or in shards, and the tensor if ``keep``."""
        array = _array(_whole(tensor))
        self.digests[event] = hashlib.sha256(array.tobytes()).digest()
        if keep:
            self.tensors[event] = array

    def note_logs(self, phase: str, logs: Mapping[str, Any]) -> None:
        """Keep what a training step returned: its loss and metrics."""
        for name, value in logs.items():
            self.note(Event(phase, "loss" if name == "loss" else "metric", name), value)


class Watch:
    """Watches a model's layers. ``phase`` names what runs now; outside of phases nothing is watched."""

    def __init__(self, model: keras.Model) -> None:
        self.model, self.seen = model, Seen(owners=layers_of_variables(model))
        self._phase: str | None = None
        self._calls: Counter[str] = Counter()
        self._made: dict[int, tuple[torch.Tensor, list[Event]]] = {}  # by id, kept alive so that ids stay theirs

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Watch what runs inside, under this name."""
        handles = []
        for key, layer in named_layers(self.model).items():
            handles.append(layer.register_forward_pre_hook(self._before(key), with_kwargs=True))
            handles.append(layer.register_forward_hook(self._after(key), with_kwargs=True))
        self._phase = name
        try:
            yield
        finally:
            self._phase = None
            self._calls.clear()
            self._made.clear()
            for handle in handles:
                handle.remove()

    def _before(self, key: str) -> Any:
        def hook(layer: Any, args: Any, kwargs: Any) -> None:
            for leaf in _tensors((args, kwargs)):
                for event in self._made.get(id(leaf), (None, []))[1]:
                    if key not in (readers := self.seen.readers.setdefault(event, [])):
                        readers.append(key)

        return hook

    def _after(self, key: str) -> Any:
        def hook(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
            leaves = list(_tensors(output))
            if not leaves or self._phase is None:
                return
            self._calls[key] += 1
            mode = call_mode(layer, args, kwargs)
            for number, leaf in enumerate(leaves):
                place = f"call {self._calls[key]}, output {number}"
                event = Event(self._phase, "output", key, place)
                self.seen.note(event, leaf)
                self.seen.modes.setdefault(event, mode)
                self._made.setdefault(id(leaf), (leaf, []))[1].append(event)
                if leaf.requires_grad:
                    leaf.register_hook(self._gradient(Event(self._phase, "gradient at", key, place), mode))

        return hook

    def _gradient(self, event: Event, mode: str) -> Any:
        def hook(gradient: torch.Tensor) -> None:
            self.seen.note(event, gradient)
            self.seen.modes.setdefault(event, mode)

        return hook


def note_gradients(seen: Seen, phase: str, model: keras.Model, keep: bool) -> None:
    """Note the gradients of the model's variables, whole; ``keep`` says that this process keeps more than digests."""
    for key, variable in named_variables(model).items():
        gradient = variable._value.grad
        if gradient is not None:
            seen.note_whole(Event(phase, "gradient of", key), gradient, keep)


def note_values(seen: Seen, phase: str, model: keras.Model, keep: bool, slots: bool = True) -> None:
    """Note the values of the model's variables, and of the optimizer's, as ``note_gradients`` does."""
    for key, variable in named_variables(model).items():
        seen.note_whole(Event(phase, "weight", key), variable._value, keep)
    for variable in model.optimizer.variables if slots else ():
        seen.note_whole(Event(phase, "slot", variable.path), variable._value, keep)


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy().copy()
    return array


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor) and not leaf.is_meta:
            yield leaf
