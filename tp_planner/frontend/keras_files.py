"""Where Keras's files of weights have the variables of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
from keras.src.saving import saving_lib


def places_in_files(saveable: keras.Model) -> dict[str, Any]:
    """Return what Keras would save, by its place in a file, as ``layers/dense/vars/0``; nothing is read.

    Values are variables, tensors of variables, or whatever else a layer's own ``save_own_variables`` gives.
    """
    store = _Places()
    saving_lib._save_state(saveable, weights_store=store, assets_store=None, inner_path="", visited_saveables=set())
    return store.values


class _Places(saving_lib.H5IOStore):  # Keras takes nothing else
    """A store that notes what it is given."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._path = ""

    def __bool__(self) -> bool:
        return True

    def make(self, path: str, metadata: Any = None) -> _Places:
        self._path = path
        return self

    def __setitem__(self, key: str, value: Any) -> None:
        self.values["/".join(part for part in (self._path, "vars", key) if part)] = value

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def close(self) -> None:
        """Nothing is open."""
