"""Models are scaled down in their widths alone."""

from __future__ import annotations

import keras
import keras_hub
import pytest

from tp_planner.frontend.scaled import scaled_down
from tp_planner.ir.errors import PlanError


def backbone(width: int) -> keras.Model:
    with keras.device("meta"):
        return keras_hub.models.Llama3Backbone(
            vocabulary_size=64,
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=2,
            hidden_dim=width,
            intermediate_dim=2 * width,
            name="llama",
        )


def test_widths_are_divided() -> None:
    """The numbers of layers and heads stay."""
    small = scaled_down(backbone(64), 4)
    config = small.get_config()
    assert [config[key] for key in ("vocabulary_size", "hidden_dim", "intermediate_dim")] == [16, 16, 32]
    assert [config[key] for key in ("num_layers", "num_query_heads", "num_key_value_heads")] == [2, 4, 2]
    assert small.get_layer("token_embedding").embeddings.shape == (16, 16)


def test_what_cannot_be_built_smaller_says_why() -> None:
    with pytest.raises(PlanError, match=r"^model 'llama' cannot be built with widths divided by 16: "):
        scaled_down(backbone(32), 16)
