"""A case for every Keras layer that has weights: a tiny model around it, and what it is fed.

A model is an input, a Dense "before" and a Dense "after", with the layer between them: gradients flow through the
layer, and reach its input. Sizes follow from one number, the width: 8 divides by 2 and 4, 9 by neither.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import keras
import numpy as np
import torch
from keras import layers

from tests.models import building, randomize
from tp_planner.frontend.layer_tree import named_variables

WIDTHS = (8, 9)
BATCH_SIZE = 4
NEIGHBOURS = ("before", "after")


@dataclass(frozen=True, slots=True)
class LayerCase:
    """One layer, in one of the ways to use it.

    ``make`` returns the layer, called "layer", for a width. Its input is (batch, *leading, width), or tokens
    (batch, *leading) where no layer is ``before``. ``call`` calls it, for layers that take more than one tensor.
    ``trains`` says whether Keras itself can train it; ``refusal`` is a pattern of what some layouts are refused with.
    """

    layer: str  # its name in keras.layers
    variant: str
    make: Callable[[int], keras.Layer]
    leading: tuple[int, ...] = ()
    before: type[keras.Layer] | None = layers.Dense
    call: Callable[[keras.Layer, Any], Any] = lambda layer, x: layer(x)
    trains: bool = True
    refusal: str | None = None

    @property
    def name(self) -> str:
        return f"{self.layer} {self.variant}".strip()

    def build(self, width: int, dtype: str = "float64", exact: bool = True) -> keras.Model:
        """Return the model with random weights, the same in every call."""
        keras.utils.set_random_seed(0)  # seeds of layers, which are drawn without one otherwise
        # Weights are drawn anew; torch has the decomposition that draws orthogonal ones for no dtype of 16 bits.
        orthogonal = mock.patch.object(keras.initializers.Orthogonal, "__call__", keras.initializers.Zeros.__call__)
        with building(dtype, exact), orthogonal:
            inputs = self._input()
            x = inputs
            if self.before is layers.Embedding:
                x = layers.Embedding(_TOKENS, width, mask_zero=True, name="before")(x)
            elif self.before is layers.Dense:
                x = layers.Dense(width, name="before")(x)
            outputs = layers.Dense(3, name="after")(self.call(self.make(width), x))
            return _randomize_state(randomize(keras.Model(inputs, outputs, name="model")))

    def _input(self) -> Any:
        if self.before is layers.Dense:
            return keras.Input((*self.leading, 3), batch_size=BATCH_SIZE, name="x")
        return keras.Input(self.leading, batch_size=BATCH_SIZE, dtype="int32", name="x")

    def batch(self) -> np.ndarray:
        rng = np.random.default_rng(1)
        if self.before is layers.Dense:
            return rng.standard_normal((BATCH_SIZE, *self.leading, 3))
        return rng.integers(0, _TOKENS, (BATCH_SIZE, *self.leading)).astype("int32")


_TOKENS = 7


def _randomize_state(model: keras.Model) -> keras.Model:
    """Draw what is not trained anew, positive as variances are, and return the model."""
    rng = np.random.default_rng(2)
    for variable in weights(model).values():
        if not variable.trainable:
            variable.assign(rng.uniform(0.5, 1.5, tuple(variable.shape)))
    return model


def weights(model: keras.Model) -> dict[str, Any]:
    """Return the floating-point variables of the layer by key, without those of its neighbours."""
    return {
        key: variable
        for key, variable in named_variables(model).items()
        if variable.value.is_floating_point() and key.split("/")[0] not in NEIGHBOURS
    }


# What there is in Keras


# Classes of keras.layers that seem to have weights, and have none on torch.
WITHOUT_WEIGHTS = {
    "AugMix": "its layers have no weights",
    "FlaxLayer": "is for JAX",
    "IntegerLookup": "its table is no weight",
    "JaxLayer": "is for JAX",
    "RandAugment": "its layers have no weights",
    "RandomColorJitter": "its layers have no weights",
    "StringLookup": "its table is no weight",
    "TFSMLayer": "is for TensorFlow",
    "Wrapper": "is the base of wrappers",
}
_MAKES_WEIGHTS = re.compile(r"\.add_weight\(|Variable\(|(?<!super\(\))\.build\(")


def layers_with_weights(namespace: Any) -> Iterator[str]:
    """Yield the name of each layer class that creates variables, or builds the layers it holds.

    Both are read off the source of the class and its bases. A class with several names goes by its own.
    """
    names: dict[type, list[str]] = {}
    for name, each in sorted(vars(namespace).items()):
        if inspect.isclass(each) and issubclass(each, keras.Layer):
            names.setdefault(each, []).append(name)
    for layer, aliases in names.items():
        if any(map(_makes_weights, layer.__mro__)):
            yield layer.__name__ if layer.__name__ in aliases else aliases[0]


@cache
def _makes_weights(layer: type) -> bool:
    if not issubclass(layer, keras.Layer) or layer is keras.Layer:
        return False
    return bool(_MAKES_WEIGHTS.search(inspect.getsource(layer)))


def missing_cases(namespace: Any) -> list[str]:
    """Return a complaint for each layer class with weights that no case is about."""
    known = {case.layer for case in CASES.values()} | WITHOUT_WEIGHTS.keys()
    return [f"no case for keras.layers.{name}" for name in layers_with_weights(namespace) if name not in known]


# The cases


class RunningMean(layers.Layer):
    """Subtracts a running mean of the batches, this one included."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.mean = self.add_weight(shape=input_shape[-1:], trainable=False, name="mean")

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * keras.ops.mean(x, axis=0))
        return x - self.mean


def _heads(width: int) -> int:
    return 4 if width == 8 else 3


def _groups(width: int) -> int:
    return 4 if width == 8 else 3


def _cell_on_own_states(count: int) -> Callable[[keras.Layer, Any], Any]:
    """Return a call of a recurrent cell whose ``count`` states are its input."""
    return lambda cell, x: cell(x, [x] * count)[0]


def _with_lora(layer: keras.Layer, x: Any) -> Any:
    y = layer(x)
    layer.enable_lora(4)
    return y


def _self_attention(layer: keras.Layer, x: Any) -> Any:
    return layer(x, x)


def _cross_attention(layer: keras.Layer, x: Any) -> Any:
    return layer(x, x[:, :3], x[:, 1:4])


def _there_and_back(layer: keras.Layer, x: Any) -> Any:
    return layer(layer(x), reverse=True)


def _adapted(width: int) -> keras.Layer:
    layer = layers.Normalization(name="layer")
    layer.adapt(np.random.default_rng(3).standard_normal((5, width)))
    return layer


# From Keras 3.16 on it has another name, and there is one layer more.
GROUPED = "GroupedQueryAttention" if hasattr(layers, "GroupedQueryAttention") else "GroupQueryAttention"
_STEPS, _SEQUENCE, _IMAGE, _VOLUME = (2,), (5,), (4, 5), (3, 4, 3)
_TOKEN_IDS: dict[str, Any] = {"leading": (5,), "before": None}

_ALL = (
    # Core
    LayerCase("Dense", "", lambda n: layers.Dense(n, activation="gelu", name="layer")),
    LayerCase("Dense", "of a sequence", lambda n: layers.Dense(n, activation="softmax", name="layer"), _SEQUENCE),
    LayerCase("Dense", "with LoRA", lambda n: layers.Dense(n, name="layer"), call=_with_lora),
    LayerCase(
        "EinsumDense",
        "",
        lambda n: layers.EinsumDense("abc,cde->abde", (None, 2, n), bias_axes="de", name="layer"),
        _SEQUENCE,
    ),
    LayerCase(
        "EinsumDense",
        "of a dim that input and output share",
        lambda n: layers.EinsumDense("abc,bcd->abd", (5, n), bias_axes="b", activation="tanh", name="layer"),
        _SEQUENCE,
    ),
    LayerCase(
        "EinsumDense",
        "with LoRA",
        lambda n: layers.EinsumDense("...c,cd->...d", n, name="layer"),
        _SEQUENCE,
        call=_with_lora,
    ),
    LayerCase("Embedding", "", lambda n: layers.Embedding(n + 4, n, name="layer"), **_TOKEN_IDS),
    LayerCase("Embedding", "with LoRA", lambda n: layers.Embedding(n + 4, n, name="layer"), (5,), None, _with_lora),
    LayerCase("ReversibleEmbedding", "", lambda n: layers.ReversibleEmbedding(n + 4, n, name="layer"), **_TOKEN_IDS),
    LayerCase(
        "ReversibleEmbedding",
        "there and back",
        lambda n: layers.ReversibleEmbedding(n + 4, n, name="layer"),
        (5,),
        None,
        _there_and_back,
    ),
    LayerCase(
        "ReversibleEmbedding",
        "not tied and capped",
        lambda n: layers.ReversibleEmbedding(n + 4, n, tie_weights=False, logit_soft_cap=2.0, name="layer"),
        (5,),
        None,
        _there_and_back,
    ),
    LayerCase(
        "TorchModuleWrapper",
        "",
        lambda n: layers.TorchModuleWrapper(
            torch.nn.Linear(n, n, dtype=getattr(torch, keras.config.dtype_policy().compute_dtype)),
            output_shape=(BATCH_SIZE, n),
            name="layer",
        ),
    ),
    LayerCase("Layer", "that reads what it has assigned", lambda n: RunningMean(name="layer")),
    # Attention
    LayerCase(
        "MultiHeadAttention",
        "",
        lambda n: layers.MultiHeadAttention(_heads(n), 4, name="layer"),
        _SEQUENCE,
        call=_self_attention,
    ),
    LayerCase(
        "MultiHeadAttention",
        "of three tensors",
        lambda n: layers.MultiHeadAttention(_heads(n), n, value_dim=4, output_shape=n, dropout=0.3, name="layer"),
        _SEQUENCE,
        call=_cross_attention,
    ),
    LayerCase(
        GROUPED,
        "",
        lambda n: layers.GroupQueryAttention(4, n, _heads(n), name="layer"),
        _SEQUENCE,
        call=_self_attention,
    ),
    LayerCase(
        "Attention",
        "",
        lambda n: layers.Attention(use_scale=True, score_mode="concat", name="layer"),
        _SEQUENCE,
        call=lambda layer, x: layer([x, x]),
    ),
    LayerCase(
        "AdditiveAttention",
        "",
        lambda n: layers.AdditiveAttention(name="layer"),
        _SEQUENCE,
        call=lambda layer, x: layer([x, x]),
    ),
    # Convolutions
    LayerCase("Conv1D", "", lambda n: layers.Conv1D(n, 3, activation="relu", name="layer"), _SEQUENCE),
    LayerCase(
        "Conv1D",
        "causal and dilated",
        lambda n: layers.Conv1D(n, 2, dilation_rate=2, padding="causal", name="layer"),
        (5,),
    ),
    LayerCase("Conv2D", "", lambda n: layers.Conv2D(n, 3, strides=2, padding="same", name="layer"), _IMAGE),
    LayerCase("Conv2D", "in groups", lambda n: layers.Conv2D(n, 2, groups=_groups(n), name="layer"), _IMAGE),
    LayerCase(
        "Conv2D", "channels first", lambda n: layers.Conv2D(n, 2, data_format="channels_first", name="layer"), _IMAGE
    ),
    LayerCase("Conv3D", "", lambda n: layers.Conv3D(n, 2, name="layer"), _VOLUME),
    LayerCase("Conv1DTranspose", "", lambda n: layers.Conv1DTranspose(n, 3, strides=2, name="layer"), _SEQUENCE),
    LayerCase("Conv2DTranspose", "", lambda n: layers.Conv2DTranspose(n, 2, padding="same", name="layer"), _IMAGE),
    LayerCase("Conv3DTranspose", "", lambda n: layers.Conv3DTranspose(n, 2, name="layer"), _VOLUME),
    LayerCase("DepthwiseConv1D", "", lambda n: layers.DepthwiseConv1D(3, depth_multiplier=2, name="layer"), (5,)),
    LayerCase("DepthwiseConv2D", "", lambda n: layers.DepthwiseConv2D(2, activation="relu", name="layer"), _IMAGE),
    LayerCase(
        "SeparableConv1D", "", lambda n: layers.SeparableConv1D(n, 3, depth_multiplier=2, name="layer"), _SEQUENCE
    ),
    LayerCase("SeparableConv2D", "", lambda n: layers.SeparableConv2D(n, 2, padding="same", name="layer"), _IMAGE),
    # Normalizations
    LayerCase("BatchNormalization", "", lambda n: layers.BatchNormalization(name="layer"), _IMAGE),
    LayerCase("BatchNormalization", "on axis 1", lambda n: layers.BatchNormalization(axis=1, name="layer"), (8, 3)),
    LayerCase("BatchNormalization", "with renorm", lambda n: layers.BatchNormalization(renorm=True, name="layer")),
    LayerCase(
        "BatchNormalization",
        "called twice",
        lambda n: layers.BatchNormalization(name="layer"),
        call=lambda layer, x: layer(layer(x)),
    ),
    LayerCase("LayerNormalization", "", lambda n: layers.LayerNormalization(name="layer"), _SEQUENCE),
    LayerCase(
        "LayerNormalization", "of two axes", lambda n: layers.LayerNormalization(axis=[1, 2], name="layer"), _SEQUENCE
    ),
    LayerCase("RMSNormalization", "", lambda n: layers.RMSNormalization(name="layer"), _SEQUENCE),
    LayerCase("GroupNormalization", "", lambda n: layers.GroupNormalization(_groups(n), name="layer"), _IMAGE),
    LayerCase("GroupNormalization", "of each channel", lambda n: layers.GroupNormalization(-1, name="layer"), _IMAGE),
    LayerCase("Normalization", "", _adapted),
    LayerCase(
        "SpectralNormalization",
        "of Dense",
        lambda n: layers.SpectralNormalization(layers.Dense(n, name="dense"), name="layer"),
    ),
    LayerCase(
        "SpectralNormalization",
        "of Conv2D",
        lambda n: layers.SpectralNormalization(layers.Conv2D(n, 2, name="conv"), power_iterations=2, name="layer"),
        _IMAGE,
    ),
    # Activations
    LayerCase("PReLU", "", lambda n: layers.PReLU(name="layer"), _SEQUENCE),
    LayerCase("PReLU", "with a shared axis", lambda n: layers.PReLU(shared_axes=[1], name="layer"), _IMAGE),
    # Recurrent layers
    LayerCase("SimpleRNN", "", lambda n: layers.SimpleRNN(n, return_sequences=True, name="layer"), _STEPS),
    LayerCase("SimpleRNNCell", "", lambda n: layers.SimpleRNNCell(n, name="layer"), call=_cell_on_own_states(1)),
    LayerCase("GRU", "", lambda n: layers.GRU(n, name="layer"), _STEPS),
    LayerCase(
        "GRU",
        "with the reset before",
        lambda n: layers.GRU(n, reset_after=False, go_backwards=True, name="layer"),
        _STEPS,
    ),
    LayerCase("GRUCell", "", lambda n: layers.GRUCell(n, name="layer"), call=_cell_on_own_states(1)),
    LayerCase("LSTM", "", lambda n: layers.LSTM(n, return_sequences=True, name="layer"), _STEPS),
    LayerCase("LSTM", "of a masked sequence", lambda n: layers.LSTM(n, name="layer"), _STEPS, layers.Embedding),
    LayerCase(
        "LSTM", "with dropout", lambda n: layers.LSTM(n, dropout=0.2, recurrent_dropout=0.3, name="layer"), _STEPS
    ),
    LayerCase(
        "LSTM",
        "with a state that stays",
        lambda n: layers.LSTM(n, stateful=True, name="layer"),
        _STEPS,
        trains=False,  # Keras itself assigns the state in place, which backward on torch refuses
        refusal="a training step of model 'model' cannot be simulated: RuntimeError: one of the variables needed .*",
    ),
    LayerCase("LSTMCell", "", lambda n: layers.LSTMCell(n, name="layer"), call=_cell_on_own_states(2)),
    LayerCase("RNN", "", lambda n: layers.RNN(layers.GRUCell(n, name="cell"), name="layer"), _STEPS),
    LayerCase(
        "StackedRNNCells",
        "",
        lambda n: layers.RNN(
            layers.StackedRNNCells([layers.LSTMCell(n, name="first"), layers.SimpleRNNCell(n, name="second")]),
            name="layer",
        ),
        _STEPS,
    ),
    LayerCase(
        "Bidirectional", "", lambda n: layers.Bidirectional(layers.LSTM(n, return_sequences=True), name="layer"), _STEPS
    ),
    LayerCase(
        "Bidirectional",
        "averaged",
        lambda n: layers.Bidirectional(layers.GRU(n), merge_mode="ave", name="layer"),
        _STEPS,
    ),
    LayerCase("ConvLSTM1D", "", lambda n: layers.ConvLSTM1D(n, 2, name="layer"), (2, 4)),
    LayerCase("ConvLSTM2D", "", lambda n: layers.ConvLSTM2D(n, 2, padding="same", name="layer"), (2, 3, 3)),
    LayerCase("ConvLSTM3D", "", lambda n: layers.ConvLSTM3D(n, 2, name="layer"), (2, 3, 2, 3)),
    LayerCase("TimeDistributed", "of Dense", lambda n: layers.TimeDistributed(layers.Dense(n), name="layer"), _STEPS),
    LayerCase(
        "TimeDistributed",
        "of BatchNormalization",
        lambda n: layers.TimeDistributed(layers.BatchNormalization(), name="layer"),
        (2, 3),
    ),
    # Signals
    LayerCase(
        "STFTSpectrogram",
        "",
        lambda n: layers.STFTSpectrogram(mode="log", frame_length=n, frame_step=4, fft_length=16, name="layer"),
        (20,),
        call=lambda layer, x: layer(x[..., :1]),
    ),
)
_LATER = (LayerCase("TernaryDense", "", lambda n: layers.TernaryDense(n, activation="gelu", name="layer")),)
CASES: dict[str, LayerCase] = {
    case.name: case for case in (*_ALL, *_LATER) if hasattr(layers, case.layer) or case in _ALL
}
