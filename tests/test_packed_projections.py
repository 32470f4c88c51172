"""Several projections in one kernel: each rank stores its own part of each, whatever way the code takes them apart."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
from keras import layers, ops
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as TorchReplicate

import tp_planner
from tests.keras_distribution.test_model_parallel import model_parallel
from tests.models import building, randomize
from tests.workers import Pools, layout_map
from tp_planner.explain import explain
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.storage.variables import is_sharded

WIDTH = 16
RULES = {
    "block/(qkv|gate_up)/kernel": (None, "model"),
    "block/(qkv|gate_up)/bias": ("model",),
    "block/(out|down)/kernel": ("model", None),
    "block/fused/kernel": (None, "model"),
    "block/fused/bias": ("model",),
    "block/fused_out/kernel": ("model", None),
}
# How the code takes the projections apart, and heads of queries and of keys, of 4 each.
WAYS = {
    "equal parts": ("chunks", 4, 4),
    "sizes": ("sizes", 8, 4),
    "slices": ("slices", 8, 4),
    "parts of a part": ("nested", 8, 4),
    "a dim of its own": ("view", 4, 4),
    "side by side again": ("fused", 4, 4),
}


class Block(layers.Layer):
    """Attention and a feed-forward layer whose projections are packed; in one kernel all of them, as Flux has it."""

    def __init__(self, way: str, heads: int, kv_heads: int, **options: Any) -> None:
        super().__init__(**options)
        self.way, self.heads, self.q, self.k = way, heads, 4 * heads, 4 * kv_heads
        if way == "fused":
            self.fused = layers.Dense(self.q + 2 * self.k + 2 * WIDTH, name="fused", dtype=self.dtype_policy)
            self.fused_out = layers.Dense(WIDTH, name="fused_out", dtype=self.dtype_policy)
        else:
            self.qkv = layers.Dense(self.q + 2 * self.k, name="qkv", dtype=self.dtype_policy)
            self.out = layers.Dense(WIDTH, name="out", dtype=self.dtype_policy)
            self.gate_up = layers.Dense(4 * WIDTH, name="gate_up", dtype=self.dtype_policy)
            self.down = layers.Dense(WIDTH, name="down", dtype=self.dtype_policy)

    def call(self, x: Any) -> Any:
        if self.way == "fused":
            packed, mlp = ops.split(self.fused(x), [self.q + 2 * self.k], axis=-1)
            attended = self.attend(*ops.split(packed, [self.q, self.q + self.k], axis=-1))
            return x + self.fused_out(ops.concatenate([attended, ops.gelu(mlp)], axis=-1))
        x = x + self.out(self.attend(*self.taken_apart(self.qkv(x))))
        gate, up = ops.split(self.gate_up(x), 2, axis=-1)
        return x + self.down(ops.silu(gate) * up)

    def taken_apart(self, y: Any) -> Any:
        match self.way:
            case "chunks":
                return ops.split(y, 3, axis=-1)
            case "sizes":
                return ops.split(y, [self.q, self.q + self.k], axis=-1)
            case "slices":
                return y[..., : self.q], y[..., self.q : self.q + self.k], y[..., -self.k :]
            case "nested":
                q, kv = ops.split(y, [self.q], axis=-1)
                return q, *ops.split(kv, 2, axis=-1)
        return ops.unstack(ops.reshape(y, (*ops.shape(y)[:2], 3, self.heads, 4)), axis=2)

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        batch, length = ops.shape(q)[:2]
        q, k, v = (ops.reshape(each, (batch, length, -1, 4)) for each in (q, k, v))
        k, v = (ops.repeat(each, self.q // self.k, axis=2) for each in (k, v))
        scores = ops.softmax(ops.einsum("bqhd,bkhd->bhqk", q, k))
        return ops.reshape(ops.einsum("bhqk,bkhd->bqhd", scores, v), (batch, length, -1))


def model_of(way: str, dtype: str = "float64", seed: int = 0) -> keras.Model:
    with building(dtype):
        inputs = keras.Input((6, WIDTH), dtype=dtype)
        outputs = Block(*WAYS[way], name="block")(layers.Dense(WIDTH, name="first")(inputs))
        return randomize(keras.Model(inputs, layers.Dense(3, name="last")(outputs)), seed)


LAYOUT = Layout(Mesh((("model", 2),)), tuple(LayoutRule(pattern, axes) for pattern, axes in RULES.items()))


def plan_of(model: keras.Model) -> tp_planner.Plan:
    return tp_planner.plan(model, LAYOUT)


def stored(plan: tp_planner.Plan, path: str) -> list[str]:
    return [str(each.placement) for each in plan.variables if each.path.startswith(path)]


@pytest.mark.parametrize("way", WAYS)
def test_no_gather(way: str) -> None:
    """A block has Megatron's collectives: an all-reduce at the end of each region, and one of its input's gradient."""
    plan = plan_of(model_of(way))
    assert tp_planner.Plan.from_json(plan.to_json()) == plan
    assert {each.kind for each in plan.collectives} == {"all_reduce"}
    assert len(plan.collectives) == (2 if way == "side by side again" else 4)


def test_parts_are_in_the_plan() -> None:
    """The plan says of which parts a kernel and its bias are, and so does what it prints."""
    model = model_of("parts of a part")
    plan = plan_of(model)
    assert stored(plan, "block/qkv") == ["S(1:32+16+16)", "S(0:32+16+16)"]
    assert stored(plan, "block/gate_up") == ["S(1:32+32)", "S(0:32+32)"]
    assert "S(d:a+b): dim d is parts of a and b side by side; every rank has its share of each" in str(plan)
    explained = explain(model, LAYOUT, "block/qkv")
    assert [each.placement for each in explained.variables] == ["S(1:32+16+16)", "S(0:32+16+16)"]
    assert explained.variables[0].reason.endswith(
        "; its dim is parts side by side, each of which is sharded, because the code takes it apart so"
    )


def test_parts_that_are_put_side_by_side() -> None:
    """Rows of the kernel that takes them are stored in the parts in which they come."""
    plan = plan_of(model_of("side by side again"))
    assert stored(plan, "block/fused/") == ["S(1:16+16+16+32)", "S(0:16+16+16+32)"]
    assert stored(plan, "block/fused_out") == ["S(0:16+32)", "R"]


def test_parts_that_do_not_divide() -> None:
    """Of parts that do not divide no rank can have its own: the layer is gathered, and the plan says so."""
    inputs = keras.Input((6, WIDTH))
    packed = layers.Dense(24, name="qkv")(inputs)
    model = keras.Model(inputs, packed[..., :15] * packed[..., 9:])
    plan = tp_planner.plan(model, Layout(Mesh((("model", 2),)), (LayoutRule("qkv/kernel", (None, "model")),)))
    reason = next(each.reason for each in plan.layers if each.layer == "qkv")
    assert stored(plan, "qkv") == ["S(1)", "R"]
    assert reason.endswith("its parts of 15 and 9 do not each divide by 2")


# On the ranks


def whole_gradient(variable: Any) -> np.ndarray:
    gradient = variable._value.grad
    if is_sharded(variable):
        gradient = variable._stored.sharding.whole(gradient._local_tensor, tuple(variable.shape))
    return np.array(gradient.detach().numpy())


def trained(model: keras.Model) -> dict[str, np.ndarray]:
    """Return outputs, gradients and weights of a model that takes steps of Keras's Adam and then of torch's."""
    rng, found = np.random.default_rng(0), {}
    x, y = rng.normal(size=(2, 6, WIDTH)), rng.normal(size=(2, 6, 3))
    variables = {key: each for key, each in named_variables(model).items() if each.trainable}
    found["output"] = keras.ops.convert_to_numpy(model(x))
    ((model(x) - torch.as_tensor(y)) ** 2).mean().backward()
    found |= {f"gradient of {key}": whole_gradient(each) for key, each in variables.items()}
    model.zero_grad()
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse")
    for _ in range(3):
        model.train_on_batch(x, y)
    optimizer = torch.optim.Adam(list(model.parameters()), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        ((model(x) - torch.as_tensor(y)) ** 2).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return found | {f"weight {key}": np.array(each.numpy()) for key, each in variables.items()}


def differences(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    scale = max(float(np.abs(each).max()) for key, each in expected.items() if key.startswith("gradient"))
    return {
        key: error
        for key, value in expected.items()
        if not (error := float(np.abs(found[key] - value).max()) / scale) < 1e-9
    }


def train_all(ways: list[str]) -> dict[str, Any]:
    """Return what differs from one device: training, files and weights there and back, and restored weights."""
    found: dict[str, Any] = {}
    for way in ways:
        expected = trained(model_of(way)) if dist.get_rank() == 0 else {}
        box = [expected]
        dist.broadcast_object_list(box, 0)
        model = model_of(way, seed=dist.get_rank())
        plan = tp_planner.plan(model, layout_map(RULES), loss="mse", optimizer=keras.optimizers.Adam(0.01))
        tp_planner.parallelize(model, plan)
        trained_here = trained(model)
        found[way] = differences(trained_here, box[0])
        found[way] |= there_and_back(model)
        folder = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folder, 0)
        tp_planner.save_checkpoint(model, folder[0])
        tp_planner.restore(model)
        model.set_weights([np.zeros_like(each) for each in model.get_weights()])
        tp_planner.load_checkpoint(model, folder[0])  # by a model whose kernels are whole
        weights = {f"weight {key}": np.array(each.numpy()) for key, each in named_variables(model).items()}
        found[way] |= {f"restored {k}": 1.0 for k, v in weights.items() if not np.array_equal(v, trained_here[k])}
        with model_parallel(RULES):
            born = model_of(way)
            found[way] |= {f"born {k}": v for k, v in differences(trained(born), box[0]).items()}
            found[way] |= {f"born {k}": v for k, v in there_and_back(born).items()}
    return found


def trained_on(model: keras.Model) -> dict[str, np.ndarray]:
    """Return the weights after a step with slots that had values before the model is first called, as loaded ones."""
    rng = np.random.default_rng(0)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.optimizer.build(model.trainable_variables)
    for slot in model.optimizer.variables[2:]:
        slot.assign(rng.standard_normal(slot.shape))
    model.train_on_batch(rng.standard_normal((4, 6, WIDTH)), rng.standard_normal((4, 6, 3)))
    return dict(zip([each.path for each in model.variables], model.get_weights(), strict=True))


def train_on_with_slots_that_are_there() -> dict[str, float]:
    expected = trained_on(model_of("sizes"))
    with model_parallel(RULES):
        found = trained_on(model_of("sizes"))
    return {key: float(np.abs(found[key] - value).max()) for key, value in expected.items()}


def there_and_back(model: keras.Model) -> dict[str, float]:
    """Return which weights are others in a file, in one that is read again, and after ``set_weights``."""
    before = model.get_weights()
    name = [Path(tempfile.mkdtemp()) / "model.weights.h5"]
    dist.broadcast_object_list(name, 0)
    model.save_weights(name[0])
    model.set_weights([np.zeros_like(each) for each in before])
    model.load_weights(name[0])
    loaded = model.get_weights()
    model.set_weights([2 * each for each in before])
    doubled = model.get_weights()
    pairs = [("loaded", a, b) for a, b in zip(before, loaded, strict=True)]
    pairs += [("set", 2 * a, b) for a, b in zip(before, doubled, strict=True)]
    model.set_weights(before)
    return {f"{what} {number}": 1.0 for number, (what, a, b) in enumerate(pairs) if not np.array_equal(a, b)}


def test_same_as_on_one_device(pools: Pools) -> None:
    """Outputs, every gradient, weights after both kinds of optimizer, and weights in files are those of one device."""
    for found in pools(2).run(train_all, ["equal parts", "slices", "side by side again"]):
        assert found == {"equal parts": {}, "slices": {}, "side by side again": {}}


@pytest.mark.slow
def test_same_as_on_one_device_of_four(pools: Pools) -> None:
    """The same with every way of taking projections apart, on four ranks."""
    for found in pools(4).run(train_all, [*WAYS]):
        assert found == {way: {} for way in WAYS}


# What torch makes of a kernel of unequal parts: the whole in its own order, or a refusal.
MADE: dict[str, Callable[[Any], Any]] = {
    "whole": lambda tensor: tensor,
    "a copy": lambda tensor: tensor.detach().clone(),
    "a product": lambda tensor: 2 * tensor.detach(),
    "another order of dims": lambda tensor: tensor.detach().T,
    "some rows": lambda tensor: tensor.detach()[:4],
}
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "redistribute": (lambda tensor: tensor.redistribute(placements=[TorchReplicate()]), "torch cannot redistribute it"),
    "some columns": (
        lambda tensor: tensor.detach()[:, 20:40],
        "an op of torch's on it would have to redistribute it",
    ),
    "a file of torch's": (
        lambda tensor: tensor.__create_write_items__("kernel", tensor),
        "torch.distributed.checkpoint would write it in the order in which it is stored",
    ),
}


def seen_by_torch() -> tuple[list[str], list[str]]:
    """Return what torch has in another order than a plain model, and what refusals say."""
    plain, model = model_of("slices"), model_of("slices")
    tp_planner.parallelize(model, layout_map(RULES))
    x = torch.as_tensor(np.random.default_rng(0).normal(size=(2, 6, WIDTH)))
    kernels = []
    for each in (plain, model):
        (each(x) ** 2).mean().backward()
        kernels.append(named_variables(each)["block/qkv/kernel"]._value)
    expected, kernel = kernels
    pairs = {name: (make(kernel).full_tensor(), make(expected)) for name, make in MADE.items()}
    pairs["gradient"] = (kernel.grad.full_tensor(), expected.grad)
    pairs["sum"] = (kernel.detach().sum().full_tensor(), expected.detach().sum())
    states = plain.state_dict()
    for name, value in model.state_dict().items():
        pairs[name] = (value.full_tensor() if isinstance(value, DTensor) else value, states[name])
    wrong = [name for name, pair in pairs.items() if not torch.allclose(*pair, rtol=1e-12)]
    said = []
    for act, _ in REFUSED.values():
        with pytest.raises(tp_planner.PlanError) as refusal:
            act(kernel)
        said.append(str(refusal.value))
    return wrong, said


def test_torch_sees_unequal_parts_in_order_or_not_at_all(pools: Pools) -> None:
    """Gradients, copies and ``state_dict()`` of an unequally packed kernel are whole in the model's own order."""
    for wrong, said in pools(2).run(seen_by_torch):
        assert wrong == []
        assert said == [
            f"a tensor is stored in parts of 32, 16, 16 side by side, for which torch has no placement; {why}; take "
            f"its full_tensor(), variable.numpy(), model.save_weights or tp_planner.save_checkpoint"
            for _, why in REFUSED.values()
        ]


def test_slots_that_are_there_before_the_plan(pools: Pools) -> None:
    """They are in the order of what is stored, as the variables are that were born in shards."""
    for errors in pools(2).run(train_on_with_slots_that_are_there):
        assert {key: error for key, error in errors.items() if not error <= 1e-12} == {}
