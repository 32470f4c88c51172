"""Equal blocks are planned and simulated once, and the plan is the one that running all of them gives."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import keras
import keras_hub
import pytest

from tests.models import CASES, usual
from tests.replicas import layout as layout_across
from tp_planner import planner
from tp_planner.frontend.blocks import Blocks, Signatures, find_blocks
from tp_planner.frontend.layer_tree import named_layers
from tp_planner.frontend.layout_file import find_layout_file, read_layout_file
from tp_planner.frontend.trace import trace
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.plan import Plan
from tp_planner.ir.step import NO_STEP
from tp_planner.planner import make_plan


def layout_of(name: str) -> Layout:
    rules = tuple(LayoutRule(pattern, axes) for pattern, axes in CASES[name].rules.items())
    return Layout(Mesh((("model", 2),)), rules)


@pytest.mark.parametrize("name", usual(["gpt", "encoder", "encoder_mask_zero", "vit", "llama", "subclassed"]))
def test_plan_is_that_of_all_blocks(name: str) -> None:
    """One block for all gives the same plan, simulated step included, as running each of them."""
    model = CASES[name].build()
    assert_equal_plans(model, layout_of(name))


def test_plan_of_blocks_that_are_computed_again() -> None:
    """So it is where the backward pass runs each block again; blocks that another one runs again are run themselves."""
    model = CASES["llama"].build(blocks=4, length=64, hidden=32, recomputed=True)
    inputs = dict.fromkeys(("token_ids", "padding_mask"), keras.InputSpec(shape=(8, 64), dtype="int32"))
    assert_equal_plans(model, layout_of("llama"), inputs=inputs)


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("rules", ["model axis", "both axes"])
def test_plan_of_replicas_is_that_of_all_blocks(name: str, rules: str) -> None:
    """So it is where replicas store weights in parts, and average gradients."""
    assert_equal_plans(CASES[name].build(), layout_across(name, rules, (2, 2)))


UPDATES: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "accumulated and clipped": lambda: keras.optimizers.AdamW(gradient_accumulation_steps=2, global_clipnorm=1.0),
    "averaged": lambda: keras.optimizers.Adam(use_ema=True, ema_overwrite_frequency=2),
    "in a loop": keras.optimizers.Lion,
    "one after the other": keras.optimizers.Ftrl,
    "large on lists": keras.optimizers.RMSprop,
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(momentum=0.9)),
    "whole": keras.optimizers.Lamb,
}


@pytest.mark.parametrize(
    ("update", "rules", "shape"),
    [
        ("accumulated and clipped", "model axis", (2, 2)),
        *(pytest.param(each, "model axis", (1, 2), marks=pytest.mark.slow) for each in UPDATES),
        *(
            pytest.param(each, "both axes, zero 1", (2, 2), marks=pytest.mark.slow)
            for each in UPDATES
            if each != "whole"
        ),
    ],
)
def test_update_of_blocks_that_do_not_run(update: str, rules: str, shape: tuple[int, int]) -> None:
    """So it is whatever an optimizer does with the gradients of all blocks, though only one has computed any."""
    assert_equal_plans(CASES["llama"].build(), layout_across("llama", rules, shape), UPDATES[update]())


def assert_equal_plans(
    model: keras.Model,
    layout: Layout,
    optimizer: keras.optimizers.Optimizer | None = None,
    memory: bool = True,
    holders: bool = True,
    work: float = 0.03,
    **options: Any,
) -> None:
    """Assert that the plan made of one block for all is that made of each; the work may differ by so much."""
    optimizer = optimizer or keras.optimizers.AdamW(weight_decay=0.01)
    once = make_plan(model, layout, optimizer=optimizer, **options)
    without_stretches = mock.patch.object(planner, "stretches_as_layers", return_value=nullcontext({}))
    with without_stretches, mock.patch.object(planner, "find_blocks", return_value=Blocks.none()):
        each = make_plan(model, layout, optimizer=optimizer, **options)
    assert without_work(once, memory, holders).to_json() == without_work(each, memory, holders).to_json()
    for one, other in zip(once.step.work, each.step.work, strict=True):
        assert (one.phase, one.matmul_flops) == (other.phase, other.matmul_flops)
        # Gradients of a tensor that several blocks share are added in another order, partly inside of them.
        assert one.ops == pytest.approx(other.ops, rel=work)
        assert one.memory_bytes == pytest.approx(other.memory_bytes, rel=work)


def without_work(plan: Plan, memory: bool = True, holders: bool = True) -> Plan:
    """Return the plan without the work of its step, nor, where they are not asked for, its memory and what holds it."""
    step = replace(plan.step, work=(), holders=plan.step.holders if memory and holders else ())
    return replace(plan, step=step if memory else replace(step, memory=NO_STEP.memory))


def test_one_of_equal_blocks_runs() -> None:
    """Of four equal decoder layers only the first runs: in two traces, the proof, and the simulated step."""
    model, runs = CASES["llama"].build(blocks=4), []
    call = type(model.get_layer("llama_backbone").transformer_layers[0]).call

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(self.name)
        return call(self, *args, **kwargs)

    with mock.patch.object(type(model.get_layer("llama_backbone").transformer_layers[0]), "call", counted):
        make_plan(model, layout_of("llama"), optimizer=UPDATES["accumulated and clipped"]())
    assert runs == ["transformer_layer_0"] * 4


class Block(keras.layers.Layer):
    """A dense layer, and an attribute that its call may depend on."""

    def __init__(self, note: Any, units: int = 4, activation: Any = "relu", **options: Any) -> None:
        super().__init__(**options)
        self.note = note
        self.dense = keras.layers.Dense(units, activation, name="dense")

    def build(self, shape: Any) -> None:
        self.dense.build(shape)

    def call(self, x: Any) -> Any:
        return self.dense(x)


def built(*args: Any, **kwargs: Any) -> Block:
    block = Block(*args, **kwargs)
    block.build((2, 4))
    return block


DIFFERENT: dict[str, tuple[Callable[[], Block], Callable[[], Block]]] = {
    "a number": (lambda: built(1), lambda: built(2)),
    "numbers in a list": (lambda: built([1, 2]), lambda: built([1, 3])),
    "what a dataclass says": (lambda: built(Note("a")), lambda: built(Note("b"))),
    "an object": (lambda: built(object()), lambda: built(object())),
    "units": (lambda: built(0, units=4), lambda: built(0, units=5)),
    "activation": (lambda: built(0, activation="relu"), lambda: built(0, activation="gelu")),
    "dtype policy": (lambda: built(0), lambda: built(0, dtype="mixed_bfloat16")),
}


class Both(keras.Model):
    """Two layers in one model."""

    def __init__(self, one: Block, other: Block) -> None:
        super().__init__()
        self.both = [one, other]


def are_equal(one: Block, other: Block) -> bool:
    model = Both(one, other)
    _, first, second = (
        name for name, layer in named_layers(model).items() if not isinstance(layer, keras.layers.Dense)
    )
    signatures = Signatures(model)
    return signatures.of(first) == signatures.of(second)


@dataclass(frozen=True)
class Note:
    """As Keras 3.16 keeps of an EinsumDense's equation."""

    text: str


@pytest.mark.parametrize("note", [1, [1, {"a": None}], Note("abc")], ids=["number", "list", "dataclass"])
def test_equal_layers(note: Any) -> None:
    """Layers that differ in their names only are equal."""
    assert are_equal(built(note, name="a"), built(copy.copy(note), name="b"))


@pytest.mark.parametrize("difference", DIFFERENT)
def test_different_layers(difference: str) -> None:
    """Whatever a call may depend on tells layers apart."""
    one, other = DIFFERENT[difference]
    assert not are_equal(one(), other())


def test_frozen_layers_are_different() -> None:
    frozen = built(1)
    frozen.trainable = False
    assert not are_equal(frozen, built(1))


# Models in which blocks are equal, or only seem to be


class FeedForward(keras.layers.Layer):
    """x + down(gelu(up(x))), or of another tensor than x; ``penalised`` adds a loss."""

    def __init__(self, penalised: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.up, self.down = keras.layers.Dense(32, "gelu", name="up"), keras.layers.Dense(16, name="down")
        self.penalised = penalised

    def build(self, x_shape: Any, other_shape: Any = None) -> None:
        self.up.build((None, 16))
        self.down.build((None, 32))

    def call(self, x: Any, other: Any = None) -> Any:
        y = self.down(self.up(x if other is None else other))
        if self.penalised:
            self.add_loss(keras.ops.mean(y * y))
        return x + y


class HandsOn(keras.layers.Layer):
    """Adds a bias made from what the first such block was given, which every block hands on to the next one."""

    def __init__(self, first: bool, **options: Any) -> None:
        super().__init__(**options)
        self.inner, self.first = FeedForward(name="inner"), first
        self.bias = keras.layers.Dense(16, name="bias") if first else None

    def build(self, x_shape: Any, bias_shape: Any = None) -> None:
        self.inner.build(x_shape)
        if self.bias is not None:
            self.bias.build(x_shape)

    def call(self, x: Any, bias: Any = None) -> Any:
        bias = bias if self.bias is None else self.bias(x)
        return self.inner(x) + bias, bias


class Masks(keras.layers.Layer):
    """Hides what the mask of its input says, and masks what comes out: by that mask, or by one of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inner, self.masking = FeedForward(name="inner"), keras.layers.Masking(0.5, name="masking")
        self.supports_masking = True

    def build(self, shape: Any) -> None:
        self.inner.build(shape)

    def call(self, x: Any, mask: Any = None) -> Any:
        return self.masking(self.inner(x) * keras.ops.cast(mask, x.dtype)[..., None])


class Half(keras.layers.Layer):
    """A dense layer and its activation: a region goes from one such layer into the next."""

    def __init__(self, units: int, **options: Any) -> None:
        super().__init__(**options)
        self.dense, self.activation = keras.layers.Dense(units, name="dense"), keras.layers.Activation("gelu")

    def build(self, shape: Any) -> None:
        self.dense.build(shape)

    def call(self, x: Any) -> Any:
        return self.activation(self.dense(x))


class Scaled(keras.layers.Layer):
    """Scales its input by a number that it learns: as well a shard of it."""

    def build(self, shape: Any) -> None:
        self.factor = self.add_weight(shape=(), name="factor")

    def call(self, x: Any) -> Any:
        return keras.ops.tanh(x * self.factor)


class Twice(keras.layers.Layer):
    """Two of them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.first, self.second = Scaled(name="first"), Scaled(name="second")

    def build(self, shape: Any) -> None:
        self.first.build(shape)
        self.second.build(shape)

    def call(self, x: Any) -> Any:
        return self.second(self.first(x))


class Pair(keras.layers.Layer):
    """Two equal blocks inside a block."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.one, self.other = FeedForward(name="one"), FeedForward(name="other")

    def build(self, shape: Any) -> None:
        self.one.build(shape)
        self.other.build(shape)

    def call(self, x: Any) -> Any:
        return self.other(self.one(x))


class UsesParts(keras.Model):
    """A tower of blocks, and parts of two of them used once more from outside."""

    def __init__(self) -> None:
        super().__init__(name="uses_parts")
        self.blocks = [FeedForward(name=f"block_{index}") for index in range(3)]

    def build(self, shape: Any) -> None:
        for block in self.blocks:
            block.build(shape)

    def call(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x + self.blocks[2].down(self.blocks[1].up(x)) + keras.ops.sum(self.blocks[1].up.bias)


def two_towers() -> keras.Model:
    left = one = keras.Input((16,))
    right = other = keras.Input((16,))
    for index in range(3):
        left, right = FeedForward(name=f"left_{index}")(left), FeedForward(name=f"right_{index}")(right)
    return keras.Model([one, other], keras.layers.Dense(4, name="out")(keras.layers.Concatenate()([left, right])))


def one_block_three_times() -> keras.Model:
    inputs = x = keras.Input((5, 16))
    shared = FeedForward(name="shared")
    for _ in range(3):
        x = shared(x)
    for index in range(3):
        x = Pair(name=f"pair_{index}")(x)
    return keras.Model(inputs, x)


def regions_across_blocks() -> keras.Model:
    inputs = x = keras.Input((16,))
    for index in range(3):
        x = Half(16, name=f"half_down_{index}")(Half(32, name=f"half_up_{index}")(x))
    return keras.Model(inputs, x)


def blocks_of_which_one_is_given_shards() -> keras.Model:
    inputs = keras.Input((5, 16))
    x = keras.layers.Dense(32, name="up")(inputs)
    x = sums = keras.layers.Dense(16, name="down")(Twice(name="block_0")(x))
    x = Twice(name="block_1")(keras.layers.Dense(32, name="whole")(x))
    return keras.Model(inputs, keras.layers.Concatenate()([x, sums]))


def parts_from_outside() -> keras.Model:
    model = UsesParts()
    model.build((None, 16))
    return model


def blocks_with_losses() -> keras.Model:
    inputs = x = keras.Input((16,))
    for index in range(3):
        x = FeedForward(penalised=True, name=f"block_{index}")(x)
    return keras.Model(inputs, x)


def blocks_that_hand_on() -> keras.Model:
    inputs = x = keras.Input((5, 16))
    bias = None
    for index in range(4):
        x, bias = HandsOn(first=index == 0, name=f"block_{index}")(x, bias)
    return keras.Model(inputs, keras.layers.Dense(3, name="out")(x))


def blocks_with_masks() -> keras.Model:
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(8, 16, mask_zero=True, name="tokens")(inputs)
    for index in range(4):
        x = Masks(name=f"block_{index}")(x)
    return keras.Model(inputs, keras.layers.LSTM(3, name="out")(x))


def blocks_that_read_one_tensor() -> keras.Model:
    inputs = x = keras.Input((16,))
    context = keras.layers.Dense(16, name="context")(inputs)
    top = keras.layers.Dense(32, name="top_up")(context)
    for index in range(4):
        x = FeedForward(name=f"block_{index}")(x, context)
    return keras.Model(inputs, [x, keras.layers.Dense(3, name="top_down")(top)])


def encoder_and_decoder() -> keras.Model:
    source, target = keras.Input((8,), dtype="int32"), keras.Input((6,), dtype="int32")
    x = keras_hub.layers.TokenAndPositionEmbedding(32, 8, 16, name="source")(source)
    for index in range(3):
        x = keras_hub.layers.TransformerEncoder(32, 4, name=f"encoder_{index}")(x)
    y = keras_hub.layers.TokenAndPositionEmbedding(32, 6, 16, name="target")(target)
    for index in range(4):
        y = keras_hub.layers.TransformerDecoder(32, 4, name=f"decoder_{index}")(y, x)
    return keras.Model([source, target], keras.layers.Dense(8, name="out")(y))


def t5(blocks: int = 4) -> keras.Model:
    """An encoder and a decoder whose blocks all add the position bias of their first one, which is sharded by heads."""
    sizes = {"vocabulary_size": 32, "num_heads": 4, "hidden_dim": 16, "intermediate_dim": 32, "key_value_dim": 8}
    return keras_hub.models.T5Backbone(
        num_layers=blocks, activation="gelu", use_gated_activation=True, tie_embedding_weights=False, **sizes
    )


T5_INPUTS = {
    f"{stack}_{name}": keras.InputSpec(shape=(2, length), dtype="int32")
    for stack, length in (("encoder", 8), ("decoder", 6))
    for name in ("token_ids", "padding_mask")
}


@pytest.mark.slow
def test_plan_of_blocks_that_share_a_sharded_tensor() -> None:
    """Blocks stand for one another across shards that they are all given, as T5's are."""
    layout = read_layout_file(find_layout_file("t5")).on(Mesh((("model", 2),)))
    assert_equal_plans(t5(), layout, inputs=T5_INPUTS)


@pytest.mark.slow
def test_blocks_of_a_t5_are_planned_once() -> None:
    """Of each stack three run: the one that makes the shared tensor, the first to read it, and one of the others."""
    layout = read_layout_file(find_layout_file("t5")).on(Mesh((("model", 2),)))
    runs: list[str] = []
    model = t5(6)
    block = type(model.get_layer("transformer_encoder_layer_0"))
    call = block.call

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(self.name)
        return call(self, *args, **kwargs)

    with mock.patch.object(block, "call", counted):
        make_plan(model, layout, inputs=T5_INPUTS)
    assert {name[-1] for name in runs} == {"0", "1", "2"}
    assert max(Counter(runs).values()) <= 2 * 6 + 3  # at most six proofs of both ways to call it, two traces, one step


def partly_frozen() -> keras.Model:
    model = encoder_and_decoder()
    for name in ("source", "encoder_0", "encoder_1", "decoder_0", "decoder_2"):
        model.get_layer(name).trainable = False
    return model


RULES = {
    "(.*[/_])?(up|half_up_[0-9]/dense|feedforward_intermediate_dense)/kernel": (None, "model"),
    "(.*[/_])?(up|half_up_[0-9]/dense|feedforward_intermediate_dense)/bias": ("model",),
    "(.*[/_])?(down|half_down_[0-9]/dense|feedforward_output_dense)/kernel": ("model", None),
    ".*attention_layer/(query|key|value)/kernel": (None, "model", None),
    ".*attention_layer/(query|key|value)/bias": ("model", None),
    ".*attention_layer/attention_output/kernel": ("model", None, None),
}


@pytest.mark.parametrize(
    "build",
    [
        two_towers,
        one_block_three_times,
        regions_across_blocks,
        blocks_of_which_one_is_given_shards,
        parts_from_outside,
        blocks_with_losses,
        blocks_that_hand_on,
        blocks_with_masks,
        blocks_that_read_one_tensor,
        pytest.param(encoder_and_decoder, marks=pytest.mark.slow),
        partly_frozen,
    ],
)
def test_blocks_that_only_seem_equal(build: Callable[[], keras.Model]) -> None:
    """Whatever tells blocks apart is noticed: gradients, shared tensors, calls, losses, regions, parts used outside."""
    layout = Layout(Mesh((("model", 2),)), tuple(LayoutRule(pattern, axes) for pattern, axes in RULES.items()))
    memory = build not in (encoder_and_decoder, partly_frozen)
    # Gradients of the one tensor are added in another order, so that another op makes the last of them.
    optimizer = keras.optimizers.AdamW(weight_decay=0.01, amsgrad=True)
    assert_equal_plans(build(), layout, optimizer, memory, holders=build is not blocks_that_read_one_tensor)


@pytest.mark.parametrize(
    ("build", "run"),
    [
        (blocks_with_losses, ["block_0", "block_1"]),  # the inputs of the first have no gradient
        (blocks_that_hand_on, ["block_0", "block_1", "block_2"]),  # the third finds its bias converted already
        (blocks_with_masks, ["block_0", "block_1"]),  # the mask of the first depends on no variable
    ],
)
def test_losses_masks_and_what_is_handed_on_keep_no_block_from_standing_for_others(
    build: Callable[[], keras.Model], run: list[str]
) -> None:
    """All of these come out of a block that does not run as they would if it did."""
    assert traced_blocks(build()) == run


def traced_blocks(model: keras.Model) -> list[str]:
    """Return the outermost blocks that run in the trace of a training call."""
    graph = trace(model, training=True, blocks=find_blocks(model))
    ran = [call.layer for call in graph.calls.values() if call.parent == 0 and call.id not in graph.repeats]
    return [layer for layer in ran if layer.startswith("block")]


@pytest.mark.xfail(
    strict=True,
    reason="what crosses into a region of a frozen or shared block is kept until the call ends",
)
@pytest.mark.slow
@pytest.mark.parametrize("build", [partly_frozen, encoder_and_decoder])
def test_peak_in_the_forward_pass_of_frozen_blocks(build: Callable[[], keras.Model]) -> None:
    layout = Layout(Mesh((("model", 2),)), tuple(LayoutRule(pattern, axes) for pattern, axes in RULES.items()))
    assert_equal_plans(build(), layout)
