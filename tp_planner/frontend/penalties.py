"""What kind of function a Keras regularizer is."""

from __future__ import annotations

from typing import Any, Literal

import keras

# Regularizers that are sums over the elements of a variable.
ADDITIVE = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)


def penalty_kind(regularizer: Any) -> Literal["none", "additive", "whole"]:
    """Return whether a regularizer is a sum over elements, so that ranks can add up their shards' sums."""
    if regularizer is None:
        return "none"
    return "additive" if type(regularizer) in ADDITIVE else "whole"
