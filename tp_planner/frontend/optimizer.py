"""The optimizer of a simulated training step, as users name it."""

from __future__ import annotations

import keras

from tp_planner.ir.errors import PlanError


def read_optimizer(
    optimizer: str | keras.optimizers.Optimizer | None, model: keras.Model
) -> keras.optimizers.Optimizer | None:
    """Return the optimizer that a user names; by default the model's own, if it is compiled.

    Raises PlanError for what is no optimizer of Keras.
    """
    if optimizer is None:
        return getattr(model, "optimizer", None)
    try:
        return keras.optimizers.get(optimizer)
    except ValueError:
        raise PlanError(
            f"optimizer {optimizer!r} is unknown; give a Keras optimizer or the name of one, such as 'adamw'"
        ) from None
