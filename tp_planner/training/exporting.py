"""Export of models that are stored in shards: no format holds them, so it is refused before anything runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras

from tp_planner.frontend.layer_tree import named_layers
from tp_planner.ir.errors import PlanError
from tp_planner.storage.variables import is_in_shards


def refuse_export(model: keras.Model, undo: list[Callable[[], None]]) -> None:
    """Refuse to export a parallel model, and any model inside it; add what undoes this."""
    for layer in named_layers(model).values():
        if hasattr(type(layer), "export"):
            layer.__dict__["export"] = functools.partial(_refuse, layer, model)
            undo.append(functools.partial(layer.__dict__.pop, "export", None))


def exported_whole(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``Model.export``, refused for a model that is stored in shards before a plan reads them."""

    @functools.wraps(plain)
    def export(self: keras.Model, *args: Any, **kwargs: Any) -> Any:
        if any(map(is_in_shards, self.variables)):
            raise PlanError(
                f"model {self.name!r} is stored in shards, which no export format holds; call it once and then "
                f"tp_planner.restore(model) on all ranks, and export it on one of them"
            )
        return plain(self, *args, **kwargs)

    return export


def _refuse(layer: keras.Model, model: keras.Model, *args: Any, **kwargs: Any) -> None:
    what = f"model {layer.name!r} is" if layer is model else f"model {layer.name!r}, a part of {model.name!r}, is"
    raise PlanError(
        f"{what} stored in shards, which no export format holds; call tp_planner.restore(model) first on all "
        f"ranks, and export it on one of them"
    )
