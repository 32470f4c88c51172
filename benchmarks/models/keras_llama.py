"""KerasHub's Llama 3 in the shape of the hand-written one."""

from __future__ import annotations

import keras
import keras_hub
from peers.handwritten_llama import NORM_EPSILON, ROPE_WAVELENGTH, Shape


def keras_llama(shape: Shape, dtype: str = "float32") -> keras.Model:
    """Return KerasHub's Llama 3 of ``shape`` with its head."""
    keras.utils.clear_session()
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=shape.vocabulary,
        num_layers=shape.layers,
        num_query_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        hidden_dim=shape.width,
        intermediate_dim=shape.hidden,
        layer_norm_epsilon=NORM_EPSILON,
        rope_max_wavelength=ROPE_WAVELENGTH,
        dtype=dtype,
    )
    return keras_hub.models.Llama3CausalLM(backbone=backbone, preprocessor=None, dtype=dtype, name="llama")
