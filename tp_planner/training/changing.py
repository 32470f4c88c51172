"""Changes of a parallel model's layers: a plan names all their variables, so what would add or replace some is refused.

It is refused before anything is changed; the model goes on as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras

from tp_planner.frontend.layer_tree import named_layers
from tp_planner.ir.errors import PlanError

CHANGES = ("enable_lora", "quantize", "add_weight")


def refuse_changes(model: keras.Model, undo: list[Callable[[], None]]) -> None:
    """Refuse what changes the variables of a parallel model's layers; add what undoes this."""
    for layer in named_layers(model).values():
        # A model that is built again builds none of its layers again; one that its first call builds adds no variables.
        names = CHANGES if isinstance(layer, keras.Model) or not layer.built else (*CHANGES, "build")
        for name in (each for each in names if hasattr(type(layer), each)):
            layer.__dict__[name] = functools.partial(_refuse, name, layer.name, model.name)
            undo.append(functools.partial(layer.__dict__.pop, name, None))


def _refuse(change: str, layer: str, model: str, *args: Any, **kwargs: Any) -> None:
    what = f"layer {layer!r} of model {model!r}" if layer != model else f"model {model!r}"
    raise PlanError(
        f"{what} is parallelized, and {change}() would change variables that its plan names; call it before the model "
        f"is parallelized, or call tp_planner.restore(model) first on all ranks, and parallelize the model again"
    )
