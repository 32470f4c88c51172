"""The search for a layout: it agrees with trying every layout, and its rules say what they should."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import pytest
import torch

from tests.families import FAMILIES, published
from tp_planner.frontend.hardware_file import find_hardware_file, read_hardware_file
from tp_planner.frontend.layout_file import read_layout_file
from tp_planner.frontend.survey import survey
from tp_planner.frontend.training_loss import TrainingLoss
from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import Layout, LayoutRule, Zero
from tp_planner.ir.mesh import Mesh, parse_mesh
from tp_planner.passes.check_rules import matching_rules
from tp_planner.planner import make_plan
from tp_planner.report.found import found_sections
from tp_planner.search.door import find_layout, read_memory
from tp_planner.search.find import search
from tp_planner.search.found import ERROR, Found, known_bound
from tp_planner.search.prices import seconds_of
from tp_planner.search.rules import write_rules

H100 = read_hardware_file(find_hardware_file("h100"))


def two_dense(width: int = 4096) -> keras.Model:
    """Return a pair of layers that is worth sharding on a batch of 64."""
    x = keras.Input((width,), name="x")
    hidden = keras.layers.Dense(2 * width, activation="relu", name="up")(x)
    return keras.Model(x, keras.layers.Dense(width, use_bias=False, name="down")(hidden), name="two_dense")


def convolutions() -> keras.Model:
    """Return two convolutions with a normalization of channels between them."""
    x = keras.Input((8, 8, 256), name="x")
    hidden = keras.layers.Conv2D(1024, 3, use_bias=False, name="first")(x)
    hidden = keras.layers.LayerNormalization(center=False, name="norm")(hidden)
    return keras.Model(x, keras.layers.Conv2D(256, 3, use_bias=False, name="second")(hidden), name="convolutions")


def two_towers() -> keras.Model:
    """Return two embeddings of which one is large, and the product of what they look up."""
    user, item = (keras.Input((), dtype="int32", name=name) for name in ("user", "item"))
    left = keras.layers.Embedding(2**20, 64, name="users")(user)
    right = keras.layers.Dense(64, use_bias=False, name="project")(keras.layers.Embedding(64, 256, name="items")(item))
    return keras.Model([user, item], keras.ops.sum(left * right, axis=-1), name="two_towers")


class Gated(keras.layers.Layer):
    """Gates and values of one kernel, which its code takes apart: planning stores it in two parts."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.up = keras.layers.Dense(8192, use_bias=False, name="up")
        self.down = keras.layers.Dense(1024, use_bias=False, name="down")

    def call(self, x: Any) -> Any:
        gate, value = keras.ops.split(self.up(x), 2, axis=-1)
        return self.down(keras.ops.silu(gate) * value)


def gated() -> keras.Model:
    x = keras.Input((1024,), name="x")
    return keras.Model(x, Gated(name="gated")(x), name="gated")


class Packed(keras.layers.Layer):
    """Attention whose queries, keys and values are of one kernel."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.qkv = keras.layers.Dense(3072, name="qkv")
        self.out = keras.layers.Dense(1024, use_bias=False, name="out")

    def call(self, x: Any) -> Any:
        batch, length = keras.ops.shape(x)[:2]
        parts = keras.ops.reshape(self.qkv(x), (batch, length, 3, 16, 64))
        query, key, value = keras.ops.unstack(parts, axis=2)
        scores = keras.ops.softmax(keras.ops.einsum("bqhd,bkhd->bhqk", query, key))
        return self.out(keras.ops.reshape(keras.ops.einsum("bhqk,bkhd->bqhd", scores, value), (batch, length, 1024)))


def packed() -> keras.Model:
    x = keras.Input((64, 1024), name="x")
    return keras.Model(x, Packed(name="attention")(x), name="packed")


SMALL: dict[str, Callable[[], keras.Model]] = {
    each.__name__: each for each in (two_dense, convolutions, two_towers, gated, packed)
}


def all_layouts(model: keras.Model, mesh: Mesh) -> Iterator[Layout]:
    """Yield every layout that shards any dim of any variable that divides."""
    variables = [each for each in survey(model)[1].values() if not each.kept_whole]
    size = mesh.axis_size(mesh.model_axis)
    choices = [[(), *(dim for dim, length in enumerate(each.shape) if length % size == 0)] for each in variables]
    for chosen in itertools.product(*choices):
        yield Layout(
            mesh,
            tuple(
                LayoutRule(each.path, tuple("model" if at == dim else None for at in range(len(each.shape))))
                for each, dim in zip(variables, chosen, strict=True)
            ),
        )


def built(make: Callable[[], keras.Model]) -> keras.Model:
    with keras.device("meta"):
        return make()


def batch_of(model: keras.Model, size: int) -> Any:
    specs = [keras.InputSpec(shape=(size, *each.shape[1:]), dtype=each.dtype) for each in model.inputs]
    return specs[0] if len(specs) == 1 else specs


@pytest.mark.parametrize("name", ["two_dense", *(pytest.param(each, marks=pytest.mark.slow) for each in SMALL)])
def test_no_layout_is_cheaper(name: str) -> None:
    """Of all layouts, each planned and estimated, the found one is the cheapest; the program says what it costs."""
    model, mesh, optimizer = built(SMALL[name]), parse_mesh("model=4"), keras.optimizers.Adam()
    inputs = batch_of(model, 64)
    found = search(model, mesh, H100, inputs, optimizer)
    costs = [seconds_of(make_plan(model, layout, inputs, optimizer), H100) for layout in all_layouts(model, mesh)]
    assert found.best.proven.cost == pytest.approx(min(costs), rel=1e-9)
    assert abs(found.error) < ERROR
    assert found.gap < 1e-6


def test_convolutions_whose_inputs_are_cut_are_priced_exactly() -> None:
    """With the copies of their kernels' gradients, which come in another order than what reads them takes."""
    model = built(convolutions)
    found = search(model, parse_mesh("model=4"), H100, batch_of(model, 64), keras.optimizers.Adam())
    assert [each.layer for each in found.plan.layers if each.inputs] == ["first", "second"]
    assert abs(found.error) < 1e-6
    assert found.gap < 1e-6


def test_a_search_measures_under_anomaly_detection_too() -> None:
    """Which looks at values: what fails to be measured together is measured op by op, and less exactly."""
    model = built(gated)
    with torch.autograd.set_detect_anomaly(True):
        found = search(model, parse_mesh("model=4"), H100, batch_of(model, 64), keras.optimizers.Adam())
    assert abs(found.error) < 1e-6


def test_what_code_takes_apart_later_is_found_in_parts() -> None:
    """The program knows of the parts in which planning stores a weight for what another step does."""
    model = built(gated)
    found = search(model, parse_mesh("model=4"), H100, batch_of(model, 64), keras.optimizers.Adam())
    assert {str(each.placement) for each in found.plan.variables} == {"S(1:4096+4096)", "S(0)"}
    assert abs(found.error) < ERROR
    assert found.gap < 1e-6


class Unread(keras.layers.Dense):
    """A layer with a matrix that it does not use, such as an embedding has for a head that the model has not."""

    def build(self, shape: Any) -> None:
        super().build(shape)
        self.unread = self.add_weight(shape=(shape[-1], self.units), name="unread")


def test_what_no_op_reads_has_no_update() -> None:
    """Its bytes are no part of what the update of the others is priced by."""
    x = keras.Input((1024,), name="x")
    hidden = Unread(4096, activation="relu", name="up")(x)
    model = built(lambda: keras.Model(x, keras.layers.Dense(1024, name="down")(hidden), name="with_unread"))
    found = search(model, parse_mesh("model=4"), H100, batch_of(model, 1024), keras.optimizers.Adam())
    assert any(each.is_sharded for each in found.plan.variables)
    assert abs(found.error) < 0.001


@pytest.mark.parametrize("recurrent", [keras.layers.LSTM, keras.layers.GRU])
def test_recurrent_layers_that_read_masks_are_searched(recurrent: type[keras.layers.Layer]) -> None:
    """Their code looks at a mask, of which no tensor comes, and has ops outside of torch's functions."""
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    hidden = recurrent(64, name="recurrent")(keras.layers.Embedding(512, 256, mask_zero=True, name="embedding")(tokens))
    model = built(lambda: keras.Model(tokens, keras.layers.Dense(32, name="head")(hidden), name="recurring"))
    found = search(model, parse_mesh("model=2"), H100, batch_of(model, 64), keras.optimizers.Adam())
    assert abs(found.error) < ERROR
    assert found.gap < 1e-6


def test_no_bound_is_known_that_a_plan_is_below() -> None:
    """Where the program asks more for a layout than its plan takes, no gap is said."""
    model = built(two_dense)
    found = search(model, parse_mesh("model=4"), H100, batch_of(model, 64), keras.optimizers.Adam())
    best, cost = found.best, found.best.cost
    fitting = [replace(best, program_cost=1.01 * cost), replace(best, program_cost=cost, on_top_of=best, cost=cost / 2)]
    assert known_bound(1.01 * cost, fitting) == cost
    assert known_bound(cost, [*fitting, replace(best, program_cost=1.03 * cost)]) is None
    assert known_bound(1.03 * cost, fitting) is None
    unknown = replace(found, bound=None)
    assert unknown.gap is None
    (section,) = found_sections(unknown.figures)
    assert section.sentences[1].startswith("optimality gap not known: ")


def block(names: str, number: int, top: str = "") -> list[str]:
    return [f"{top}block_{number}/{name}" for name in names.split()]


ATTENTION = "mha/query/kernel mha/key/kernel mha/value/kernel mha/output/kernel norm/gamma"
RULES = {
    "numbers and siblings become one": (
        [*block(ATTENTION, 0), *block(ATTENTION, 1)],
        {"query": "o", "key": "o", "value": "o"},
        ["(.*/)?(query|key|value)/kernel"],
    ),
    "a path says what tells it from others": (
        ["encoder/block_0/up/kernel", "encoder/block_1/up/kernel", "decoder/block_0/up/kernel"],
        {"encoder": "o"},
        ["encoder/block_[0-9]+/up/kernel"],
    ),
    "one of several numbers": (["dense_1/kernel", "dense_2/kernel"], {"dense_2": "o"}, ["dense_2/kernel"]),
    "different axes are different rules": (
        [*block("up/kernel down/kernel", 0), *block("up/kernel down/kernel", 1)],
        {"up": "o", "down": "i"},
        ["(.*/)?up/kernel", "(.*/)?down/kernel"],
    ),
    "special characters are no patterns": (
        ["a.b/kernel", "axb/kernel"],
        {"a.b": "o"},
        [r"a\.b/kernel"],
    ),
}


@pytest.mark.parametrize(("paths", "wanted", "patterns"), RULES.values(), ids=RULES)
def test_rules_are_short_and_match_exactly(paths: list[str], wanted: dict[str, str], patterns: list[str]) -> None:
    """A rule matches what it is for and nothing else."""
    axes = {"o": (None, "model"), "i": ("model", None)}
    placed = {path: axes[each] for path in paths for name, each in wanted.items() if name in path.split("/")}
    rules = write_rules(placed, paths)
    assert [rule.pattern for rule in rules] == patterns
    found = {path: [rule.axes for rule in matching_rules(rules, path)] for path in paths}
    assert found == {path: [placed[path]] if path in placed else [] for path in paths}


def test_rules_of_any_choice_match_exactly() -> None:
    """Whatever is chosen of the variables of a model, each has its rule, and no other has one."""
    rng = random.Random(0)
    paths = [path for number in range(3) for path in block("up/kernel up/bias down/kernel", number, "model/")]
    paths += ["up/kernel", "model/block_10/up_2/kernel", "block_1/up/kernel"]
    for _ in range(100):
        placed = {path: rng.choice([(None, "model"), ("model", None)]) for path in paths if rng.random() < 0.5}
        rules = write_rules(placed, paths)
        resolved = {path: [rule.axes for rule in matching_rules(rules, path)] for path in paths}
        assert resolved == {path: [placed[path]] if path in placed else [] for path in paths}


def test_a_found_layout_is_a_file(tmp_path: Path) -> None:
    """What is found can be read again, and makes the same plan; memory that nothing fits is refused."""
    model = built(two_dense)
    found = find_layout(model, "model=4", batch_of(model, 64), "sgd")
    path = tmp_path / "found.toml"
    path.write_text(found.toml)
    layout = read_layout_file(path).on(parse_mesh("model=4"))
    again = make_plan(model, layout, batch_of(model, 64), keras.optimizers.SGD())
    assert again.to_json() == found.plan.to_json()
    with pytest.raises(PlanError, match=r"^no layout of 'two_dense' on a mesh of model=4 that was planned fits 1000 "):
        find_layout(model, "model=4", batch_of(model, 64), memory="1kB")


def test_memory_is_kept() -> None:
    """Where the cheapest layout takes too much memory, the cheapest of those that fit is found, and none too large."""
    model, optimizer = built(lambda: two_dense(64)), keras.optimizers.Adam()
    free = search(model, parse_mesh("model=4"), H100, batch_of(model, 2), optimizer)
    most = 0.7 * free.plan.step.memory.peak.total
    kept = search(model, parse_mesh("model=4"), H100, batch_of(model, 2), optimizer, memory=most)
    assert not any(variable.is_sharded for variable in free.plan.variables)
    assert any(variable.is_sharded for variable in kept.plan.variables)
    assert kept.plan.step.memory.peak.total <= most < free.plan.step.memory.peak.total
    assert kept.cost > free.cost


def test_replicas_store_in_parts_what_fits_in_no_other_way() -> None:
    """Slots first, then weights; of these the program does not know."""
    model, mesh, optimizer = built(lambda: two_dense(64)), parse_mesh("batch=4,model=2"), keras.optimizers.Adam()
    rules = (LayoutRule("up/kernel", (None, "model")), LayoutRule("up/bias", ("model",)))
    layout = Layout(mesh, (*rules, LayoutRule("down/kernel", ("model", None))))
    stages: tuple[Zero, ...] = (0, 1, 3)
    plans = [make_plan(model, replace(layout, zero=zero), batch_of(model, 2), optimizer) for zero in stages]
    peaks = [plan.step.memory.peak.total for plan in plans]
    assert peaks[0] > peaks[1] > peaks[2]
    for zero, peak, what in zip(stages, peaks, ((), ("slots in parts",), ("weights in parts",)), strict=True):
        found = search(model, mesh, H100, batch_of(model, 2), optimizer, memory=1.1 * peak)
        assert (found.layout.zero, found.best.figures.beyond) == (zero, what)
        assert found.plan.step.memory.peak.total <= 1.1 * peak
        assert found.layout_map().zero == zero


def test_memory_is_no_size() -> None:
    with pytest.raises(PlanError) as error:
        read_memory("much")
    assert str(error.value) == "memory is 'much'; write a number of bytes, or for example '80GB' or '16GiB'"


# KerasHub's families, at a published width


def test_a_loss_in_shards_and_unequal_parts_are_found() -> None:
    """Twelve heads and 50257 tokens on eight ranks: the loss reads shards of logits, and the vocabulary is cut."""
    found, preset = found_and_preset("gpt2", 8)
    assert found.cost < preset
    assert found.gap < 1e-6
    assert abs(found.error) < 0.005
    assert any(each.into_loss for each in found.plan.layers)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_found_is_no_dearer_than_the_preset(name: str, parts: int, record_property: Any) -> None:
    """What is found for a family costs as much as its preset or less, and nothing is cheaper, as is proven.

    The program says what the plan costs.
    """
    found, preset = found_and_preset(name, parts)
    candidates = (found.best, *found.runners_up)
    cost = min(each.cost for each in candidates if not each.layout.sequence_parallel)  # as the preset
    stream = f"{found.cost / preset:.3f} with the stream in shards" if cost > found.cost else "no stream"
    record_property("counted", f"{name} on {parts}: {cost / preset:.3f} of its preset, {stream}, gap {found.gap:.2%}")
    assert cost <= preset * (1 + 1e-9)
    assert found.gap < 1e-6
    assert abs(found.error) < ERROR


def found_and_preset(name: str, parts: int) -> tuple[Found, float]:
    """Return what is found for a family, and what its preset costs."""
    model, inputs = published(name)
    optimizer, loss = keras.optimizers.Adam(), TrainingLoss(FAMILIES[name].case.make_loss())
    layout = FAMILIES[name].layout(parts)
    preset = seconds_of(make_plan(model, layout, inputs, optimizer, loss), H100)
    return search(model, layout.mesh, H100, inputs, optimizer, loss), preset
