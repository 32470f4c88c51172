"""Which dims of their weights Keras layers contract, read off the layers.

The table below is all that tp_planner knows of layer classes. A layer that is not in it is planned from the
ops it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras

from tp_planner.ir.contraction import UNLABELLED, Contraction


def is_dropout(layer: keras.Layer) -> bool:
    """Whether the layer's output is its input times a random mask of the input's shape."""
    return isinstance(layer, keras.layers.Dropout) and type(layer).call is keras.layers.Dropout.call


def call_mode(layer: keras.Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return which of its functions a layer computes in a call: "reverse" for a reversed embedding, else ""."""
    if not isinstance(layer, keras.layers.ReversibleEmbedding):
        return ""
    return "reverse" if kwargs.get("reverse", args[1] if len(args) > 1 else False) else ""


def contractions_of(layer: keras.Layer, keys: Mapping[int, str]) -> tuple[tuple[str, Contraction], ...]:
    """Return (mode, contraction) for each function of ``layer``; nothing for a layer that is no contraction.

    ``keys`` maps ``id(variable)`` to the variable's key. A quantized layer is no contraction: it computes
    scales over whole rows.
    """
    if not layer.built or getattr(layer, "quantization_mode", None):
        return ()
    for layer_class, reader in _READERS:
        if isinstance(layer, layer_class) and getattr(type(layer), "call", None) is getattr(layer_class, "call", None):
            return reader(layer, keys)
    return ()


def _weights(layer: Any, keys: Mapping[int, str], labels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    present = [(getattr(layer, attribute, None), text) for attribute, text in labels.items()]
    return tuple((keys[id(variable)], text) for variable, text in present if variable is not None)


def _bias(layer: Any, keys: Mapping[int, str]) -> str | None:
    return None if layer.bias is None else keys[id(layer.bias)]


def _dense(layer: Any, keys: Mapping[int, str]) -> tuple[tuple[str, Contraction], ...]:
    labels = {"_kernel": "io", "bias": "o", "lora_kernel_a": "ir", "lora_kernel_b": "ro"}
    activation = layer.activation is not None
    return (("", Contraction("...i", "...o", _weights(layer, keys, labels), _bias(layer, keys), activation)),)


def _einsum_dense(layer: Any, keys: Mapping[int, str]) -> tuple[tuple[str, Contraction], ...]:
    operands, output = layer.equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    rank = next(letter for letter in "rRqQ" if letter not in inputs + kernel + output)
    labels = {"_kernel": kernel, "lora_kernel_a": kernel[:-1] + rank, "lora_kernel_b": rank + kernel[-1]}
    if layer.bias is not None:
        labels["bias"] = _bias_labels(output.replace("...", ""), layer.bias_axes, layer.bias.shape)
    activation = layer.activation is not None
    return (("", Contraction(inputs, output, _weights(layer, keys, labels), _bias(layer, keys), activation)),)


def _bias_labels(output: str, bias_axes: str, shape: tuple[int, ...]) -> str:
    tail = output[len(output) - len(shape) :]
    return "".join(label if label in bias_axes else UNLABELLED for label in tail)


def _embedding(layer: Any, keys: Mapping[int, str]) -> tuple[tuple[str, Contraction], ...]:
    labels = {"_embeddings": "vd", "lora_embeddings_a": "vr", "lora_embeddings_b": "rd"}
    return (("", Contraction("...", "...d", _weights(layer, keys, labels), lookup=True)),)


def _reversible_embedding(layer: Any, keys: Mapping[int, str]) -> tuple[tuple[str, Contraction], ...]:
    forward = _embedding(layer, keys)
    if layer.tie_weights:
        labels = {"_embeddings": "vd", "lora_embeddings_a": "vr", "lora_embeddings_b": "rd"}
    else:
        labels = {"reverse_embeddings": "dv"}
    nonlinear = layer.logit_soft_cap is not None
    return (*forward, ("reverse", Contraction("...d", "...v", _weights(layer, keys, labels), nonlinear=nonlinear)))


_Reader = Callable[[Any, Mapping[int, str]], tuple[tuple[str, Contraction], ...]]
_READERS: tuple[tuple[type, _Reader], ...] = (
    (keras.layers.Dense, _dense),
    (keras.layers.EinsumDense, _einsum_dense),
    (keras.layers.ReversibleEmbedding, _reversible_embedding),
    (keras.layers.Embedding, _embedding),
)
