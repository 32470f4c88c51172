"""Things that users build and do: each gives what the single device gives, or is refused before anything runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch

import tp_planner
from tests.models import CASES
from tests.workers import WorkerPool, layout_map
from tp_planner.frontend.layer_tree import named_variables

layers, ops = keras.layers, keras.ops
TORCH_MODES: dict[str, Callable[[], Any]] = {
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another device": lambda: torch.device("meta"),
}
MLP = {"up/kernel": (None, "model"), "up/bias": ("model",), "down/kernel": ("model", None)}


class ScaleBySize(layers.Layer):
    """Divides by the square root of the last dim, as attention written by hand does."""

    def call(self, x: Any) -> Any:
        return x / ops.sqrt(ops.cast(ops.shape(x)[-1], x.dtype))


class CumulativeSum(layers.Layer):
    """Adds up along the last dim."""

    def call(self, x: Any) -> Any:
        return ops.cumsum(x, axis=-1)


class DropoutAndMore(layers.Dropout):
    """A dropout layer that computes something else."""

    def call(self, x: Any, training: bool = False) -> Any:
        return ops.tanh(x)


class AddsSquares(layers.Layer):
    """Adds the squares of its input to the model's losses."""

    def call(self, x: Any) -> Any:
        self.add_loss(x * x)
        return x


class ScalesAndPassesOn(layers.Layer):
    """Multiplies its two inputs and returns the second as well."""

    def call(self, x: Any, scale: Any) -> Any:
        return x * scale, scale


class Written(layers.Layer):
    """Computes ``code(x, weight)``, the weight one number for each feature."""

    def __init__(self, code: Callable[..., Any], **options: Any) -> None:
        super().__init__(**options)
        self.code = code

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.weight = self.add_weight(shape=(input_shape[-1],), name="weight")

    def call(self, x: Any) -> Any:
        return self.code(x, self.weight)


def rms_norm(x: Any, weight: Any) -> Any:
    return x * ops.rsqrt(ops.sum(x * x, axis=-1, keepdims=True) / x.shape[-1] + 1e-3) * weight


def mean_and_maximum(x: Any, weight: Any) -> Any:
    return (x - ops.mean(x, axis=-1, keepdims=True)) / ops.max(x * weight, axis=-1, keepdims=True)


def best_two(x: Any, weight: Any) -> Any:
    values, places = ops.top_k(x * weight, 2)
    return x * ops.sum(values, axis=-1, keepdims=True) + ops.cast(ops.sum(places), x.dtype)


def features_with_features(x: Any, weight: Any) -> Any:
    return ops.einsum("bf,cf->bc", x, x * weight) @ (x + weight)


def in_heads(x: Any, weight: Any) -> Any:
    heads = ops.reshape(x * weight, (-1, 4, 2))
    return ops.reshape(ops.softmax(ops.matmul(heads, ops.transpose(heads, (0, 2, 1)))) @ heads, (-1, 8))


def in_place(x: Any, weight: Any) -> Any:
    total = ops.zeros_like(x) + weight
    total += x
    total *= x
    return total


def norm_of_all(x: Any, weight: Any) -> Any:
    return x / (ops.norm(x * weight, axis=-1, keepdims=True) + 1)


def gathered_features(x: Any, weight: Any) -> Any:
    places = ops.cast(ops.argsort(ops.sum(x * 0, axis=-1)), "int64")[:, None] + ops.arange(2, dtype="int64")
    return x + torch.gather(x * weight, -1, places).sum(-1, keepdim=True)


def view_read_whole_too(x: Any, weight: Any) -> Any:
    gate = ops.tanh(ops.sum(weight) * ops.mean(ops.stop_gradient(x), axis=-1))
    column = ops.expand_dims(gate, -1)
    return x * column + ops.sum(column[:, 0] * 2)


def written_into(x: Any, weight: Any) -> Any:
    scale = ops.tanh(ops.cumsum(ops.ones_like(x) * 0.1, axis=-1)) * 1.0
    y = x + scale
    scale += 1
    return y * scale


def by_its_size(x: Any, weight: Any) -> Any:
    y = ops.tanh(x * weight)
    return y * 2 if y.shape[-1] < 8 else y


def own_gradient(x: Any, weight: Any) -> Any:
    """The gradient mixes what the values do not."""

    @ops.custom_gradient
    def tanh(y: Any) -> Any:
        def gradient(*args: Any, upstream: Any = None) -> Any:
            upstream = args[-1] if upstream is None else upstream
            return upstream - ops.mean(upstream, axis=-1, keepdims=True)

        return ops.tanh(y), gradient

    return tanh(x * weight)


def read_without_gradient_first(x: Any, weight: Any) -> Any:
    with torch.no_grad():
        largest = ops.max(ops.abs(weight))
    return x * weight / largest


def own_generator(x: Any, weight: Any) -> Any:
    noise = torch.rand((x.shape[0], 1), generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    return x * weight + noise


class LearnedQueries(layers.Layer):
    """Hands its own weight to a layer, as it is and by a slice, and returns another one."""

    def build(self, input_shape: Any) -> None:
        self.queries = self.add_weight(shape=(1, 4, 8), name="queries")
        self.scale = self.add_weight(shape=(8,), name="scale")
        self.up, self.down = layers.Dense(16, activation="tanh", name="up"), layers.Dense(8, name="down")
        self.attention = layers.MultiHeadAttention(2, 4, name="attention")
        self.up.build((1, 4, 8))
        self.down.build((1, 4, 16))
        self.attention.build((None, 4, 8), (None, None, 8))

    def call(self, x: Any) -> Any:
        queries = self.down(self.up(self.queries)) + self.queries[:, :1]
        queries = ops.broadcast_to(queries, (ops.shape(x)[0], 4, 8))
        return self.attention(queries, ops.expand_dims(x, 1)), self.scale


def learned_queries() -> keras.Model:
    inputs = keras.Input((6,))
    x, scale = LearnedQueries(name="learned")(layers.Dense(8, name="before")(inputs))
    return keras.Model(inputs, layers.Dense(4, name="after")(x * scale), name="queries")


class Rows(layers.Layer):
    """A row-parallel layer, and a table of rows, in torch's own functions."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.kernel = self.add_weight(shape=(8, 4), name="down_kernel")
        self.bias = self.add_weight(shape=(4,), name="bias")
        self.table = self.add_weight(shape=(8, 4), name="rows_table")

    def call(self, x: Any) -> Any:
        kernel = ops.convert_to_tensor(self.kernel)
        ids = ops.cast(ops.minimum(ops.abs(x[:, :1]) * 3, 7), "int64")[:, 0]
        linear = torch.nn.functional.linear(x, kernel.t(), ops.convert_to_tensor(self.bias))
        added = torch.addmm(ops.convert_to_tensor(self.bias), x, kernel)
        return linear * added + ops.take(self.table, ids, axis=0)


def rows() -> keras.Model:
    inputs = keras.Input((6,))
    return keras.Model(inputs, Rows(name="rows")(layers.Dense(8, "relu", name="up")(inputs)), name="rows_model")


def written(code: Callable[..., Any]) -> keras.Model:
    return between(Written(code, name="written"))


def between(layer: layers.Layer) -> keras.Model:
    """Return column-parallel, the layer, row-parallel."""
    inputs = keras.Input((6,))
    hidden = layer(layers.Dense(8, "relu", name="up")(inputs))
    return keras.Model(inputs, layers.Dense(4, name="down")(hidden), name="between")


def plain() -> keras.Model:
    return between(layers.Activation("tanh", name="tanh"))


def shared_tower() -> keras.Model:
    """A tower that is called on the input, which needs no gradient, and on what comes of it."""
    tower = keras.Sequential([layers.Dense(8, "relu", name="up"), layers.Dense(6, name="down")], name="tower")
    inputs = keras.Input((6,))
    return keras.Model(inputs, tower(layers.Dense(6, name="mix")(tower(inputs))), name="towers")


def shared_over_ranks() -> keras.Model:
    """A layer that is called on tensors of two and of three dims."""
    up, down = layers.Dense(8, "relu", name="up"), layers.Dense(6, name="down")
    inputs = keras.Input((6,))
    flat = down(up(inputs))
    return keras.Model(inputs, down(up(layers.RepeatVector(3, name="repeat")(flat))), name="ranks")


def whole_tensor_twice() -> keras.Model:
    """A product of a sharded tensor and twice the same whole one."""
    inputs = keras.Input((6,))
    gate = layers.Dense(1, name="gate")(inputs)
    product = layers.Multiply(name="product")([layers.Dense(8, name="up")(inputs), gate, gate])
    return keras.Model(inputs, layers.Dense(4, name="down")(product), name="twice")


def passed_on() -> keras.Model:
    inputs = keras.Input((6,))
    gate = layers.Dense(1, name="gate")(inputs)
    product, scale = ScalesAndPassesOn(name="scales")(layers.Dense(8, name="up")(inputs), gate)
    return keras.Model(inputs, layers.Dense(4, name="down")(product) * scale, name="passed_on")


def packed_projections() -> keras.Model:
    """One layer for three projections, taken apart again."""
    inputs = keras.Input((6,))
    query, key, value = ops.split(layers.Dense(24, name="up")(inputs), 3, axis=-1)
    return keras.Model(inputs, layers.Dense(4, name="down")(ops.sigmoid(query * key) * value), name="packed")


def skip_connections() -> keras.Model:
    """Down and up again, each level beside the one of its size, as U-Nets are."""
    inputs = keras.Input((6,))
    wide = layers.Dense(8, "relu", name="a_up")(inputs)
    narrow = layers.Dense(4, "relu", name="a_down")(wide)
    again = layers.Concatenate(name="beside")([layers.Dense(8, "relu", name="b_up")(narrow), wide])
    return keras.Model(inputs, layers.Add()([layers.Dense(6, name="b_down")(again), inputs]), name="unet")


def two_towers() -> keras.Model:
    """Embeddings of two kinds of ids, in a tower each, and how near they are."""
    inputs = keras.Input((6,))
    ids = ops.cast(ops.minimum(ops.abs(inputs) * 8, 15), "int32")
    towers = []
    for name, part in (("user", ids[:, :3]), ("item", ids[:, 3:])):
        x = ops.mean(layers.Embedding(16, 8, name=f"{name}_table")(part), axis=1)
        towers.append(layers.Dense(4, name=f"{name}_down")(layers.Dense(8, "relu", name=f"{name}_up")(x)))
    near = layers.Dot(axes=-1, normalize=True, name="near")(towers)
    return keras.Model(inputs, near * layers.Dense(1, name="bias")(inputs), name="recommender")


def several_heads() -> keras.Model:
    """A trunk inside a model inside a model, and heads for several tasks on it."""
    trunk = keras.Sequential([layers.Dense(8, "relu", name="up"), layers.Dense(6, name="down")], name="trunk")
    inner = keras.Input((6,))
    nested = keras.Model(inner, trunk(inner), name="nested")
    inputs = keras.Input((6,))
    shared = nested(inputs)
    heads = [layers.Dense(4, name=f"{name}_down")(layers.Dense(8, name=f"{name}_up")(shared)) for name in "ab"]
    return keras.Model(inputs, layers.Concatenate(name="all")([*heads, nested(inputs * 2)]), name="tasks")


MODELS: dict[str, Callable[[], keras.Model]] = {
    "constant from a sharded dim": lambda: between(ScaleBySize(name="scale")),
    "scan over the sharded dim": lambda: between(CumulativeSum(name="sum")),
    "subclass of dropout": lambda: between(DropoutAndMore(0.5, name="dropout")),
    "loss of a sharded tensor": lambda: between(AddsSquares(name="squares")),
    "batch normalization": lambda: between(layers.BatchNormalization(name="norm")),
    "shared tower": shared_tower,
    "shared over ranks": shared_over_ranks,
    "whole tensor twice": whole_tensor_twice,
    "passed on": passed_on,
    "norm written by hand": lambda: written(rms_norm),
    "mean and maximum": lambda: written(mean_and_maximum),
    "best two": lambda: written(best_two),
    "features with features": lambda: written(features_with_features),
    "heads": lambda: written(in_heads),
    "in place": lambda: written(in_place),
    "norm": lambda: written(norm_of_all),
    "gather": lambda: written(gathered_features),
    "view read whole too": lambda: written(view_read_whole_too),
    "written into": lambda: written(written_into),
    "by its size": lambda: written(by_its_size),
    "own gradient": lambda: written(own_gradient),
    "own generator": lambda: written(own_generator),
    "read without gradient first": lambda: written(read_without_gradient_first),
    "rows": rows,
    "learned queries": learned_queries,
    "layer normalization": lambda: between(layers.LayerNormalization(name="layer_norm")),
    "group normalization": lambda: between(layers.GroupNormalization(4, name="group_norm")),
    "packed projections": packed_projections,
    "skip connections": skip_connections,
    "two towers": two_towers,
    "several heads": several_heads,
}
PREFIXED = {f".*{pattern}": axes for pattern, axes in MLP.items()}
PREFIXED |= {"norm/.*": ("model",), ".*_table/embeddings": ("model", None)}
PREFIXED |= {"rows/(down_kernel|rows_table)": ("model", None), "written/weight": ("model",)}
PREFIXED |= {"learned/queries": (None, "model", None), "learned/scale": ("model",)}


def built(build: Callable[[], keras.Model]) -> keras.Model:
    """Return the model in float64 with random weights, the same at every call."""
    CASES["mlp"].build("float64")  # makes Keras compute float64 in float64
    keras.utils.clear_session()
    keras.config.set_floatx("float64")
    model = build()
    rng = np.random.default_rng(1)
    model.set_weights([np.abs(rng.standard_normal(weight.shape)) * 0.5 for weight in model.get_weights()])
    return model


def step(model: keras.Model, x: torch.Tensor) -> dict[str, np.ndarray]:
    """Return the output and all gradients of one step."""
    model.zero_grad()
    output = model(x, training=True)
    loss = (output * torch.linspace(0.5, 1.5, output.numel()).reshape(output.shape)).sum()
    for added in model.losses:
        loss = loss + added.sum()
    loss.backward()
    found = {"output": output, "input": x.grad} | {
        key: variable.value.grad for key, variable in named_variables(model).items() if variable.trainable
    }
    return {key: _whole(tensor) for key, tensor in found.items() if tensor is not None}


def _whole(tensor: Any) -> np.ndarray:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().numpy().copy()


# On the ranks


def both(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    models = [built(MODELS[name]) for _ in range(2)]
    x = torch.as_tensor(np.random.default_rng(0).standard_normal((3, 6)))
    tp_planner.parallelize(models[1], layout_map(PREFIXED))
    single, sharded = (step(model, x) for model in models)
    return single, sharded


def with_gradient_of_the_input() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    models = [built(plain) for _ in range(2)]
    tp_planner.parallelize(models[1], layout_map(MLP))
    x = np.random.default_rng(0).standard_normal((3, 6))
    single, sharded = (step(model, torch.tensor(x, requires_grad=True)) for model in models)
    return single, sharded


def planned_inside(mode: str) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Shard a model, and restore it, inside of a mode of torch, and train it outside."""
    models = [built(plain) for _ in range(2)]
    x = torch.as_tensor(np.random.default_rng(0).standard_normal((3, 6)))
    results = []
    for change in (lambda model: tp_planner.parallelize(model, layout_map(MLP)), tp_planner.restore):
        with TORCH_MODES[mode]():
            change(models[1])
        single, sharded = (step(model, x) for model in models)
        results.append((single, sharded))
    return results


def unfrozen_later() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Plan with frozen layers, then train them."""
    models = [
        built(lambda: keras.Model(i := keras.Input((6,)), plain()(layers.Dense(6, name="first")(i)))) for _ in range(2)
    ]
    for model in models:
        model.get_layer("first").trainable = False
    tp_planner.parallelize(models[1], layout_map({f".*{pattern}": axes for pattern, axes in MLP.items()}))
    for model in models:
        model.get_layer("first").trainable = True
    x = torch.as_tensor(np.random.default_rng(0).standard_normal((3, 6)))
    single, sharded = (step(model, x) for model in models)
    return single, sharded


def quantized(mode: str) -> list[tuple[np.ndarray, ...]]:
    """Return what a quantized model gives in a single process and in shards, and the shapes of the kernels."""
    models, results = [], []
    for _ in range(2):
        keras.utils.clear_session()
        keras.config.set_floatx("float32")
        inputs = keras.Input((6,))
        x = layers.Dense(8, "relu", name="up")(inputs)
        x = layers.EinsumDense("ab,bc->ac", 8, bias_axes="c", name="e_up")(x)
        model = keras.Model(inputs, layers.Dense(4, name="down")(x), name="quantized")
        rng = np.random.default_rng(1)
        model.set_weights([rng.standard_normal(weight.shape) for weight in model.get_weights()])
        with warnings.catch_warnings(action="ignore"):  # inputs cannot be quantized
            model.quantize(mode)
        models.append(model)
    tp_planner.parallelize(models[1], layout_map(PREFIXED))
    for model in models:
        x = torch.as_tensor(np.random.default_rng(0).standard_normal((3, 6)).astype("float32")).requires_grad_()
        output = model(x)
        output.square().sum().backward()
        results.append((output.detach().numpy(), x.grad.numpy(), model.predict(x.detach().numpy(), verbose=0)))
    kernels = [model.get_layer(name)._kernel._value for model in models for name in ("up", "e_up", "down")]
    return [*results, tuple(np.array(getattr(k, "_local_tensor", k).shape) for k in kernels)]


def refused() -> str:
    """Return what is said of a use that cannot be right."""

    def tied_by_hand() -> keras.Model:
        inputs = keras.Input((3,), dtype="int32")
        table = layers.Embedding(10, 8, name="table")
        return keras.Model(inputs, ops.matmul(table(inputs), ops.transpose(table.embeddings)), name="tied")

    try:
        tp_planner.parallelize(built(tied_by_hand), layout_map({"table/embeddings": ("model", None)}))
    except tp_planner.PlanError as error:
        return str(error)
    return "not refused"


# In the parent


def check(results: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]) -> None:
    for single, sharded in results:
        assert single.keys() == sharded.keys()
        for key, value in single.items():
            np.testing.assert_allclose(sharded[key], value, rtol=1e-11, atol=1e-13, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_model(pools: Callable[[int], WorkerPool], name: str) -> None:
    check(pools(2).run(both, name))


def test_weight_that_is_handed_on_is_gathered_where_it_is_read() -> None:
    """The plan says so of the layer whose code reads it; for the layers that are given it, it is any tensor."""
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), ["cpu:0", "cpu:1"])
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["learned/queries"] = (None, "model", None)
    planned = tp_planner.plan(learned_queries(), layouts)
    gathered = {layer.layer: layer.reason for layer in planned.layers if layer.style == "gathered"}
    reason = "stored sharded, gathered at use: 'learned' hands it on to other layers, or returns it"
    assert gathered == {"learned": reason}
    assert [collective.layer for collective in planned.collectives if collective.phase == "forward"] == ["learned"]


def test_gradient_of_the_input(pools: Callable[[int], WorkerPool]) -> None:
    """Inputs need no gradient when the model is planned, and may when it runs."""
    check(pools(2).run(with_gradient_of_the_input))


@pytest.mark.parametrize("mode", TORCH_MODES)
def test_modes_of_torch_in_which_a_model_is_planned(pools: Callable[[int], WorkerPool], mode: str) -> None:
    """They are about what the user computes: planning looks at no values, and shards can be trained later."""
    for results in pools(2).run(planned_inside, mode):
        check(results)


def test_layers_that_are_unfrozen_later(pools: Callable[[int], WorkerPool]) -> None:
    """A plan holds whatever is trainable: fine-tuning freezes and unfreezes layers under it."""
    check(pools(2).run(unfrozen_later))


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_layers(pools: Callable[[int], WorkerPool], mode: str) -> None:
    """Quantized kernels are stored in shards, and everything is what a single process computes, to the bit."""
    for single, sharded, shapes in pools(2).run(quantized, mode):
        for expected, found in zip(single, sharded, strict=True):
            np.testing.assert_array_equal(found, expected)
        assert [2 * part.prod() for part in shapes[3:]] == [whole.prod() for whole in shapes[:3]]


def test_values_computed_when_the_model_was_built_are_refused(pools: Callable[[int], WorkerPool]) -> None:
    """Ops on a variable outside of a layer's call run once, at building, and would keep the old value."""
    assert pools(2).run(refused)[0] == (
        "model 'tied' cannot be planned: layer 'tied' uses a tensor of shape (8, 10) that was computed from a "
        "variable when the model was built and does not follow it; compute it in a layer's call instead"
    )
