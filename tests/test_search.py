"""The search for a layout: it agrees with trying every layout, and its rules say what they should."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import pytest

from tests.families import FAMILIES
from tp_planner.frontend.hardware_file import find_hardware_file, read_hardware_file
from tp_planner.frontend.layout_file import read_layout_file
from tp_planner.frontend.survey import survey
from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh, parse_mesh
from tp_planner.planner import make_plan
from tp_planner.search.door import find_layout, read_memory
from tp_planner.search.find import ERROR, search
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
    hidden = keras.layers.LayerNormalization(center=False, axis=(1, 2), name="norm")(hidden)
    return keras.Model(x, keras.layers.Conv2D(256, 3, use_bias=False, name="second")(hidden), name="convolutions")


def two_towers() -> keras.Model:
    """Return two embeddings of which one is large, and the product of what they look up."""
    user, item = (keras.Input((), dtype="int32", name=name) for name in ("user", "item"))
    left = keras.layers.Embedding(2**20, 64, name="users")(user)
    right = keras.layers.Dense(64, use_bias=False, name="project")(keras.layers.Embedding(64, 256, name="items")(item))
    return keras.Model([user, item], keras.ops.sum(left * right, axis=-1), name="two_towers")


SMALL: dict[str, Callable[[], keras.Model]] = {
    each.__name__: each for each in (two_dense, convolutions, two_towers)
}


def all_layouts(model: keras.Model, mesh: Mesh) -> Iterator[Layout]:
    """Yield every layout that shards any dim of any variable that divides."""
    variables = [each for each in survey(model)[1].values() if not each.kept_whole]
    size = mesh.axis_size(mesh.model_axis)
    choices = [
        [(), *(dim for dim, length in enumerate(each.shape) if length % size == 0)] for each in variables
    ]
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
    assert found.cost == pytest.approx(min(costs), rel=1e-9)
    assert abs(found.error) < ERROR
    assert found.gap < 1e-6
