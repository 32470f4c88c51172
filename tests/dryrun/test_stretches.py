"""Equal stretches of Functional models are planned once, and the plan is the one that running all layers gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import keras
import pytest
from keras import layers

from tests.dryrun.test_blocks import assert_equal_plans
from tests.models import building
from tp_planner.frontend.layer_tree import named_layers
from tp_planner.frontend.stretches import Stretch, stretches_as_layers
from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.planner import make_plan

WIDTH = 8
PAIRS = {
    r".*up.*/kernel": (None, "model"),
    r".*up.*/bias": ("model",),
    r".*down.*/kernel": ("model", None),
}


def pairs(x: Any, number: int = 5) -> Any:
    for pair in range(number):
        x = layers.Dense(2 * WIDTH, "relu", name=f"up_{pair}")(x)
        x = layers.Dropout(0.1, name=f"dropout_{pair}")(x)
        x = layers.Dense(WIDTH, name=f"down_{pair}")(x)
    return x


def row_of_pairs() -> keras.Model:
    """Between layers that are none of them; a row of equal layers follows."""
    inputs = keras.Input((3,), batch_size=4)
    x = pairs(layers.Dense(WIDTH, name="stem")(inputs))
    for number in range(4):
        x = layers.Dense(WIDTH, "tanh", name=f"single_{number}")(x)
    return keras.Model(inputs, layers.Dense(5, name="head")(x))


def sequential() -> keras.Model:
    model = keras.Sequential([keras.Input((WIDTH,), batch_size=4)])
    for pair in range(4):
        model.add(layers.Dense(2 * WIDTH, "relu", name=f"up_{pair}"))
        model.add(layers.Dense(WIDTH, name=f"down_{pair}"))
    return model


def nested() -> keras.Model:
    """A row in a model in a model, called once."""
    inner = keras.Input((WIDTH,), batch_size=4)
    tower = keras.Model(inner, pairs(inner), name="tower")
    inputs = keras.Input((WIDTH,), batch_size=4)
    return keras.Model(inputs, layers.Dense(3, name="head")(tower(inputs)))


def called_twice() -> keras.Model:
    """So that the tower's layers are, which stand for no others then."""
    inner = keras.Input((WIDTH,), batch_size=4)
    tower = keras.Model(inner, pairs(inner), name="tower")
    inputs = keras.Input((WIDTH,), batch_size=4)
    return keras.Model(inputs, layers.Dense(3, name="head")(tower(tower(inputs))))


def residual() -> keras.Model:
    """Attention and a feed-forward network around which the input goes, as written without a layer for both."""
    tokens = keras.Input((6,), batch_size=2, dtype="int32")
    x = layers.Embedding(11, WIDTH, mask_zero=True, name="tokens")(tokens)
    for block in range(4):
        y = layers.LayerNormalization(name=f"first_norm_{block}")(x)
        y = layers.MultiHeadAttention(4, 2, name=f"attention_{block}")(y, y, use_causal_mask=True)
        x = layers.Add(name=f"first_add_{block}")([x, y])
        y = layers.LayerNormalization(name=f"second_norm_{block}")(x)
        y = layers.Dense(2 * WIDTH, "gelu", name=f"up_{block}")(y)
        y = layers.Dense(WIDTH, name=f"down_{block}")(y)
        x = layers.Add(name=f"second_add_{block}")([x, y])
    return keras.Model(tokens, layers.Dense(11, name="head")(x))


HEADS = {
    r".*(query|key|value)/kernel": (None, "model", None),
    r".*(query|key|value)/bias": ("model", None),
    r".*attention_output/kernel": ("model", None, None),
}


def convolutions() -> keras.Model:
    """With statistics, shortcuts, and a part that is not wired like the others."""
    inputs = keras.Input((8, 8, WIDTH), batch_size=2)
    x = inputs
    for block in range(6):
        y = layers.Conv2D(WIDTH, 3, padding="same", name=f"up_{block}")(x)
        y = layers.BatchNormalization(name=f"norm_{block}")(y)
        y = layers.ReLU(name=f"relu_{block}")(y)
        x = layers.Add(name=f"add_{block}")([y, x if block != 4 else y])
    return keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool")(x))


def with_taps() -> keras.Model:
    """What lies between the layers is handed out after the fifth pair; numbers that are no layer's are added before."""
    inputs = keras.Input((WIDTH,), batch_size=4)
    x = pairs(inputs + 1.0)
    middle = x
    for pair in range(5, 10):
        x = layers.Dense(2 * WIDTH, "relu", name=f"up_{pair}")(x)
        x = layers.Dense(WIDTH, name=f"down_{pair}")(x)
    return keras.Model(inputs, [middle, x])


CASES: dict[str, tuple[Callable[[], keras.Model], dict[str, tuple[str | None, ...]], int]] = {
    # By name: the model, rules, and how many stretches are found.
    "row of pairs": (row_of_pairs, PAIRS, 5 + 4),
    "row that rules tell apart": (row_of_pairs, {r"(up|single)_[13]/kernel": (None, "model")}, 0),
    "sequential": (sequential, PAIRS, 4),
    "nested": (nested, PAIRS, 5),
    "called twice": (called_twice, PAIRS, 5),
    "residual": (residual, PAIRS | HEADS, 4),
    "convolutions": (convolutions, {r"up_\d/kernel": (None, None, None, "model"), r"up_\d/bias": ("model",)}, 4),
    "with taps": (with_taps, PAIRS, 5),
}


def layout_of(rules: dict[str, tuple[str | None, ...]], replicas: int = 1) -> Layout:
    mesh = Mesh((("batch", replicas), ("model", 2)))
    return Layout(mesh, tuple(LayoutRule(pattern, axes) for pattern, axes in rules.items()))


def built(case: str) -> keras.Model:
    with building("float32"):
        return CASES[case][0]()


@pytest.mark.parametrize("case", CASES)
def test_plan_is_that_of_all_layers(case: str) -> None:
    """Layers, boundaries, collectives, memory and what holds it, at the peak of the simulated step.

    Masks on what nobody keeps count as activations or as temporaries.
    """
    assert_equal_plans(built(case), layout_of(CASES[case][1]), memory=case != "residual")


def test_plan_of_replicas_is_that_of_all_layers() -> None:
    """So it is where weights are stored in parts over the batch axis, and put together by several layers at once.

    A replica's share of the samples, a number, is worked out in the first block that goes backward.
    """
    rules = PAIRS | {r".*up.*/kernel": ("batch", "model"), r".*down.*/kernel": ("model", "batch")}
    assert_equal_plans(built("row of pairs"), layout_of(rules, 2), work=0.08)


def test_no_stretches_on_stream() -> None:
    """Where what goes around the layers is sharded over the sequence, it matters what is a layer."""
    layout = Layout(Mesh((("model", 2),)), layout_of(PAIRS | HEADS).rules, sequence_parallel=True)
    model = built("residual")
    plan = make_plan(model, layout)
    with mock.patch("tp_planner.planner.stretches_as_layers", side_effect=AssertionError):
        assert make_plan(model, layout) == plan


@pytest.mark.parametrize("case", CASES)
def test_stretches_are_layers_only_for_a_while(case: str) -> None:
    """Afterwards the model is as it was, also where planning has failed in the meantime."""
    model = built(case)
    functions = [each for each in named_layers(model).values() if hasattr(each, "_nodes_by_depth")]
    before = [(each._nodes_by_depth, each._layers, list(each._layers)) for each in functions]
    kinds = {name: type(layer) for name, layer in named_layers(model).items()}
    with stretches_as_layers(model, named_layers(model), kinds.__getitem__) as found:
        assert [name for name in found if name not in kinds] == [
            name for name, layer in found.items() if isinstance(layer, Stretch)
        ]
        assert len(found) >= len(kinds) + 4
    with pytest.raises(PlanError, match="cannot be traced"):
        make_plan(model, layout_of(CASES[case][1]), inputs=keras.InputSpec(shape=(4, 2, 2, 2, 2)))
    assert all(
        each._nodes_by_depth is nodes and each._layers is held and list(held) == content
        for each, (nodes, held, content) in zip(functions, before, strict=True)
    )


@pytest.mark.parametrize("case", CASES)
def test_number_of_stretches(case: str) -> None:
    """Parts are taken together that are equal, wired alike, and named alike by the rules."""
    model, found = built(case), []

    def counted(*arguments: Any) -> Any:
        stretch = plain(*arguments)
        found.append(stretch)
        return stretch

    plain = Stretch
    with mock.patch("tp_planner.frontend.stretches.Stretch", counted):
        make_plan(model, layout_of(CASES[case][1]))
    assert len(found) == CASES[case][2]


def test_one_of_equal_stretches_runs() -> None:
    """Of five pairs the first runs: in two traces, which differ by dropout, in the proofs of both, and in the step."""
    model, called = built("row of pairs"), []
    call = layers.Dense.call

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(self.name)
        return call(self, *args, **kwargs)

    with mock.patch.object(layers.Dense, "call", counted):
        make_plan(model, layout_of(PAIRS), optimizer=keras.optimizers.AdamW())
    assert called == ["stem", "up_0", "down_0", "single_0", "head"] * 5
