"""Values that ranks tell each other: numbers, texts, arrays of NumPy and torch, nested as they like."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping
from typing import Any

import keras
import torch

from tp_planner.job.rendezvous import exchange


def of_rank_zero(what: str, value: Any) -> Any:
    """Return rank 0's value on every rank that came to the same ``what``; tensors become arrays.

    Of a dict, what cannot be told is each rank's own.
    """
    answer = pickle.loads(base64.b64decode(exchange(what, _written(value))[0]))
    return {**value, **answer} if isinstance(value, Mapping) and isinstance(answer, Mapping) else answer


def _written(value: Any) -> str:
    plain = keras.tree.map_structure(_without_tensors, value)
    if isinstance(plain, Mapping):
        plain = {key: each for key, each in plain.items() if _can_be_told(each)}
    return base64.b64encode(pickle.dumps(plain)).decode()


def _without_tensors(leaf: Any) -> Any:
    return keras.ops.convert_to_numpy(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _can_be_told(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # whatever a class of the user's own raises
        return False
    return True
