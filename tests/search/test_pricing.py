"""What the search's program says of a layout is what its plan costs, where shards are worked on in another way."""

from __future__ import annotations

from typing import Any

import keras
import pytest

from tests.search.test_search import H100, batch_of, built
from tp_planner.ir.mesh import parse_mesh
from tp_planner.ir.placement import WHOLE
from tp_planner.search.find import search

RANKS, WIDTH, LENGTH = 4, 2048, 256


class Attention(keras.layers.Layer):
    """A head for each rank: its shards need no copy to be turned. Scores are views, and written into."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.query, self.key, self.value = (
            keras.layers.Dense(WIDTH, use_bias=False, name=name) for name in ("query", "key", "value")
        )
        self.output_dense = keras.layers.Dense(WIDTH, use_bias=False, name="output")

    def call(self, x: Any) -> Any:
        shape = (-1, LENGTH, RANKS, WIDTH // RANKS)
        query, key, value = (
            keras.ops.transpose(keras.ops.reshape(dense(x), shape), (0, 2, 1, 3))
            for dense in (self.query, self.key, self.value)
        )
        scores = keras.ops.einsum("bnqd,bnkd->bnqk", query, key)
        scores += 1.0
        mixed = keras.ops.transpose(keras.ops.matmul(keras.ops.softmax(scores), value), (0, 2, 1, 3))
        return self.output_dense(keras.ops.reshape(mixed, (-1, LENGTH, WIDTH)))


class Repeated(keras.layers.Layer):
    """Queries that share keys and values, as code writes them: their gradients come turned, through sums over queries.

    What weighs the heads is cut for their shards, so that a product with it is in another order than of the whole.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.query = keras.layers.Dense(WIDTH, name="query")
        self.key, self.value = (keras.layers.Dense(WIDTH // 2, name=name) for name in ("key", "value"))
        self.share = keras.layers.Dense(2 * RANKS, activation="softmax", name="share")
        self.output_dense = keras.layers.Dense(WIDTH, name="output")

    def call(self, x: Any) -> Any:
        ops, heads, size = keras.ops, 2 * RANKS, WIDTH // (2 * RANKS)
        query = ops.reshape(self.query(x), (-1, LENGTH, heads, size))
        key, value = (
            ops.repeat(ops.reshape(dense(x), (-1, LENGTH, heads // 2, size)), 2, axis=2)
            for dense in (self.key, self.value)
        )
        query, key, value = (ops.transpose(each, (0, 2, 1, 3)) for each in (query, key, value))
        scores = ops.softmax(ops.matmul(query, ops.swapaxes(key, 2, 3)))
        mixed = ops.einsum("bhqk,bhkd->bhqd", scores, value) * ops.transpose(self.share(x), (0, 2, 1))[..., None]
        return self.output_dense(ops.reshape(ops.transpose(mixed, (0, 2, 1, 3)), (-1, LENGTH, WIDTH)))


class Experts(keras.layers.Layer):
    """Matrices whose gradients come in another order than they are stored in, where they are whole."""

    def build(self, shape: Any) -> None:
        self.up = self.add_weight(shape=(8, shape[-1], 2 * WIDTH), name="up")
        self.down = self.add_weight(shape=(8, 2 * WIDTH, shape[-1]), name="down")

    def call(self, x: Any) -> Any:
        hidden = keras.ops.silu(keras.ops.einsum("bsd,edh->ebsh", x, self.up))
        return keras.ops.sum(keras.ops.einsum("ebsh,ehd->ebsd", hidden, self.down), axis=0)


def model_of(layer: keras.layers.Layer) -> keras.Model:
    x = keras.Input((LENGTH, WIDTH), name="x")
    return keras.Model(x, layer(x), name="priced")


@pytest.mark.parametrize("make", [Attention, Repeated, Experts])
def test_the_program_says_what_the_plan_costs(make: type[keras.layers.Layer]) -> None:
    model = built(lambda: model_of(make(name="layer")))
    found = search(model, parse_mesh(f"model={RANKS}"), H100, batch_of(model, 8), keras.optimizers.Adam())
    assert any(each.placement != WHOLE for each in found.best.proven.plan.variables)
    assert abs(found.error) < 1e-6
    assert found.gap < 1e-6
