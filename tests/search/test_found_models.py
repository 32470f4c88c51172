"""Models that nobody wrote a layout for: one is found, and trains as the single device does."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import keras
import keras_hub
import numpy as np
import pytest
import torch.distributed as dist
from keras.src.applications.efficientnet import DEFAULT_BLOCKS_ARGS, EfficientNet

import tp_planner
from tests.families import EVERY, FAMILIES
from tests.models import CASES, Batch, Case, building, randomize
from tests.test_families import OF_ITS_OWN, assert_same_function, batches, train_both
from tests.test_parity import (
    BATCH_SIZE,
    STEPS,
    TOLERANCE,
    Record,
    begin,
    differences,
    gradient_differences,
    make_batches,
    train,
)
from tests.workers import Pools, WorkerPool
from tp_planner.frontend.hardware_file import find_hardware_file, read_hardware_file
from tp_planner.frontend.survey import survey
from tp_planner.ir.hardware import Figure, FigureRange, Hardware
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.planner import make_plan
from tp_planner.readable_plan import Plan
from tp_planner.report.found import found_sections
from tp_planner.search.find import search
from tp_planner.search.found import ERROR, Found
from tp_planner.search.prices import seconds_of

RANDOM_LAYOUTS = 20


def unet(dtype: str = "float32", *, seed: int = 0) -> keras.Model:
    """Return convolutions down to half the size and up again, the way across joined to the way down."""
    with building(dtype):
        layers = keras.layers
        images = keras.Input((8, 8, 4), name="images")
        left = layers.Conv2D(8, 3, padding="same", activation="relu", name="down")(images)
        inside = layers.Conv2D(16, 3, padding="same", activation="relu", name="inner")(layers.MaxPooling2D()(left))
        right = layers.Conv2DTranspose(8, 2, strides=2, name="up")(inside)
        joined = layers.Concatenate(name="join")([left, right])
        last = layers.Conv2D(8, 3, padding="same", activation="relu", name="across")(joined)
        return randomize(keras.Model(images, layers.Conv2D(2, 1, name="masks")(last), name="unet"), seed)


def _images(rng: np.random.Generator, size: int) -> Batch:
    return rng.standard_normal((size, 8, 8, 4)), rng.standard_normal((size, 8, 8, 2))


def recommender(dtype: str = "float32", *, seed: int = 0) -> keras.Model:
    """Return two towers, each of a table and a layer, and what their ends have in common."""
    with building(dtype):
        towers, inputs = [], []
        for name, size in (("user", 64), ("item", 32)):
            inputs.append(keras.Input((), dtype="int32", name=name))
            looked_up = keras.layers.Embedding(size, 16, name=f"{name}_table")(inputs[-1])
            hidden = keras.layers.Dense(32, activation="relu", name=f"{name}_hidden")(looked_up)
            towers.append(keras.layers.Dense(8, name=f"{name}_end")(hidden))
        score = keras.layers.Dot(axes=1, name="score")(towers)
        return randomize(keras.Model(inputs, score, name="recommender"), seed)


def _pairs(rng: np.random.Generator, size: int) -> Batch:
    return [rng.integers(0, end, size).astype("int32") for end in (64, 32)], rng.standard_normal((size, 1))


def efficient(dtype: str = "float32", *, seed: int = 0) -> keras.Model:
    """Return the first block of an EfficientNet between its stem and its top."""
    with building(dtype):
        model = EfficientNet(
            1.0,
            1.0,
            32,
            dropout_rate=0.0,
            drop_connect_rate=0.0,
            blocks_args=[dict(DEFAULT_BLOCKS_ARGS[0])],
            name="efficient",
            weights=None,
            weights_name="",
            input_shape=(32, 32, 3),
            classes=4,
            classifier_activation=None,
        )
        randomize(model, seed)
        # Its gradient is zero, and what is left of it rounding: the next normalization takes the mean away.
        model.get_layer("block1a_project_bn").beta.trainable = False
        return model


def sam(dtype: str = "float32", *, seed: int = 0) -> keras.Model:
    """Return SAM's encoder of images, with attention in windows and across them, and classes of what it makes."""
    with building(dtype):
        encoder = keras_hub.models.ViTDetBackbone(
            hidden_size=16,
            num_layers=2,
            intermediate_dim=32,
            num_heads=4,
            global_attention_layer_indices=[1],
            image_shape=(16, 16, 3),
            patch_size=4,
            num_output_channels=8,
            window_size=2,
            name="encoder",
        )
        classes = keras.layers.Dense(4, name="head")(keras.ops.mean(encoder.output, (1, 2)))
        return randomize(keras.Model(encoder.input, classes, name="sam"), seed)


def _pictures(rng: np.random.Generator, size: int, width: int = 16) -> Batch:
    return rng.standard_normal((size, width, width, 3)), rng.integers(0, 4, size).astype("int32")


def _large_pictures(rng: np.random.Generator, size: int) -> Batch:
    return _pictures(rng, size, 32)


def efficientnet_b0(dtype: str = "float32", *, seed: int = 0) -> keras.Model:
    """Return Keras's EfficientNetB0 for small pictures, blocks left out at random, without the dropout at its end.

    That has no seed of its own, so that no training draws what another did.
    """
    with building(dtype):
        model = keras.applications.EfficientNetB0(
            weights=None, input_shape=(64, 64, 3), classes=4, classifier_activation=None, name="efficientnet_b0"
        )
    randomize(model, seed)
    model.get_layer("top_dropout").rate = 0.0
    for number, layer in enumerate(model.layers):
        if isinstance(layer, keras.layers.Dropout):
            layer.seed_generator.state.assign([number, 0])
        if layer.name.endswith("_project_bn"):
            layer.beta.trainable = False  # as in ``efficient``
    return model


def resnet50(dtype: str = "float32", *, seed: int = 0) -> keras.Model:
    """Return Keras's ResNet50 for small pictures; biases before normalizations, of no gradient, are frozen."""
    with building(dtype):
        model = keras.applications.ResNet50(
            weights=None, input_shape=(64, 64, 3), classes=4, classifier_activation=None, name="resnet50"
        )
    randomize(model, seed)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            layer.bias.trainable = False
    return model


def convnext_tiny(dtype: str = "float32", *, seed: int = 0) -> keras.Model:
    """Return Keras's ConvNeXtTiny for small pictures, no block left out at random."""
    with building(dtype):
        model = keras.applications.ConvNeXtTiny(
            weights=None, input_shape=(64, 64, 3), classes=4, classifier_activation=None, name="convnext_tiny"
        )
    for layer in model.layers:
        if hasattr(layer, "drop_path_rate"):
            layer.drop_path_rate = 0.0
    return randomize(model, seed)


def _photographs(rng: np.random.Generator, size: int) -> Batch:
    return _pictures(rng, size, 64)


APPLICATIONS = {
    build.__name__: Case(build.__name__, build, _photographs, "SparseCategoricalCrossentropy", {}, None)
    for build in (efficientnet_b0, resnet50, convnext_tiny)
}

MODELS: dict[str, Case] = {
    "unet": Case("unet", unet, _images, "MeanSquaredError", {}, None),
    "recommender": Case("recommender", recommender, _pairs, "MeanSquaredError", {}, None),
    "efficient": Case("efficient", efficient, _large_pictures, "SparseCategoricalCrossentropy", {}, None),
    "sam": Case("sam", sam, _pictures, "SparseCategoricalCrossentropy", {}, None),
    **{name: CASES[name] for name in ("convnet", "handwritten", "tied", "subclassed")},
}


@cache
def fast_links() -> Hardware:
    """Return hardware on which even tiny models are worth sharding."""
    nothing = FigureRange(0.0, 0.0, "assumed, so that only bytes and FLOPs count")
    return replace(
        read_hardware_file(find_hardware_file("h100")),
        link_bandwidth=Figure(1e14, "assumed"),
        collective_latency=nothing,
        ring_step_latency=nothing,
        launch_overhead=nothing,
    )


def found_for(case: Case, parts: int = 2) -> Found:
    inputs, _ = make_batches(case)[0]
    model = case.build("float64")
    return search(model, Mesh((("batch", 1), ("model", parts))), fast_links(), inputs, keras.optimizers.AdamW())


# On the ranks


def train_both_ways(case: Case, plan: Plan) -> tuple[Record | None, Record]:
    """Train alone on rank 0, then sharded by the plan."""
    batches = make_batches(case)
    records = []
    for sharded in (False, True):
        if not sharded and dist.get_rank():
            records.append(None)
            continue
        model = case.build("float64")
        if sharded:
            tp_planner.parallelize(model, plan)
        record = begin(model, case, "float64", batches[0])
        train(model, case, "float64", batches[:STEPS], record)
        records.append(record)
    return records[0], records[1]


def parallelize_by_search(case: Case) -> tuple[list[str], float]:
    """Return what is stored as shards where a model is parallelized by "auto", and the error of its output."""
    inputs, _ = case.batch(np.random.default_rng(1), BATCH_SIZE)
    models = [case.build("float64") for _ in range(2)]
    tp_planner.parallelize(models[1], "auto", inputs)
    outputs = [model.predict_on_batch(inputs) for model in models]
    sharded = [variable.path for variable in models[1].variables if hasattr(variable._value, "full_tensor")]
    return sharded, float(np.abs(outputs[1] - outputs[0]).max())


# In the parent


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_found_layout_trains_as_one_device(workers: WorkerPool, name: str) -> None:
    """Output, loss, gradients and weights after five steps are those of the single device, with shards among them."""
    case, mesh = MODELS[name], Mesh((("batch", 1), ("model", workers.size)))
    layout = replace(found_for(case).layout, mesh=mesh)
    inputs, _ = make_batches(case)[0]
    assert_trains_as_one_device(workers, case, make_plan(case.build("float64"), layout, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
def test_applications_train_as_one_device(pools: Pools, name: str) -> None:
    """With what is found, as any model: most of their kernels are in shards."""
    case = APPLICATIONS[name]
    found = found_for(case)
    assert abs(found.error) < ERROR
    assert found.gap < 0.01
    inputs, _ = make_batches(case)[0]
    plan = make_plan(case.build("float64"), found.layout, inputs)
    kernels = [each for each in plan.variables if each.path.endswith("/kernel")]
    assert sum(each.is_sharded for each in kernels) > 0.6 * len(kernels)
    # Rounding grows through many convolutions, normalized over few samples: weights of a ResNet50 end 1.2e-10 apart.
    assert_trains_as_one_device(pools(2), case, plan, 1e-9)


def assert_trains_as_one_device(
    workers: WorkerPool, case: Case, plan: Plan, tolerance: float = TOLERANCE["float64"]
) -> None:
    assert any(variable.is_sharded for variable in plan.variables)
    ranks = workers.run(train_both_ways, case, plan)
    single = ranks[0][0]
    assert single is not None
    for _, sharded in ranks:
        assert differences(sharded.outputs, single.outputs, tolerance) == {}
        assert gradient_differences(sharded, single, tolerance) == {}
        assert differences(sharded.weights, single.weights, tolerance) == {}


def found_for_family(name: str) -> Found:
    inputs = batches(name)[0][0]
    return search(EVERY[name].build(), Mesh((("model", 2),)), fast_links(), inputs, keras.optimizers.AdamW())


def test_the_stream_is_found_in_shards() -> None:
    """Where that is cheaper; what is proven is of the layout without, and files and Keras's map say it."""
    found = found_for_family("llama3")
    below = found.best.proven
    assert found.plan.shards_stream
    assert not below.plan.shards_stream
    assert found.cost < below.cost
    assert found.bound <= below.cost
    assert found.layout_map().sequence_parallel
    assert "sequence_parallel = true" in found.toml.splitlines()
    (section,) = found_sections(found.figures)
    without = f"and {1e3 * below.cost:#.4g} ms without; what follows is of the layout without"
    assert section.sentences[0].endswith(f"ms (the high end) with stream in shards, {without}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*FAMILIES, "bloom", "falcon", "deberta", "clip", "siglip", "pali_gemma", "flux", "stable_diffusion_3"]
)
def test_found_layout_of_a_family_trains_as_one_device(pools: Pools, name: str) -> None:
    found = found_for_family(name)
    assert any(variable.is_sharded for variable in found.plan.variables)
    assert_same_function(pools(2).run(train_both, name, found.plan), OF_ITS_OWN.get(name, TOLERANCE["float32"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_no_random_layout_is_cheaper(name: str) -> None:
    """What is found costs no more than nothing sharded, and than the best of many layouts drawn at random."""
    case = MODELS[name]
    found, rng = found_for(case), random.Random(0)
    inputs, _ = make_batches(case)[0]
    model = case.build("float64")
    costs = [found.whole.cost]
    for _ in range(RANDOM_LAYOUTS):
        layout = random_layout(model, found.layout.mesh, rng)
        costs.append(seconds_of(make_plan(model, layout, inputs, keras.optimizers.AdamW()), fast_links()))
    assert found.cost <= min(costs) * (1 + 1e-9)


def test_weights_in_parts_are_in_the_program() -> None:
    """Where shards are joined side by side, the next layer's weight is in their parts: that is found, and bounded."""
    case = MODELS["unet"]
    found = found_for(case)
    assert "S(2:8+8)" in {str(variable.placement) for variable in found.best.proven.plan.variables}
    columns, rows = (None, None, None, "model"), (None, None, "model", None)
    rules = [LayoutRule("down/kernel", columns), LayoutRule("(inner|across)/kernel", rows)]
    rules += [LayoutRule("(down|up|across)/bias", ("model",)), LayoutRule("masks/kernel", columns)]
    inputs, _ = make_batches(case)[0]
    other = make_plan(case.build("float64"), Layout(found.layout.mesh, tuple(rules)), inputs, keras.optimizers.AdamW())
    cost = seconds_of(other, fast_links())
    assert found.cost <= cost
    assert found.bound <= cost


def test_convolutions_are_priced_as_they_are_summed() -> None:
    """What a convolution makes is in another order than its dims', and copied to be summed: the program knows."""
    found = found_for(MODELS["unet"])
    assert any(each.kind == "all_reduce" for each in found.best.proven.plan.collectives)
    assert abs(found.error) < ERROR


def test_gradients_in_another_order_are_priced_as_they_are_copied() -> None:
    """What comes back through heads that are turned, and through experts, is copied where it is multiplied."""
    found = found_for(MODELS["handwritten"])
    assert any(variable.is_sharded for variable in found.best.proven.plan.variables)
    assert abs(found.error) < 1e-4
    assert found.gap < 1e-6


def test_what_autograd_copies_before_it_is_written_into_is_priced_once() -> None:
    """Batch normalization writes into its output, which autograd copies: that is a part of the op that writes."""
    images = keras.Input((32, 32, 8), name="images")
    hidden = keras.layers.Conv2D(64, 1, use_bias=False, name="first")(images)
    hidden = keras.layers.BatchNormalization(name="norm")(hidden)
    model = keras.Model(images, keras.layers.Conv2D(8, 1, use_bias=False, name="second")(hidden), name="normalized")
    inputs = keras.InputSpec(shape=(16, 32, 32, 8), dtype="float32")
    found = search(model, Mesh((("model", 4),)), fast_links(), inputs, keras.optimizers.AdamW())
    assert any(variable.is_sharded for variable in found.best.proven.plan.variables)
    assert abs(found.error) < ERROR


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bloom", "flux", "stable_diffusion_3"])
def test_regions_end_where_the_program_says(name: str) -> None:
    """Planning keeps what reads sizes of shards, and the program leaves plain what not all calls of a layer do."""
    found = found_for_family(name)
    assert abs(found.error) < 0.002
    assert found.gap == 0


def random_layout(model: keras.Model, mesh: Mesh, rng: random.Random) -> Layout:
    """Return a layout that shards a random dim of most weights."""
    rules = []
    for variable in survey(model)[1].values():
        dims = [dim for dim, size in enumerate(variable.shape) if size % mesh.axis_size("model") == 0]
        if dims and not variable.kept_whole and rng.random() < 0.7:
            dim = rng.choice(dims)
            rules.append(
                LayoutRule(variable.path, tuple("model" if at == dim else None for at in range(len(variable.shape))))
            )
    return Layout(mesh, tuple(rules))


@pytest.mark.slow
def test_parallelize_finds_a_layout(workers: WorkerPool) -> None:
    """A layout "auto" is found on every rank alike; a model too small to gain from it stays whole, and right."""
    for sharded, error in workers.run(parallelize_by_search, MODELS["recommender"]):
        assert sharded == []
        assert error < 1e-12
