"""What stays: what a call leaves behind beside its output, which a program of its torch functions would not."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import torch
from torch.utils._pytree import tree_flatten

from tp_planner.frontend.kept_tensors import holders, kept_tensors
from tp_planner.frontend.layer_tree import BOOKKEEPING
from tp_planner.replay.tape import Tape

_MUTABLE = (np.ndarray, set, deque, bytearray)  # beside dicts and lists, which are holders themselves


class Attributes:
    """What layers hold in attributes, and in containers there, as it is now."""

    def __init__(self, layers: Mapping[str, keras.Layer]) -> None:
        self._layers = layers
        self._held = {name: [(holder, _entries(holder)) for holder in holders(layer)] for name, layer in layers.items()}

    def changed(self) -> Iterator[tuple[str, str]]:
        """Yield layer and attribute, or place in a container, of what is something else now."""
        for name, held in self._held.items():
            for holder, before in held:
                now = _entries(holder)
                for key in sorted(before.keys() | now.keys(), key=str):
                    if key not in before or key not in now or not _is_same(before[key], now[key]):
                        yield name, str(key)


def _entries(holder: Any) -> dict[Any, Any]:
    items = holder.items() if isinstance(holder, dict) else enumerate(holder)
    return {
        key: copy.copy(each) if isinstance(each, _MUTABLE) else each for key, each in items if key not in BOOKKEEPING
    }


def _is_same(before: Any, now: Any) -> bool:
    """Whether a value is the same; containers are, for what is in them is looked at apart."""
    if before is now or type(before) is not type(now):
        return before is now
    if isinstance(before, dict | list):
        return len(before) == len(now)
    if isinstance(before, np.ndarray):
        return before.shape == now.shape and bool(np.array_equal(before, now, equal_nan=before.dtype.kind in "fc"))
    if isinstance(before, torch.Tensor):
        return False  # one tensor in another's place
    try:
        return bool(before == now)
    except Exception:  # of an object that cannot be compared
        return False


def look_for_what_stays(tape: Tape, before: Attributes, layers: Mapping[str, keras.Layer], output: Any) -> None:
    """Let the tape fail if the call has left anything but its output, which a program would not."""
    for name, layer in layers.items():
        if layer._losses:
            tape.fail(f"layer {name!r} adds a loss")
        if any(map(tape.has_made, kept_tensors(layer))):
            tape.fail(f"layer {name!r} keeps a tensor that its call has made")
    for name, attribute in before.changed():
        tape.fail(f"layer {name!r} changes its attribute {attribute!r} when it is called")
    if any(hasattr(leaf, "_keras_mask") for leaf in tree_flatten(output)[0]):
        tape.fail("the output has a mask")
