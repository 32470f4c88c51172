"""Added losses: a parallel model lets go of those of the call before, and of layers that were added since."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import tp_planner
from tests.workers import Pools, layout_map

RULES = {".*up/kernel": (None, "model"), ".*up/bias": ("model",), ".*down/kernel": ("model", None)}


def losses_of_calls(later: bool) -> list[list[float]]:
    """Return the added losses after each of three calls, of a layer there from the start, or added ``later``."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(8, name="up"), keras.layers.Dense(4, name="down")]
    added = keras.layers.ActivityRegularization(l2=1.0)
    model = keras.Sequential([keras.Input((4,)), *layers, *(() if later else (added,))])
    tp_planner.parallelize(model, layout_map(RULES))
    if later:
        model.add(added)
    found: list[list[float]] = []
    for scale in (1.0, 2.0, 3.0):
        model(scale * np.ones((2, 4), "float32"))
        found.append([float(each) for each in model.losses])
    return found


@pytest.mark.parametrize("later", [False, True])
def test_losses_are_those_of_the_last_call(pools: Pools, later: bool) -> None:
    found: Any = pools(2).run(losses_of_calls, later)
    for calls in found:
        assert list(map(len, calls)) == [1, 1, 1]
        assert calls[0] < calls[1] < calls[2]
