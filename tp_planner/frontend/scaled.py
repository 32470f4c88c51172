"""Scaled: a model of the same layers with smaller widths, for what needs no more than its shape."""

from __future__ import annotations

import copy
from typing import Any

import keras

from tp_planner.ir.errors import PlanError, in_one_line

# Sizes in the configurations of KerasHub's models that are widths; the numbers of heads and layers stay.
_WIDTHS = ("_dim", "vocabulary_size")


def scaled_down(model: keras.Model, by: int) -> keras.Model:
    """Return the model built anew with widths divided by ``by``, as its configuration names them.

    Raises PlanError if the configuration names no widths that divide, or the model cannot be built with the others.
    """
    data = keras.saving.serialize_keras_object(model)
    smaller = _divided(copy.deepcopy(data), by)
    if smaller == data:
        raise PlanError(
            f"model {model.name!r} cannot be scaled down: its configuration has no sizes such as hidden_dim that "
            f"divide by {by}; give a factory that builds it smaller"
        )
    try:
        built: keras.Model = keras.saving.deserialize_keras_object(smaller)
    except Exception as error:  # layers may raise anything about sizes
        raise PlanError(
            f"model {model.name!r} cannot be built with widths divided by {by}: {in_one_line(error)}"
        ) from None
    return built


def _divided(data: Any, by: int) -> Any:
    if isinstance(data, list):
        return [_divided(each, by) for each in data]
    if not isinstance(data, dict):
        return data
    return {
        key: value // by
        if isinstance(value, int) and key.endswith(_WIDTHS) and value >= by and value % by == 0
        else _divided(value, by)
        for key, value in data.items()
    }
