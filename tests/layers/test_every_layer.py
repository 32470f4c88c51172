"""Every Keras layer that has weights computes the same on shards of them as on a single device.

Here each layer meets layouts of all its variables on two processes; ``make sweep`` shards every dim of each of them,
on four processes too.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from tests.layer_parity import OF_USERS, compare_sample, compute, differences
from tests.layer_zoo import CASES, GROUPED, WIDTHS, WITHOUT_WEIGHTS, layers_with_weights, missing_cases, weights
from tests.workers import Pools

LAYERS = sorted({case.layer for case in CASES.values()})
# One of each kind: `make test` shards these, `make sweep` the others, too.
USUAL = {
    "Attention",
    "BatchNormalization",
    "Bidirectional",
    "Conv2D",
    "ConvLSTM1D",
    "Dense",
    "DepthwiseConv1D",
    "EinsumDense",
    "Embedding",
    "GRU",
    "GroupNormalization",
    GROUPED,
    "Layer",
    "LayerNormalization",
    "MultiHeadAttention",
    "Normalization",
    "ReversibleEmbedding",
    "SpectralNormalization",
    "TimeDistributed",
    "TorchModuleWrapper",
}


class Unknown(keras.layers.Layer):
    def build(self, input_shape: tuple[int, ...]) -> None:
        self.scale = self.add_weight(shape=input_shape[-1:])


def test_every_layer_has_a_case() -> None:
    """A layer of Keras that has weights is in the zoo, and what is not in the zoo says why."""
    assert missing_cases(keras.layers) == []
    assert sorted(layers_with_weights(keras.layers)) == sorted({*LAYERS, *WITHOUT_WEIGHTS} - {"Layer"})


def test_new_layer_has_no_case() -> None:
    """A layer with weights that Keras adds is noticed, under the name that is exported."""
    namespace = SimpleNamespace(Dense=keras.layers.Dense, NewLayer=Unknown, ReLU=keras.layers.ReLU)
    assert missing_cases(namespace) == ["no case for keras.layers.NewLayer"]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.trains])
def test_every_weight_matters(name: str) -> None:
    """What is trained has a gradient that can be compared, but for a key's bias: it adds the same to all scores."""
    case = CASES[name]
    model = case.build(WIDTHS[0])
    found = compute(model, case)
    trained = [f"gradient of {key}" for key, variable in weights(model).items() if variable.trainable]
    largest = {gradient: np.abs(found[gradient]).max() for gradient in trained}
    assert [gradient for gradient, size in largest.items() if size < 1e-4] in ([], ["gradient of layer/key/bias"])


@pytest.mark.parametrize("width", [WIDTHS[0], *(pytest.param(width, marks=pytest.mark.slow) for width in WIDTHS[1:])])
@pytest.mark.parametrize(
    "layer", [each if each in USUAL else pytest.param(each, marks=pytest.mark.slow) for each in LAYERS]
)
def test_sharded_layer(pools: Pools, layer: str, width: int) -> None:
    """Outputs, loss, gradients and state are those of the single device, and the layer can be restored."""
    names = [name for name, case in CASES.items() if case.layer == layer]
    if width != WIDTHS[0]:
        names = names[:1]  # what does not divide is gathered, whatever the layer does
    for outcomes in pools(2).run(compare_sample, names, width):
        assert [str(outcome) for outcome in outcomes if not outcome.passed] == []
        refused = {outcome.case for outcome in outcomes if outcome.verdict == "refused"}
        assert refused == {name for name in names if CASES[name].refusal}


# Casts what it assigns; reads what is gathered in another dtype than it is stored in.
USUAL_IN = {("BatchNormalization", "float64"), ("Conv2D", "mixed_bfloat16")}
NOT_COMPUTED = {("STFTSpectrogram", dtype) for dtype in ("bfloat16", "mixed_bfloat16")}  # torch knows no such spectrum
# Where values are cast as they are read, Keras assigns these layers' to the copy, which has no effect.
ASSIGN_IN_VAIN = set(itertools.product(("Layer", "SpectralNormalization"), ("mixed_float16", "mixed_bfloat16")))


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        pytest.param(*each, marks=() if each in USUAL_IN else pytest.mark.slow)
        for each in itertools.product(LAYERS, OF_USERS)
        if each not in NOT_COMPUTED
    ],
)
def test_sharded_layer_in_the_dtypes_of_users(pools: Pools, layer: str, dtype: str) -> None:
    """The same in every dtype, up to the rounding of each."""
    names = [name for name, case in CASES.items() if case.layer == layer]
    for outcomes in pools(2).run(compare_sample, names, WIDTHS[0], dtype):
        if (layer, dtype) in ASSIGN_IN_VAIN:
            assert all(outcome.verdict == "refused" and "aten.copy_" in outcome.detail for outcome in outcomes)
        else:
            assert [str(outcome) for outcome in outcomes if not outcome.passed] == []


DIFFERENCES = {
    "nothing": ({}, []),
    "rounding": ({"output": np.array([1.0, 2.0 + 1e-11])}, []),
    "more than rounding": ({"output": np.array([1.0, 2.0 + 2.1e-8])}, ["output differs by 1.0e-08"]),
    "no number": ({"output": np.array([1.0, np.nan])}, ["output differs by nan"]),
    "rounding in float32": ({"gradient of b": np.array([1.0 + 1e-6], "float32")}, []),
    "more than rounding in float32": (
        {"gradient of b": np.array([1.5], "float32")},
        ["gradient of b differs by 4.5e-01"],
    ),
    "rounding of a gradient that is zero": ({"gradient of c": np.array([1e-12])}, []),
    "an integer": ({"seed": np.array([2, 3])}, ["seed differs by 3.2e-01"]),
    "a gradient too many": ({"gradient of d": np.ones(1)}, ["gradient of d is there only on shards"]),
}


@pytest.mark.parametrize(("changed", "expected"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_differences(changed: dict[str, np.ndarray], expected: list[str]) -> None:
    """Only rounding is forgiven, in proportion to the dtype and to the largest gradient."""
    single = {
        "output": np.array([1.0, 2.0]),
        "gradient of b": np.array([1.0], "float32"),
        "gradient of c": np.array([0.0]),
        "seed": np.array([1, 3]),
    }
    assert list(differences(single | changed, single, input_gradients=True)) == expected
