"""Torch modules inside Keras models: planned by torch's names of their parameters, and right whatever is sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import tp_planner
from tests.regions.test_recomputation import step
from tests.test_uses import built
from tests.workers import Pools, layout_map
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.planner import make_plan

layers, ops = keras.layers, keras.ops
Arrays = dict[str, np.ndarray]
Rules = Mapping[str, tuple[str | None, ...]]


class Attention(nn.Module):
    """Causal attention as people write it in torch: a norm, four linear functions, and a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        y = self.norm(x)
        q, k, v = (f(y).view(batch, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(heads.transpose(1, 2).reshape(batch, length, -1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


class Looked(nn.Module):
    """A table of which rows are looked up, used again to say how near each of its rows is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.table((x[..., 0].abs() * 4).clamp(max=7).long())
        return nn.functional.linear(rows, self.table.weight)


def feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def convolved() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv1d(8, 3, 1))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True)


FEED_FORWARD: Rules = {
    "wrapped/0.weight": ("model", None),
    "wrapped/0.bias": ("model",),
    "wrapped/2.weight": (None, "model"),
}
# A module that takes and returns (batch, 3, 8), its rules, and the collectives of a training step.
MODULES: dict[str, tuple[Callable[[], nn.Module], Rules, list[str]]] = {
    "feed-forward": (
        feed_forward,
        FEED_FORWARD,
        ["forward all_reduce linear 2 output", "backward all_reduce input"],
    ),
    "attention": (
        lambda: Attention(8, 4),
        {
            "wrapped/[qkv].weight": ("model", None),
            "wrapped/[qkv].bias": ("model",),
            "wrapped/o.weight": (None, "model"),
        },
        ["forward all_reduce linear 4 output", "backward all_reduce linear 1 input"],
    ),
    "convolutions": (
        convolved,
        {
            "wrapped/0.weight": ("model", None, None),
            "wrapped/0.bias": ("model",),
            "wrapped/2.weight": (None, "model", None),
        },
        ["forward all_reduce conv1d 2 output", "backward all_reduce input"],
    ),
    "torch's encoder": (
        encoder,
        {
            "wrapped/linear1.weight": ("model", None),
            "wrapped/linear1.bias": ("model",),
            "wrapped/linear2.weight": (None, "model"),
        },
        ["forward all_reduce linear 2 output", "backward all_reduce linear 1 input"],
    ),
    "rules without sense": (
        feed_forward,
        {"wrapped/0.bias": ("model",), "wrapped/2.weight": ("model", None)},
        ["forward all_gather 0.bias", "forward all_gather 2.weight"],
    ),
    "table": (Looked, {"wrapped/table.weight": ("model", None)}, ["forward all_gather table.weight"]),
}


def around(make: Callable[[], nn.Module]) -> keras.Model:
    inputs = keras.Input((6,))
    x = layers.Dense(8, name="embed")(layers.Reshape((3, 2))(inputs))
    x = layers.TorchModuleWrapper(make().double(), name="wrapped", output_shape=(None, 3, 8))(x)
    return keras.Model(inputs, layers.Flatten()(layers.Dense(3, name="out")(x)), name="around")


# On the ranks


def both(name: str) -> tuple[Arrays, Arrays, list[str]]:
    """Return steps and predictions of a single device and of shards, and the planned collectives."""
    make, rules, _ = MODULES[name]
    single, sharded = (built(lambda: around(make)) for _ in range(2))
    plan = tp_planner.plan(sharded, layout_map(rules), inputs=keras.InputSpec(shape=(3, 6), dtype="float64"))
    tp_planner.parallelize(sharded, plan)
    x = np.random.default_rng(1).standard_normal((5, 6))
    expected, found = step(single), step(sharded, plan)
    expected["prediction"], found["prediction"] = (model.predict(x, verbose=0) for model in (single, sharded))
    tp_planner.restore(sharded)
    expected["restored"], found["restored"] = expected["prediction"], sharded.predict(x, verbose=0)
    planned = [
        f"{each.phase} {each.kind} {each.place.partition(' (')[0].rpartition('/')[2]}" for each in plan.collectives
    ]
    return expected, found, planned


def trained(folder: str) -> list[Arrays]:
    """Return weights after Adam by a single device and on shards, then as either reads the files of both."""
    models = [built(lambda: around(feed_forward)) for _ in range(2)]
    tp_planner.parallelize(models[1], layout_map(FEED_FORWARD))
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((8, 6)), rng.standard_normal((8, 9))
    files = [f"{folder}/single.{dist.get_rank()}.weights.h5", f"{folder}/sharded.weights.h5"]
    for model, file in zip(models, files, strict=True):
        model.compile("adam", "mse", jit_compile=False)
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        model.save_weights(file)
    dist.barrier()
    found = [weights(models[0]), weights(models[1])]
    for model in models:
        for file in files:
            for variable in model.trainable_variables:
                variable.assign(np.zeros(variable.shape))
            model.load_weights(file)
            found.append(weights(model))
    return found


def weights(model: keras.Model) -> Arrays:
    return {
        key: np.asarray(variable).copy()
        for key, variable in tp_planner.frontend.layer_tree.named_variables(model).items()
    }


def stored_by_module() -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the module itself holds on this rank."""
    model = built(lambda: around(feed_forward))
    tp_planner.parallelize(model, layout_map(FEED_FORWARD))
    parameters = model.get_layer("wrapped").module.named_parameters()
    return {name: tuple(getattr(p, "_local_tensor", p).shape) for name, p in parameters}


# In the parent


@pytest.mark.parametrize("name", MODULES)
def test_module(pools: Pools, name: str) -> None:
    """Outputs, gradients and predictions are those of a single device, with Megatron's collectives where that goes."""
    for expected, found, planned in pools(2).run(both, name):
        assert planned == MODULES[name][2]
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-10, atol=1e-12, err_msg=key)


def test_trained_weights_and_their_files(pools: Pools, tmp_path: Path) -> None:
    """Files of parallel and of plain models are alike, and either reads both."""
    for expected, *others in pools(2).run(trained, str(tmp_path)):
        for found in others:
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                np.testing.assert_allclose(found[key], value, rtol=1e-10, atol=1e-12, err_msg=key)


def test_no_rank_keeps_the_whole_module(pools: Pools) -> None:
    for shapes in pools(2).run(stored_by_module):
        assert shapes == {"0.weight": (8, 8), "0.bias": (8,), "2.weight": (8, 8), "2.bias": (8,)}


def test_recurrent_modules_stay_whole() -> None:
    """Torch's recurrent modules hold their parameters in a second place, so that a rule for them is only noted."""
    rule = LayoutRule("wrapped/lstm.weight_ih_l0", ("model", None))
    plan = make_plan(built(lambda: around(Recurrent)), Layout(Mesh((("model", 2),)), (rule,)))
    assert plan.notes[0] == (
        "variable 'wrapped/lstm.weight_ih_l0' is named by layout rule 'wrapped/lstm.weight_ih_l0' but stays whole: "
        "parameters of torch's recurrent modules are kept whole on every rank: the modules hold them twice"
    )
