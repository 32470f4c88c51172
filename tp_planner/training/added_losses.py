"""Added losses: those that layers have added in a call are let go of in the next one.

Keras asks every layer for that in each call of a model, which takes a tenth of a small model's forward pass; here it is
done where there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import keras

from tp_planner.frontend.calling import leaves_no_trace
from tp_planner.replay.objects import Held


def clearing_losses(model: keras.Model, layers: Mapping[str, keras.Layer]) -> Callable[[], None]:
    """Return what replaces the model's ``_clear_losses``.

    Args:
        model: a parallel model.
        layers: the model and all layers below it, by name.
    """
    plain = model._clear_losses
    if any(type(layer)._clear_losses is not keras.Layer._clear_losses for layer in layers.values()):
        return plain  # type: ignore[no-any-return]
    added = [each for layer in layers.values() for each in (layer._losses, layer._loss_ids)]
    known = Held(*(layer._layers for layer in layers.values()))

    def clear_losses() -> None:
        if any(added) or leaves_no_trace() or known.is_another():
            plain()

    return clear_losses
