"""What people do to a model once it is sharded: it does what it does on one device, or an error says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch.nn.utils import clip_grad_norm_

import tp_planner
from tests.models import building, randomize
from tests.workers import Pools, layout_map
from tp_planner.frontend.layer_tree import named_variables

RULES: dict[str, tuple[str | None, ...]] = {
    ".*up/kernel": (None, "model"),
    ".*up/bias": ("model",),
    ".*down/kernel": ("model", None),
}
Arrays = dict[str, np.ndarray]
NORMS = (1.0, 2.0, 3.0, float("inf"), float("-inf"), 0.0)


def batch() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).standard_normal((8, 8)))


def pair(name: str = "pair", width: int = 14) -> keras.Model:
    """Two layers; of their 14 features four processes hold 4, 4, 4 and 2."""
    with building("float64"):
        x = keras.Input((8,))
        up = keras.layers.Dense(width, activation="gelu", name=f"{name}_up")(x)
        model = keras.Model(x, keras.layers.Dense(4, name=f"{name}_down")(up), name=name)
    return randomize(model)


class Distiller(keras.Model):
    """Trains a student on what a teacher says, which is called in the loss alone."""

    def __init__(self, student: keras.Model, teacher: keras.Model) -> None:
        super().__init__(name="distiller")
        self.student, self.teacher = student, teacher

    def call(self, x: Any) -> Any:
        return self.student(x)

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, *args: Any, **kwargs: Any) -> Any:
        return keras.ops.mean((self.teacher(x) - y_pred) ** 2)


# On the ranks


def whole(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    array: np.ndarray = tensor.detach().numpy().copy()
    return array


def weights(model: keras.Model) -> Arrays:
    return {key: whole(variable.value) for key, variable in named_variables(model).items()}


def sharded(model: keras.Model) -> keras.Model:
    return tp_planner.parallelize(model, layout_map(RULES))


def as_replicas(model: keras.Model) -> keras.Model:
    """Two replicas of two shards each, which store some variables in parts; all are fed the same."""
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), [f"cpu:{rank}" for rank in range(4)])
    layouts = keras.distribution.LayoutMap(mesh)
    for pattern, axes in {**RULES, ".*up/kernel": ("batch", "model")}.items():
        layouts[pattern] = axes
    return tp_planner.parallelize(model, layouts, batch_axis="batch")


def with_gradients(model: keras.Model) -> list[torch.nn.Parameter]:
    model.zero_grad()
    (model(batch(), training=True) ** 2).mean().backward()
    return list(model.parameters())


def norms_and_clipping(model: keras.Model) -> Arrays:
    """Return norms of the gradients, and what clipping makes of them, by norm and by value."""
    found = {}
    for order in NORMS:
        parameters = with_gradients(model)
        gradients = [each.grad for each in parameters]
        found[f"norm {order}"] = whole(torch.nn.utils.get_total_norm(gradients, order))
        found[f"first norm {order}"] = whole(torch.nn.utils.get_total_norm(gradients[0], order))
    for foreach in (None, True, False):
        parameters = with_gradients(model)
        found[f"norm before {foreach}"] = whole(clip_grad_norm_(parameters, 0.1, foreach=foreach))
        found |= {f"clipped {foreach} {number}": whole(each.grad) for number, each in enumerate(parameters)}
        torch.nn.utils.clip_grad_value_(parameters, 0.01, foreach=foreach)
        found |= {f"clamped {foreach} {number}": whole(each.grad) for number, each in enumerate(parameters)}
    return found


def torch_loop(model: keras.Model) -> Arrays:
    """Return the weights after steps of optimizers that update lists of tensors at once."""
    for options in ({"foreach": True}, {"fused": True}, {}):
        optimizer = torch.optim.AdamW(model.parameters(), 0.05, **options)
        for _ in range(2):
            clip_grad_norm_(with_gradients(model), 0.1)
            optimizer.step()
    return weights(model)


def frozen_in_turn(model: keras.Model) -> Arrays:
    """Return the weights after training with one layer frozen, and then the other."""
    up, down = model.layers[1:]
    for frozen, trained in ((up, down), (down, up)):
        frozen.trainable, trained.trainable = False, True
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(batch().numpy(), np.ones((8, 4)), batch_size=4, shuffle=False, verbose=0)
    return weights(model)


USES: dict[str, Callable[[keras.Model], Arrays]] = {
    "norms and clipping": norms_and_clipping,
    "torch loop": torch_loop,
    "frozen in turn": frozen_in_turn,
}


def compare_uses(shard: Callable[[keras.Model], keras.Model] = sharded) -> dict[str, float]:
    """Return how far the results of each use are from those of one device, relative to the largest of them."""
    worst = {}
    for name, use in USES.items():
        expected, found = use(pair()), use(shard(pair()))
        assert found.keys() == expected.keys()
        errors = [np.abs(found[key] - expected[key]).max() / np.abs(expected[key]).max() for key in expected]
        worst[name] = float(max(errors))
    return worst


def distilled(shard: bool, train_teacher: bool) -> Arrays:
    model = Distiller(pair("student"), pair("teacher", 16))
    model.teacher.trainable = train_teacher
    model.build((None, 8))
    if shard:
        tp_planner.parallelize(model, layout_map(RULES), inputs=batch())
    model.compile(keras.optimizers.Adam(0.05))
    history = model.fit(batch().numpy(), epochs=2, batch_size=4, shuffle=False, verbose=0).history["loss"]
    return {"loss": np.array(history), **weights(model)}


def compare_distilled() -> float:
    errors = []
    for train_teacher in (False, True):
        expected, found = distilled(False, train_teacher), distilled(True, train_teacher)
        errors += [np.abs(found[key] - expected[key]).max() for key in expected]
    return float(max(errors))


CHANGES: dict[str, Callable[[keras.Model], object]] = {
    "enable_lora": lambda model: model.get_layer("pair_up").enable_lora(2),
    "quantize": lambda model: model.get_layer("pair_down").quantize("int8"),
    "quantize a model": lambda model: model.quantize("int8"),
    "build": lambda model: model.get_layer("pair_up").build((None, 8)),
    "add_weight": lambda model: model.get_layer("pair_up").add_weight((3,), name="more"),
    "regularizer": lambda model: setattr(model.get_layer("pair_up").kernel, "regularizer", keras.regularizers.L2(0.1)),
    "constraint": lambda model: setattr(model.get_layer("pair_up").kernel, "constraint", keras.constraints.MaxNorm(1)),
    "one vector": lambda model: torch.nn.utils.parameters_to_vector(model.parameters()),
    "from one vector": lambda model: torch.nn.utils.vector_to_parameters(torch.zeros(200), model.parameters()),
}


class Table(keras.layers.Layer):
    """Makes a table when it is built."""

    def build(self, shape: Any) -> None:
        self.table = torch.arange(1.0, shape[-1] + 1)

    def call(self, x: Any) -> Any:
        return x * self.table


class Late(keras.layers.Layer):
    """Has a layer that is built in its first call on data."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.table = Table(name="table")

    def build(self, shape: Any) -> None:
        pass

    def compute_output_shape(self, shape: Any) -> Any:
        return shape

    def call(self, x: Any) -> Any:
        return self.table(x)


def built_late() -> tuple[np.ndarray, np.ndarray]:
    """Return what a model with a layer that is built in its first call makes on one device and sharded."""
    found = []
    for shard in (lambda model: model, sharded):
        inner = pair()
        model = keras.Model(inner.inputs, Late(name="late")(inner.outputs[0]), name="pair")
        found.append(shard(model)(batch()).detach().numpy())
    return found[0], found[1]


def changed() -> tuple[dict[str, str], bool, bool]:
    """Return what each change is refused with, and whether the model is as before, and can be changed once restored."""
    model = sharded(pair())
    before, said = weights(model), {}
    for name, change in CHANGES.items():
        with pytest.raises(tp_planner.PlanError) as refusal:
            change(model)
        said[name] = str(refusal.value)
    same = all(np.array_equal(array, before[key]) for key, array in weights(model).items())
    tp_planner.restore(model)
    CHANGES["enable_lora"](model)
    again = np.allclose(pair()(batch()).detach(), sharded(model)(batch()).detach())
    return said, same, again


# In the parent


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_helpers_of_torch_and_frozen_layers(pools: Pools, processes: int) -> None:
    for worst in pools(processes).run(compare_uses):
        assert worst == pytest.approx(dict.fromkeys(USES, 0.0), abs=1e-12)


@pytest.mark.slow
def test_helpers_of_torch_and_frozen_layers_of_replicas(pools: Pools) -> None:
    for worst in pools(4).run(compare_uses, as_replicas):
        assert worst == pytest.approx(dict.fromkeys(USES, 0.0), abs=1e-12)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_teacher_that_only_the_loss_calls(pools: Pools, processes: int) -> None:
    assert pools(processes).run(compare_distilled) == pytest.approx([0.0] * processes, abs=1e-12)


def _refusal(what: str, change: str) -> str:
    return (
        f"{what} is parallelized, and {change}() would change variables that its plan names; call it before the model "
        f"is parallelized, or call tp_planner.restore(model) first on all ranks, and parallelize the model again"
    )


def _refusal_of_functions(what: str) -> str:
    return (
        f"variable 'pair_up/kernel' is parallelized, and its plan has what its {what} communicates; set it before the "
        f"model is parallelized, or call tp_planner.restore(model) first on all ranks, and parallelize the model again"
    )


def test_changes_are_refused(pools: Pools) -> None:
    vector = (
        "a parameter of shape (14, 4) is stored in shards; one vector of all parameters would be the whole model on "
        "every rank, and is not made by torch's parameters_to_vector nor read by vector_to_parameters; call "
        "tp_planner.restore(model) first on all ranks"
    )
    up, down = "layer 'pair_up' of model 'pair'", "layer 'pair_down' of model 'pair'"
    expected = {
        "enable_lora": _refusal(up, "enable_lora"),
        "quantize": _refusal(down, "quantize"),
        "quantize a model": _refusal("model 'pair'", "quantize"),
        "build": _refusal(up, "build"),
        "add_weight": _refusal(up, "add_weight"),
        "regularizer": _refusal_of_functions("regularizer"),
        "constraint": _refusal_of_functions("constraint"),
        "one vector": vector,
        "from one vector": vector,
    }
    for said, same, again in pools(2).run(changed):
        assert said == expected
        assert same
        assert again


def test_layers_are_built_in_their_first_call(pools: Pools) -> None:
    """A layer that adds no variables may be built once the model is parallel, as one that makes tables."""
    for expected, found in pools(2).run(built_late):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
