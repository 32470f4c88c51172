"""Recomputed blocks: a model as if it had been built with its equal blocks in a ``keras.RematScope``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras
from keras.src.backend.common.remat import RematMode

from tp_planner.frontend.blocks import find_blocks
from tp_planner.frontend.layer_tree import named_layers
from tp_planner.ir.errors import PlanError
from tp_planner.patches import replaced


@contextlib.contextmanager
def recomputing_blocks(model: keras.Model) -> Iterator[None]:
    """Inside, the backward pass runs again each block that has an equal in the model, the outermost of them.

    Raises PlanError for a model without equal blocks.
    """
    blocks = _outermost_blocks(model)
    if not blocks:
        raise PlanError(
            f"no blocks of model {model.name!r} are equal, so there are none to recompute; "
            f"build it with its layers in a keras.RematScope instead"
        )
    layers = named_layers(model)
    with contextlib.ExitStack() as stack:
        for name in blocks:
            scope = RematMode("list_of_layers", 0, [layers[name].name])
            stack.enter_context(replaced(layers[name], "_remat_mode", scope, "the plan asks what it would save"))
        yield


def _outermost_blocks(model: keras.Model) -> list[str]:
    blocks = find_blocks(model)
    inner = {name for block in blocks.layers.values() for name in block[1:]}
    return [block for block in blocks.layers if block not in inner]
