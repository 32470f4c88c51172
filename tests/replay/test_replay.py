"""Replay: with jit_compile=True calls run without the layers' code, and compute and communicate what they did."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

import tp_planner
from tests.models import CASES, building, randomize
from tests.replicas import MODELS, share
from tests.replicas import layout as replicas_layout
from tests.workers import WorkerPool, layout_map
from tp_planner.frontend.layer_tree import named_variables

layers, ops = keras.layers, keras.ops
BATCH_SIZE = 4
STEPS = 3  # taped and twice replayed, after one as ever
REPLAYED = ["handwritten"]
REPLAYED_SLOWLY = [
    "gpt",
    "mlp",
    "convnet",
    "encoder",
    "encoder_mask_zero",
    "vit",
    "llama",
    "gemma",
    "subclassed",
    "tied",
]


class Scaled(layers.Layer):
    """Divides by the largest value, as a number, where there are values."""

    def call(self, x: Any) -> Any:
        return x / (1.0 + (0.0 if isinstance(x, FakeTensor) or x.is_meta else x.detach().abs().max().item()))


class Keeping(layers.Layer):
    """Keeps the last input."""

    def call(self, x: Any) -> Any:
        self.last = x + 1.0
        return x


class KeepingInside(layers.Layer):
    """Keeps the last input in a container, and adds it to the next."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.memory = SimpleNamespace(last=[])

    def call(self, x: Any) -> Any:
        before, self.memory.last = self.memory.last, [x.detach() + 1.0]
        return x if not before or before[0].is_meta else x + 0.1 * before[0]


class Averaging(torch.nn.Module):
    """Keeps a running mean in a buffer, which it sets anew in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_meta:
            self.mean = 0.5 * self.mean.to(x) + 0.5 * x.mean(0).detach()
        return x + self.mean.to(x)


class Penalized(layers.Layer):
    """Adds a loss."""

    def call(self, x: Any) -> Any:
        self.add_loss(0.01 * ops.mean(ops.square(x)))
        return x


class Drawing(layers.Layer):
    """Adds the same noise each time."""

    def call(self, x: Any) -> Any:
        if x.is_meta or isinstance(x, FakeTensor):
            return x
        return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)


class Counting(layers.Layer):
    """Counts its calls, and does something else from the tenth on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.state = {"calls": 0}

    def call(self, x: Any) -> Any:
        if not (x.is_meta or isinstance(x, FakeTensor)):
            self.state["calls"] += 1
        return x if self.state["calls"] < 10 else 2 * x


class Numbering(layers.Layer):
    """Adds a number that is another in each call, and kept where no attribute tells."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        numbers = itertools.count(1)
        self.next = lambda: next(numbers)

    def call(self, x: Any) -> Any:
        return x if x.is_meta or isinstance(x, FakeTensor) else x + 0.1 * self.next()


def averaged(**options: Any) -> layers.Layer:
    return layers.TorchModuleWrapper(Averaging(), output_shape=(None, 32), **options)


def recomputed(**options: Any) -> layers.Layer:
    with keras.RematScope("full"):
        return layers.Activation("tanh", **options)


MIDDLES: dict[str, tuple[Callable[..., layers.Layer], str]] = {
    "a value": (Scaled, "code depends on values, by aten._local_scalar_dense.default"),
    "a kept tensor": (Keeping, "layer 'middle' keeps a tensor that its call has made"),
    "a tensor kept inside": (KeepingInside, "layer 'middle' keeps a tensor that its call has made"),
    "a buffer": (averaged, "layer 'middle' keeps a tensor that its call has made"),
    "a count": (Counting, "layer 'middle' changes its attribute 'calls' when it is called"),
    "another number": (
        Numbering,
        "code is not the same in each call: it calls torch's add with other arguments",
    ),
    "recomputation": (recomputed, "code runs again in the backward pass"),
    "a loss": (Penalized, "layer 'middle' adds a loss"),
    "a generator": (Drawing, "code draws from a torch.Generator of its own"),
}

# Of what runs again, for torch itself ran code without gradients around it.
WITH_TORCH_2_11 = "code switches gradients or dtypes by other means than torch functions"


# On the ranks


def trained(
    model: keras.Model, loss: Any, batches: list[Any], layout: Any, jit: bool, batch_axis: str | None = None
) -> dict[str, Any]:
    """Train a model on a few batches; return what came out, how often its last layer was called, and warnings."""
    keras.utils.set_random_seed(7)
    x, _ = batches[0]
    plan = tp_planner.plan(model, layout, inputs=x, batch_axis=batch_axis)
    tp_planner.parallelize(model, plan)
    model.compile(keras.optimizers.AdamW(0.01), loss, jit_compile=jit)
    called: list[bool] = []
    model.layers[-1].register_forward_pre_hook(lambda *_: called.append(True))
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("tp_planner").addHandler(handler)
    model.train_on_batch(*batches[0])  # which also calls the model on no data
    called.clear()
    losses = [model.train_on_batch(x, y) for x, y in batches[:-1]]
    with tp_planner.record(model) as recorder:
        losses.append(model.train_on_batch(*batches[-1]))
    plan.check(recorder.recording)
    calls = len(called)
    outputs = [model.predict_on_batch(x) for x, _ in batches]
    logging.getLogger("tp_planner").removeHandler(handler)
    weights = {key: np.array(variable) for key, variable in named_variables(model).items()}
    return {"calls": calls, "warnings": warnings, "results": {"losses": losses, "outputs": outputs, **weights}}


def both(name: str, seeded: bool = True, dropout: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train a case with and without jit_compile=True; ``seeded`` says that its dropout layers are."""
    case = CASES[name]
    rng = np.random.default_rng(5)
    batches = [case.batch(rng, BATCH_SIZE) for _ in range(STEPS)]
    layout = layout_map(case.rules)

    def build() -> keras.Model:
        model = case.build("float64", **({"dropout": dropout} if dropout else {}))
        for layer in [] if seeded else model._flatten_layers():
            if isinstance(layer, layers.Dropout):
                layer.seed_generator._initial_seed = None
        return model

    plain, jit = (trained(build(), case.make_loss(), batches, layout, jit) for jit in (False, True))
    return plain, jit


def both_as_replicas(dropout: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train replicas of a GPT, each on its share of the batches, with and without jit_compile=True."""
    case, rank, rng = CASES["gpt"], dist.get_rank(), np.random.default_rng(5)
    batches = [tuple(share(each, rank, 2) for each in case.batch(rng, BATCH_SIZE)) for _ in range(STEPS)]
    plain, jit = (
        trained(
            case.build("float64", dropout=dropout),
            case.make_loss(),
            batches,
            replicas_layout("gpt", "model axis", (2, 1)),
            jit,
            "batch",
        )
        for jit in (False, True)
    )
    return plain, jit


def both_in_parts(name: str, rules: str, shape: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train replicas that store weights in parts, each on its share of the batches, with and without jit_compile."""
    case, replica, rng = MODELS[name], dist.get_rank() // shape[1], np.random.default_rng(5)
    batches = [tuple(share(each, replica, shape[0]) for each in case.batch(rng, 8)) for _ in range(STEPS)]
    layout = replicas_layout(name, rules, shape)
    plain, jit = (
        trained(case.build("float64"), case.make_loss(), batches, layout, jit, "batch") for jit in (False, True)
    )
    return plain, jit


def on_rank_0_alone(rules: str, shape: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train a GPT without jit_compile=True, and with it on rank 0 alone, while the others run their layers' code."""
    case, replica, rng = MODELS["gpt"], dist.get_rank() // shape[1], np.random.default_rng(5)
    batches = [tuple(share(each, replica, shape[0]) for each in case.batch(rng, 8)) for _ in range(STEPS)]
    layout = replicas_layout("gpt", rules, shape)
    plain, mixed = (
        trained(case.build("float64"), case.make_loss(), batches, layout, jit, "batch")
        for jit in (False, dist.get_rank() == 0)
    )
    return plain, mixed


def both_with_functions_of_its_own(rules: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train a model that adds what two layers make, behind a layer that adds, with and without jit_compile=True."""
    rng = np.random.default_rng(5)
    batches = [(rng.standard_normal((BATCH_SIZE, 6, 8)), rng.standard_normal((BATCH_SIZE, 6, 5))) for _ in range(STEPS)]

    def build() -> keras.Model:
        with building("float64"):
            inputs = keras.Input((6, 8))
            x = layers.Add(name="sum")([inputs, layers.Dense(8, "tanh", name="before")(inputs)])
            x = layers.Dense(8, "tanh", name="left")(x) + layers.Dense(8, name="right")(x)
            return randomize(keras.Model(inputs, layers.Dense(5, name="head")(x), name="model"))

    loss = keras.losses.MeanSquaredError(dtype="float64")
    plain, jit = (trained(build(), loss, batches, layout_map(rules), jit) for jit in (False, True))
    return plain, jit


def both_with(middle: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train an MLP whose middle layer does what a program does not do."""
    case = CASES["mlp"]
    rng = np.random.default_rng(5)
    batches = [case.batch(rng, BATCH_SIZE) for _ in range(STEPS)]

    def build() -> keras.Model:
        keras.utils.clear_session()
        inputs = keras.Input((16,))
        x = layers.Dense(32, name="up")(inputs)
        x = layers.Dense(32, name="down")(x)
        outputs = layers.Dense(8, name="head")(MIDDLES[middle][0](name="middle")(x))
        return randomize(keras.Model(inputs, outputs, name="model"))

    plain, jit = (trained(build(), case.make_loss(), batches, layout_map(case.rules), jit) for jit in (False, True))
    return plain, jit


def other_sorts() -> list[int]:
    """Return how often layers were called: batches of other sizes, compiling anew, and restoring the model."""
    case = CASES["gpt"]
    model = case.build("float32")
    model.compile("sgd", case.make_loss(), jit_compile=True)
    tp_planner.parallelize(model, layout_map(case.rules))
    called: list[bool] = []
    model.layers[-1].register_forward_pre_hook(lambda *_: called.append(True))
    counts = []

    def count(size: int) -> None:
        x, _ = case.batch(np.random.default_rng(size), size)
        called.clear()
        for _ in range(STEPS):
            model(x)
        counts.append(len(called))

    count(4)
    count(2)
    count(4)
    model.compile("sgd", case.make_loss(), jit_compile=True)
    count(4)
    model.compile("sgd", case.make_loss(), jit_compile=False)
    count(4)
    tp_planner.restore(model)
    count(4)
    return counts


def with_arguments() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return what a model of two inputs gives, plain and replayed, for one tensor twice and for two tensors."""
    inputs = [keras.Input((16,), name=name) for name in "xy"]
    hidden = layers.Dense(32, name="up")(inputs[0])
    outputs = layers.Add(name="add")([layers.Dense(16, name="down")(hidden), inputs[1]])
    model = randomize(keras.Model(inputs, outputs, name="model"))
    x, y = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 4, 16)).astype("float32"))
    arguments = [[x, x], [x, y], [y, x], [y, y]]
    plain = [keras.ops.convert_to_numpy(model(each)) for each in arguments]
    model.compile("sgd", "mse", jit_compile=True)
    tp_planner.parallelize(model, layout_map(CASES["mlp"].rules))
    for _ in range(STEPS):
        replayed = [keras.ops.convert_to_numpy(model(each)) for each in arguments]
    return plain, replayed


class TwoLayers(keras.Model):
    """Column- and row-parallel; its own ``call`` takes the input alone."""

    def __init__(self) -> None:
        super().__init__(name="model")
        self.up, self.down = layers.Dense(8, "gelu", name="up"), layers.Dense(6, name="down")
        self.attending, self.dropping = Attending(name="attending"), DoublesInTraining(name="doubles")

    def call(self, x: Any) -> Any:
        return self.dropping(self.attending(self.down(self.up(x)))) + 0.0


class Attending(layers.Layer):
    """Multiplies by its mask, if it is given one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.supports_masking = True

    def call(self, x: Any, mask: Any = None) -> Any:
        return x if mask is None else x * ops.cast(mask, x.dtype)[..., None]


class DoublesInTraining(layers.Layer):
    def call(self, x: Any, training: bool = False) -> Any:
        return 2 * x if training else x


class Around(layers.Layer):
    """Calls a model, and says whether it is a call in training."""

    def __init__(self, model: keras.Model) -> None:
        super().__init__()
        self.model = model

    def call(self, x: Any, training: bool = False) -> Any:
        return self.model(x)


def told_from_around() -> list[tuple[np.ndarray, np.ndarray]]:
    """Return what two models give, one of them replayed, where training, a mask or values come from around them."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3, 6)).astype("float32"))
    masked = [x.clone() for _ in range(2)]
    for mask, each in zip((torch.ones(4, 3), torch.eye(4, 3)), masked, strict=True):
        keras.src.backend.common.masking.set_keras_mask(each, mask > 0)
    models = []
    for _ in range(2):
        model = TwoLayers()
        model(x)
        models.append(randomize(model))
    rules = {".*up/kernel": (None, "model"), ".*up/bias": ("model",), ".*down/kernel": ("model", None)}
    models[1].compile("sgd", "mse", jit_compile=True)
    tp_planner.parallelize(models[1], layout_map(rules), inputs=x)

    def results(model: keras.Model) -> list[np.ndarray]:
        around = Around(model)
        found = [around(x, training=True) for _ in range(STEPS)]
        found += [around(x, training=False)]
        found += [model(each) for each in (*masked, *masked)]
        bias = model.down.bias
        with keras.StatelessScope([(bias, ops.ones_like(bias.value))]):
            found.append(model(x))
        return [keras.ops.convert_to_numpy(each) for each in found]

    return list(zip(*map(results, models), strict=True))


class Looking(layers.Layer):
    """Adds what it looks up without gradients."""

    def call(self, x: Any) -> Any:
        with torch.no_grad():
            found = torch.nn.functional.embedding(x[:, 0].abs().long(), torch.ones(5, 16))
        return x + found


def after_an_error() -> list[bool]:
    """Return whether there are gradients after calls that fail where there are none, as ever, taped and replayed."""
    inputs = keras.Input((16,))
    hidden = layers.Dense(32, name="up")(inputs)
    model = keras.Model(inputs, Looking(name="looking")(layers.Dense(16, name="down")(hidden)), name="model")
    model.get_layer("down").bias.assign(np.full(16, 2.0))
    model.get_layer("down").kernel.assign(np.zeros((32, 16)))
    model.compile("sgd", "mse", jit_compile=True)
    tp_planner.parallelize(model, layout_map(CASES["mlp"].rules))
    x = torch.ones(4, 16)
    for _ in range(STEPS):
        model(x)
    model.get_layer("down").bias.assign(np.full(16, 9.0))  # there is no such row
    enabled = []
    try:
        model(x)
    except IndexError:
        enabled.append(torch.is_grad_enabled())
    return enabled


# In the parent


def check(results: list[tuple[dict[str, Any], dict[str, Any]]], replayed: int) -> None:
    for plain, jit in results:
        reads = plain["calls"] // STEPS  # the last layer may be called several times in a step
        assert (plain["calls"], jit["calls"]) == (STEPS * reads, (STEPS - replayed) * reads)
        assert plain["warnings"] == []
        for key, value in plain["results"].items():
            np.testing.assert_allclose(jit["results"][key], value, rtol=1e-10, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("name", [*REPLAYED, *(pytest.param(name, marks=pytest.mark.slow) for name in REPLAYED_SLOWLY)])
def test_replayed_steps_are_those_of_the_layers(pools: Callable[[int], WorkerPool], name: str) -> None:
    """The same losses, weights, predictions and collectives, and the layers' code does not run."""
    results = pools(2).run(both, name)
    check(results, replayed=STEPS - 1)
    assert [jit["warnings"] for _, jit in results] == [[], []]


@pytest.mark.parametrize("column", ["left", "right"])
def test_functions_that_a_model_itself_calls_are_replayed(pools: Callable[[int], WorkerPool], column: str) -> None:
    """A program knows which sums were those of the model's own code, which the plan changes, and which of layers."""
    results = pools(2).run(
        both_with_functions_of_its_own, {f"{column}/kernel": (None, "model"), "head/kernel": ("model", None)}
    )
    check(results, replayed=STEPS - 1)
    assert [jit["warnings"] for _, jit in results] == [[], []]


@pytest.mark.parametrize("seeded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_dropout_is_replayed(pools: Callable[[int], WorkerPool], seeded: bool) -> None:
    """With the masks that the layers would have drawn next, from seeds of theirs or from torch's random state."""
    check(pools(2).run(both, "gpt", seeded, 0.3), replayed=STEPS - 1)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_replicas_are_replayed(pools: Callable[[int], WorkerPool], dropout: float) -> None:
    """Gradients are averaged, and shares counted, outside the calls that are replayed; each replica draws its own."""
    check(pools(2).run(both_as_replicas, dropout), replayed=STEPS - 1)


@pytest.mark.parametrize(
    ("name", "rules", "shape"),
    [
        ("gpt", "both axes", (2, 2)),
        pytest.param("gpt", "model axis, zero 3", (4, 1), marks=pytest.mark.slow),
        pytest.param("llama", "KerasHub's", (2, 2), marks=pytest.mark.slow),
        pytest.param("stacked", "stacked, 2 ahead", (2, 2), marks=pytest.mark.slow),
        pytest.param("tied", "model axis, zero 3", (2, 2), marks=pytest.mark.slow),
        pytest.param("mlp", "batch axis alone", (4, 1), marks=pytest.mark.slow),
    ],
)
def test_weights_in_parts_are_replayed(
    pools: Callable[[int], WorkerPool], name: str, rules: str, shape: tuple[int, int]
) -> None:
    """They are put together as ever, block by block and early, and let go: what is sent is as planned."""
    results = pools(4).run(both_in_parts, name, rules, shape)
    check(results, replayed=STEPS - 1)
    assert [jit["warnings"] for _, jit in results] == [[]] * 4


@pytest.mark.parametrize(
    ("rules", "shape"), [("model axis", (1, 2)), pytest.param("both axes, 1 ahead", (2, 2), marks=pytest.mark.slow)]
)
def test_a_rank_that_replays_meets_ranks_that_run_code(
    pools: Callable[[int], WorkerPool], rules: str, shape: tuple[int, int]
) -> None:
    """What a program sends it sends in the order in which the layers' code does."""
    first, *others = pools(shape[0] * shape[1]).run(on_rank_0_alone, rules, shape)
    check([first], replayed=STEPS - 1)
    check(others, replayed=0)


@pytest.mark.parametrize("middle", MIDDLES)
def test_what_a_program_would_not_do_runs_as_ever(pools: Callable[[int], WorkerPool], middle: str) -> None:
    results = pools(2).run(both_with, middle)
    check(results, replayed=0)
    for _, jit in results:
        said = jit["warnings"][0].replace(WITH_TORCH_2_11, MIDDLES["recomputation"][1])
        assert said == f"[ModelParallel] jit_compile=True does nothing for model 'model': {MIDDLES[middle][1]}"


def test_each_sort_of_call_has_a_program_until_the_model_is_compiled_anew(pools: Callable[[int], WorkerPool]) -> None:
    for counts in pools(2).run(other_sorts):
        assert counts == [2, 2, 0, 2, STEPS, STEPS]


def test_a_tensor_may_be_given_twice(pools: Callable[[int], WorkerPool]) -> None:
    for plain, replayed in pools(2).run(with_arguments):
        np.testing.assert_allclose(replayed, plain, rtol=1e-5, atol=1e-6)


def test_an_error_leaves_gradients_as_they_were(pools: Callable[[int], WorkerPool]) -> None:
    assert pools(2).run(after_an_error) == [[True], [True]]


def test_what_calls_are_told_from_around_them(pools: Callable[[int], WorkerPool]) -> None:
    """Whether it is training, masks of inputs, and values of a stateless scope are no part of a program."""
    for results in pools(2).run(told_from_around):
        for plain, replayed in results:
            np.testing.assert_allclose(replayed, plain, rtol=1e-5, atol=1e-6)
