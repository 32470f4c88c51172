"""The linter finds what is wrong with a layout, says what to write instead, and is silent about good ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import keras
import keras_hub
import pytest
from typer.testing import CliRunner

from tests.models import CASES, GatedBlock, llama, mlp, tied
from tp_planner.cli import app
from tp_planner.frontend.layout_file import find_layout_file, read_layout_file
from tp_planner.frontend.trace import trace
from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import Layout, LayoutRule, Zero
from tp_planner.ir.mesh import parse_mesh
from tp_planner.linter import examine, lint
from tp_planner.passes.correct_layout import find_strains, patterns_of, propose_corrections
from tp_planner.planner import make_plan
from tp_planner.report.findings import lint_sections
from tp_planner.report.sections import sections_to_text

ROOT = Path(__file__).resolve().parents[1]

Rules = Mapping[str, tuple[Any, ...]]
Told = list[tuple[str, str, str]]  # severity, code and sentence of each finding

MLP = CASES["mlp"].rules


def layout_of(rules: Rules, mesh: str = "model=2") -> Layout:
    return Layout(parse_mesh(mesh), tuple(LayoutRule(pattern, axes) for pattern, axes in rules.items()))


def told(model: keras.Model, rules: Rules, mesh: str = "model=2", infos: bool = False) -> Told:
    """Return errors and warnings, and infos where they are wanted."""
    findings = lint(model, layout_of(rules, mesh))
    return [(each.severity, each.code, each.text) for each in findings if infos or each.severity != "info"]


def without(rules: Rules, *patterns: str) -> Rules:
    return {pattern: axes for pattern, axes in rules.items() if pattern not in patterns}


class Reused(keras.layers.Layer):
    """Multiplies with the transposed weight of another layer."""

    def __init__(self, weight: Any, **options: Any) -> None:
        super().__init__(**options)
        self.kernel = weight

    def call(self, x: Any) -> Any:
        return keras.ops.matmul(x, keras.ops.transpose(self.kernel))


def sharing() -> keras.Model:
    """An autoencoder whose second layer uses the weight of the first."""
    x = keras.Input((8,), name="x")
    first = keras.layers.Dense(4, name="first")
    y = first(x)
    y = Reused(first.kernel, name="second")(y)
    return keras.Model(x, keras.layers.Dense(8, name="head")(y), name="sharing")


def attention(heads: int = 4, key_value_heads: int | None = None) -> keras.Model:
    """Self-attention with a residual; where ``key_value_heads`` is given, grouped."""
    x = keras.Input((4, 16), name="x")
    if key_value_heads is None:
        layer: Any = keras.layers.MultiHeadAttention(heads, 4, name="attention")
    else:
        layer = keras.layers.GroupQueryAttention(4, heads, key_value_heads, name="attention")
    return keras.Model(x, x + layer(x, x), name="attends")


def blocks(number: int = 2, norm: bool = False) -> keras.Model:
    """Feed-forward blocks with a residual around each."""
    features = x = y = keras.Input((8,), name="x")
    for block in range(number):
        if norm:
            y = keras.layers.LayerNormalization(name=f"norm_{block}")(y)
        y = keras.layers.Dense(32, activation="relu", name=f"block_{block}_up")(y)
        x = y = x + keras.layers.Dense(8, name=f"block_{block}_down")(y)
    return keras.Model(features, x, name="blocks")


def towers() -> keras.Model:
    """Two equal layers of layers, of which the planner looks at one."""
    features = keras.Input((8,), name="x")
    x = keras.layers.Dense(8, name="stem")(features)
    for name in ("left", "right"):
        x = GatedBlock(16, name=name)(x)
    return keras.Model(features, x, name="towers")


def with_dropout() -> keras.Model:
    """A pair of layers with a seeded dropout, whose seed state is an integer."""
    x = keras.Input((8,), name="x")
    y = keras.layers.Dropout(0.5, seed=1, name="dropout")(keras.layers.Dense(16, name="up")(x))
    return keras.Model(x, keras.layers.Dense(8, name="down")(y), name="with_dropout")


QUERY_KEY_VALUE = "attention/(query|key|value)/kernel"
QUERY_KEY_VALUE_BIAS = "attention/(query|key|value)/bias"
ATTENTION: Rules = {
    QUERY_KEY_VALUE: (None, "model", None),
    QUERY_KEY_VALUE_BIAS: ("model", None),
    "attention/attention_output/kernel": ("model", None, None),
}
BLOCKS: Rules = {
    "block_[0-9]+_up/kernel": (None, "model"),
    "block_[0-9]+_up/bias": ("model",),
    "block_[0-9]+_down/kernel": ("model", None),
}

# In each of these layouts one thing is wrong; they are good without it.
MISTAKES: dict[str, tuple[Callable[[], keras.Model], Rules, str, Told]] = {
    "pattern that is no regular expression": (
        mlp,
        {**MLP, "hea(d/kernel": (None, "model")},
        "model=2",
        [
            (
                "error",
                "invalid-pattern",
                "layout rule 'hea(d/kernel' is not a regular expression: missing ), unterminated subpattern at "
                "position 3; escape special characters",
            ),
        ],
    ),
    "axis that the mesh has not": (
        mlp,
        {**MLP, "up/kernel": (None, "modle")},
        "model=2",
        [
            (
                "error",
                "unknown-axis",
                "layout rule 'up/kernel' -> (None, modle) names mesh axis 'modle', the mesh has 'model'; use one "
                "of these or None",
            ),
        ],
    ),
    "axis for two dims": (
        mlp,
        {**MLP, "up/kernel": ("model", "model")},
        "model=2",
        [
            (
                "error",
                "repeated-axis",
                "layout rule 'up/kernel' -> (model, model) uses mesh axis 'model' twice; an axis can shard one dim "
                "of a tensor",
            ),
        ],
    ),
    "entry too few": (
        attention,
        {**ATTENTION, QUERY_KEY_VALUE: (None, "model")},
        "model=2",
        [
            (
                "error",
                "wrong-rank",
                "layout rule 'attention/(query|key|value)/kernel' -> (None, model) has 2 entries, variable "
                "'attention/query/kernel' of shape (16, 4, 4) has 3 dims; write one entry per dim",
            ),
            (
                "error",
                "wrong-rank",
                "layout rule 'attention/(query|key|value)/kernel' -> (None, model) has 2 entries, variable "
                "'attention/key/kernel' of shape (16, 4, 4) has 3 dims; write one entry per dim",
            ),
            (
                "error",
                "wrong-rank",
                "layout rule 'attention/(query|key|value)/kernel' -> (None, model) has 2 entries, variable "
                "'attention/value/kernel' of shape (16, 4, 4) has 3 dims; write one entry per dim",
            ),
        ],
    ),
    "two rules for a variable": (
        mlp,
        {**without(MLP, "up/kernel"), ".*p/kernel": (None, "model"), "u.*/kernel": (None, "model")},
        "model=2",
        [
            (
                "error",
                "ambiguous-path",
                "variable 'up/kernel' matches 2 layout rules: '.*p/kernel', 'u.*/kernel'; make each path match at "
                "most one",
            ),
        ],
    ),
    "two rules for an output": (
        mlp,
        {**MLP, "up/out.*": (None, None), ".*p/output": (None, None)},
        "model=2",
        [
            (
                "error",
                "ambiguous-path",
                "output 'up/output' matches 2 layout rules: 'up/out.*', '.*p/output'; make each path match at most one",
            ),
        ],
    ),
    "typing mistake": (
        mlp,
        {**MLP, "haed/kernel": (None, "model")},
        "model=2",
        [
            (
                "warning",
                "unmatched-rule",
                "layout rule 'haed/kernel' matches no variable; closest: 'head/kernel'",
            ),
        ],
    ),
    "old rule that matched a part": (
        mlp,
        {**MLP, "ead/kernel": (None, "model")},
        "model=2",
        [
            (
                "warning",
                "partial-match",
                "layout rule 'ead/kernel' matches no variable as a whole, but a part of 'head/kernel'; Keras "
                "matches whole paths: write '.*ead/kernel.*' or the full path",
            ),
        ],
    ),
    "rules of another model": (
        mlp,
        {"fc1/kernel": (None, "model"), "fc2/kernel": ("model", None)},
        "model=2",
        [
            (
                "error",
                "unmatched-rule",
                "layout rule 'fc1/kernel' matches no variable; closest: 'up/kernel'",
            ),
            (
                "error",
                "unmatched-rule",
                "layout rule 'fc2/kernel' matches no variable; closest: 'up/kernel'",
            ),
        ],
    ),
    "several mistakes": (
        mlp,
        {"up/kernel": (None, "modle"), "up/bias": (None, "model"), "haed/bias": ("model",)},
        "model=2",
        [
            (
                "error",
                "unknown-axis",
                "layout rule 'up/kernel' -> (None, modle) names mesh axis 'modle', the mesh has 'model'; use one "
                "of these or None",
            ),
            (
                "error",
                "wrong-rank",
                "layout rule 'up/bias' -> (None, model) has 2 entries, variable 'up/bias' of shape (64,) has 1 "
                "dims; write one entry per dim",
            ),
            (
                "warning",
                "unmatched-rule",
                "layout rule 'haed/bias' matches no variable; closest: 'head/bias'",
            ),
        ],
    ),
    "rule for the other end of a tied embedding": (
        tied,
        {**CASES["tied"].rules, "token_embedding/reverse_embeddings": (None, "model")},
        "model=2",
        [
            (
                "warning",
                "tied-weight",
                "layout rule 'token_embedding/reverse_embeddings' matches no variable: layer 'token_embedding' is "
                "tied, its weight is 'token_embedding/embeddings'; one tensor has one placement: remove the rule, "
                "and place the weight by its path 'token_embedding/embeddings'",
            ),
        ],
    ),
    "rule for a weight of another layer": (
        sharing,
        {"head/kernel": (None, "model"), "head/bias": ("model",), "second/kernel": (None, None)},
        "model=2",
        [
            (
                "warning",
                "tied-weight",
                "layout rule 'second/kernel' matches no variable: layer 'second' is tied, its weight is "
                "'first/kernel'; one tensor has one placement: remove the rule, and place the weight by its path "
                "'first/kernel'",
            ),
        ],
    ),
    "pattern beside exact paths": (
        mlp,
        {**MLP, "u.*/kernel": (None, "model")},
        "model=2",
        [
            (
                "warning",
                "shadowed-rule",
                "layout rule 'u.*/kernel' matches 'up/kernel', but places nothing: exact paths go before patterns; "
                "remove it, or the rule 'up/kernel'",
            ),
        ],
    ),
    "number that is too narrow": (
        partial(blocks, 3),
        {**without(BLOCKS, "block_[0-9]+_up/bias"), "block_[0-1]_up/bias": ("model",)},
        "model=2",
        [
            (
                "warning",
                "number-gap",
                "layout rule 'block_[0-1]_up/bias' matches 'block_0_up/bias' and 1 other, but not "
                "'block_2_up/bias', which differs from it in numbers only; match every number, as "
                "'block_[0-9]+_up/bias' does",
            ),
            (
                "warning",
                "bias-mismatch",
                "'block_2_up/kernel' is sharded on dim 1, but its bias is whole, not sharded on dim 0. That takes "
                "1 collective, in which a rank sends 64 bytes; write 'block_2_up/bias' -> (model)",
            ),
        ],
    ),
    "state that stays whole": (
        with_dropout,
        {**MLP, "dropout/seed_.*": ("model",)},
        "model=2",
        [
            (
                "warning",
                "kept-whole",
                "layout rule 'dropout/seed_.*' names variable 'dropout/seed_generator_state', which stays whole: "
                "int32 state is kept whole on every rank; make the pattern narrower, so that it does not match it",
            ),
        ],
    ),
    "ranks on an axis that no rule names": (
        mlp,
        MLP,
        "batch=2,model=1",
        [
            (
                "warning",
                "one-rank",
                "axis 'model' of mesh (batch=2, model=1) has one rank: layers are not split, the batch is over "
                "'batch'; give 'model' the size that the layout is for",
            ),
        ],
    ),
    "ranks on an axis that no rule names where rules name none": (
        mlp,
        {pattern: tuple(None for _ in axes) for pattern, axes in MLP.items()},
        "batch=2,model=1",
        [
            (
                "warning",
                "nothing-sharded",
                "no layout rule shards a variable over 'batch', the axis of mesh (batch=2, model=1) that has 2 "
                "ranks: each of them stores and computes the whole model; name 'batch' in the rules, or give the "
                "size to the axis that they name",
            ),
        ],
    ),
    "fewer key-value heads than ranks": (
        partial(attention, 8, 2),
        {**ATTENTION},
        "model=4",
        [
            (
                "warning",
                "short-dim",
                "layout rule 'attention/(query|key|value)/kernel' shards dim 1 of 'attention/key/kernel' and 1 "
                "other, of length 2, over 4 ranks: 2 of them store nothing of it, and it is gathered at use. That "
                "takes 2 collectives, in which a rank sends 1536 bytes; use 2 ranks, or take them out of the rule: "
                "then a rank stores 512 bytes more",
            ),
            (
                "warning",
                "short-dim",
                "layout rule 'attention/(query|key|value)/bias' shards dim 0 of 'attention/key/bias' and 1 other, "
                "of length 2, over 4 ranks: 2 of them store nothing of it, and it is gathered at use. That takes 2 "
                "collectives, in which a rank sends 96 bytes; use 2 ranks, or take them out of the rule: then a "
                "rank stores 32 bytes more",
            ),
        ],
    ),
    "dim that does not divide": (
        partial(mlp, width=9),
        {**MLP, "head/kernel": ("model", None)},
        "model=2",
        [
            (
                "warning",
                "uneven-dim",
                "layout rule 'head/kernel' shards dim 0 of 'head/kernel', of length 9, over 2 ranks: they store 5, "
                "4 of it, and it is gathered at use. That takes 1 collective, in which a rank sends 160 bytes; use "
                "a number of ranks that divides 9, or take it out of the rule: then a rank stores 128 bytes more",
            ),
        ],
    ),
    "query, key and value by width": (
        attention,
        {**ATTENTION, QUERY_KEY_VALUE: ("model", None, None)},
        "model=2",
        [
            (
                "warning",
                "contracted-dim",
                "layout rule 'attention/(query|key|value)/kernel' shards dim 0 of 'attention/query/kernel' and 2 "
                "others; this dim is contracted with a whole tensor, 'model input 0', and the output summed over "
                "the ranks. A training step takes 8 collectives, in which a rank sends 2400 bytes; write "
                "'attention/(query|key|value)/kernel' -> (None, model, None): 1 collective, in which a rank sends "
                "512 bytes",
            ),
        ],
    ),
    "query, key and value by head size": (
        attention,
        {**ATTENTION, QUERY_KEY_VALUE: (None, None, "model"), QUERY_KEY_VALUE_BIAS: (None, "model")},
        "model=2",
        [
            (
                "warning",
                "output-dim",
                "layout rule 'attention/(query|key|value)/kernel' shards dim 2 of 'attention/query/kernel' and 2 "
                "others; the output is made whole (an output dim of the weight is sharded; gathered: "
                "aten._scaled_dot_product_flash_attention_for_cpu.default in 'attention' works on each batch entry "
                "and head alone; query, key and value must be sharded alike there). A training step takes 5 "
                "collectives, in which a rank sends 1536 bytes; write 'attention/(query|key|value)/kernel' -> "
                "(None, model, None) and 'attention/(query|key|value)/bias' -> (model, None): 1 collective, in "
                "which a rank sends 512 bytes",
            ),
        ],
    ),
    "value forgotten": (
        attention,
        {
            **without(ATTENTION, QUERY_KEY_VALUE, QUERY_KEY_VALUE_BIAS),
            "attention/(query|key)/kernel": (None, "model", None),
            "attention/(query|key)/bias": ("model", None),
        },
        "model=2",
        [
            (
                "warning",
                "missing-rule",
                "no layout rule names 'attention/value/kernel', beside layers that are sharded. A training step "
                "takes 2 collectives, in which a rank sends 768 bytes, and 2752 bytes of variables per rank; "
                "write 'attention/value/kernel' -> (None, model, None) and 'attention/value/bias' -> (model, "
                "None): 1 collective, in which a rank sends 512 bytes, and 2208 bytes of variables per rank",
            ),
        ],
    ),
    "up and down by columns": (
        blocks,
        {**BLOCKS, "block_[0-9]+_down/kernel": (None, "model")},
        "model=2",
        [
            (
                "warning",
                "output-dim",
                "layout rule 'block_[0-9]+_down/kernel' shards dim 1 of 'block_0_down/kernel' and 1 other; the "
                "output is made whole (an output dim of the weight is sharded; gathered: layer 'block_1_up' takes it "
                "as R, it arrives as S(1)). A training step takes 9 collectives, in which a "
                "rank sends 928 bytes; write 'block_[0-9]+_down/kernel' -> (model, None): 3 collectives, in which "
                "a rank sends 192 bytes",
            ),
        ],
    ),
    "up and down by rows": (
        blocks,
        {**BLOCKS, "block_[0-9]+_up/kernel": ("model", None)},
        "model=2",
        [
            (
                "warning",
                "contracted-dim",
                "layout rule 'block_[0-9]+_up/kernel' shards dim 0 of 'block_0_up/kernel' and 1 other; this dim is "
                "contracted with a whole tensor, 'model input 0', and the output summed over the ranks. A training "
                "step takes 9 collectives, in which a rank sends 1056 bytes; write 'block_[0-9]+_up/kernel' -> "
                "(None, model): 3 collectives, in which a rank sends 192 bytes",
            ),
        ],
    ),
    "one rule for all kernels": (
        mlp,
        {".*kernel": (None, "model")},
        "model=2",
        [
            (
                "warning",
                "output-dim",
                "layout rule '.*kernel' shards dim 1 of 'down/kernel'; the output is made whole (an output dim of "
                "the weight is sharded; gathered: layer 'head' takes it as R, it arrives as S(1)). A training step "
                "takes 8 collectives, in which a rank sends 1392 bytes; write 'down/kernel' -> (model, None), and "
                "keep rule '.*kernel' off it: 5 collectives, in which a rank sends 688 bytes",
            ),
            (
                "warning",
                "bias-mismatch",
                "'up/kernel' and 1 other are sharded on dim 1, but their biases are whole, not sharded on dim 0. "
                "That takes 2 collectives, in which a rank sends 144 bytes; write 'up/bias' -> (model) and "
                "'head/bias' -> (model)",
            ),
        ],
    ),
    "down forgotten": (
        blocks,
        without(BLOCKS, "block_[0-9]+_down/kernel"),
        "model=2",
        [
            (
                "warning",
                "missing-rule",
                "no layout rule names 'block_0_down/kernel' and 1 other, beside layers that are sharded. A "
                "training step takes 3 collectives, in which a rank sends 320 bytes, and 3264 bytes of variables "
                "per rank; write 'block_[0-9]+_down/kernel' -> (model, None): 3 collectives, in which a rank sends "
                "192 bytes, and 2240 bytes of variables per rank",
            ),
        ],
    ),
    "up forgotten": (
        mlp,
        without(MLP, "up/kernel", "up/bias"),
        "model=2",
        [
            (
                "warning",
                "missing-rule",
                "no layout rule names 'up/kernel', beside layers that are sharded. A training step takes 2 "
                "collectives, in which a rank sends 512 bytes, and 9632 bytes of variables per rank; write "
                "'up/kernel' -> (None, model) and 'up/bias' -> (model): 1 collective, in which a rank sends 256 "
                "bytes, and 7456 bytes of variables per rank",
            ),
        ],
    ),
    "bias of up forgotten": (
        blocks,
        without(BLOCKS, "block_[0-9]+_up/bias"),
        "model=2",
        [
            (
                "warning",
                "bias-mismatch",
                "'block_0_up/kernel' and 1 other are sharded on dim 1, but their biases are whole, not sharded on "
                "dim 0. That takes 2 collectives, in which a rank sends 128 bytes; write 'block_[0-9]+_up/bias' -> "
                "(model)",
            ),
        ],
    ),
    "bias of down sharded": (
        mlp,
        {**MLP, "down/bias": ("model",)},
        "model=2",
        [
            (
                "warning",
                "bias-mismatch",
                "'down/kernel' is sharded on dim 0, but its bias is sharded on dim 0, not whole. That takes 1 "
                "collective, in which a rank sends 64 bytes; take it out of rule 'down/bias'",
            ),
        ],
    ),
    "bias sharded alone": (
        mlp,
        {**MLP, "head/bias": ("model",)},
        "model=2",
        [
            (
                "warning",
                "bias-mismatch",
                "'head/kernel' is whole, but its bias is sharded on dim 0, not whole. That takes 1 collective, in "
                "which a rank sends 16 bytes; take it out of rule 'head/bias'",
            ),
        ],
    ),
    "down forgotten where that costs memory alone": (
        mlp,
        without(MLP, "down/kernel"),
        "model=2",
        [
            (
                "warning",
                "missing-rule",
                "no layout rule names 'down/kernel', beside layers that are sharded. A training step takes 1 "
                "collective, in which a rank sends 256 bytes, and 11552 bytes of variables per rank; write "
                "'down/kernel' -> (model, None): 1 collective, in which a rank sends 256 bytes, and 7456 bytes of "
                "variables per rank",
            ),
        ],
    ),
    "down forgotten in layers of layers": (
        towers,
        {".*/(gate|up)/kernel": (None, "model"), ".*/(gate|up)/bias": ("model",)},
        "model=2",
        [
            (
                "warning",
                "missing-rule",
                "no layout rule names 'left/down/kernel' and 1 other, beside layers that are sharded. A training "
                "step takes 6 collectives, in which a rank sends 384 bytes, and 2592 bytes of variables per rank; "
                "write 'left/down/kernel' -> (model, None) and 'right/down/kernel' -> (model, None): 4 "
                "collectives, in which a rank sends 256 bytes, and 2080 bytes of variables per rank",
            ),
        ],
    ),
    "norms sharded": (
        partial(blocks, norm=True),
        {**BLOCKS, "norm_./gamma": ("model",)},
        "model=2",
        [
            (
                "warning",
                "gathered-weight",
                "layout rule 'norm_./gamma' shards 'norm_0/gamma' and 1 other, but shards are of no use there "
                "(stored sharded, gathered at use: aten.native_layer_norm.default in 'norm_0' needs communication "
                "between the shards). That takes 2 collectives, in which a rank sends 32 bytes; take them out of "
                "the rule: then a rank stores 32 bytes more",
            ),
        ],
    ),
    "output that cannot be placed": (
        partial(blocks, 1, norm=True),
        {**BLOCKS, "norm_0/output": (None, "model")},
        "model=2",
        [
            (
                "warning",
                "output-rule",
                "layout rule 'norm_0/output' -> (None, model) asks to shard an output of 'norm_0'; it is placed by "
                "the ops that make it; remove the rule",
            ),
        ],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_found(name: str) -> None:
    """One mistake in a good layout gives its findings, with the path, the numbers and what to write instead."""
    build, rules, mesh, expected = MISTAKES[name]
    assert told(build(), rules, mesh) == expected


@pytest.mark.parametrize(
    ("build", "rules"), [(mlp, MLP), (attention, ATTENTION), (blocks, BLOCKS), (tied, CASES["tied"].rules)]
)
def test_layouts_without_the_mistake_are_good(build: Callable[[], keras.Model], rules: Rules) -> None:
    """What the table finds is not found where the mistake is not."""
    assert told(build(), rules) == []


# Good layouts


@pytest.mark.parametrize("preset", ["mlp", "gpt", "encoder", "vit", "llama"])
def test_presets_are_good(preset: str) -> None:
    """A preset has no error and no warning on its model; what it leaves whole on purpose is an info."""
    model = CASES[preset].build(**({} if preset == "mlp" else {"blocks": 1}))
    findings = lint(model, read_layout_file(find_layout_file(preset)).on(parse_mesh("model=2")))
    assert {(finding.severity, finding.code) for finding in findings} <= {("info", "unnamed-variables")}


def test_vocabulary_sharded_ends_are_no_finding() -> None:
    """Logits that are gathered because the model returns them are as they should be."""
    assert told(llama(blocks=1), CASES["llama"].rules, infos=True) == []


def embedded(vocabulary: int) -> keras.Model:
    """An embedding, a norm, and a layer on top."""
    x = keras.Input((4,), dtype="int32", name="x")
    y = keras.layers.Embedding(vocabulary, 8, name="tokens")(x)
    y = keras.layers.LayerNormalization(name="norm")(y)
    return keras.Model(x, keras.layers.Dense(4, name="head")(y), name="embedded")


INFOS: dict[str, tuple[Callable[[], keras.Model], Rules, str, Told]] = {
    "mesh of one rank": (
        mlp,
        {**MLP, "haed/kernel": (None, "model")},
        "model=1",
        [
            ("warning", "unmatched-rule", "layout rule 'haed/kernel' matches no variable; closest: 'head/kernel'"),
            (
                "info",
                "one-rank",
                "mesh (model=1) has one rank: nothing is sharded; give the mesh the size that the layout is for",
            ),
        ],
    ),
    "much that no rule names": (
        mlp,
        MLP,
        "model=2",
        [
            (
                "info",
                "unnamed-variables",
                "no layout rule names 3 variables, which every rank stores whole: 1184 of its 7456 bytes (15%), 1024 "
                "of them for 'head/kernel' of shape (32, 8); write a rule for the large ones if ranks are short of "
                "memory",
            )
        ],
    ),
    "nothing better to write": (
        partial(embedded, vocabulary=128),
        {"tokens/embeddings": (None, "model")},
        "model=2",
        [
            (
                "info",
                "output-dim",
                "layout rule 'tokens/embeddings' shards dim 1 of 'tokens/embeddings'; the output is made whole (an "
                "output dim of the weight is sharded; gathered: aten.native_layer_norm.default in 'norm' needs "
                "communication between the shards). That takes 1 collective, in which a rank sends 128 bytes; no "
                "other dim was found to be cheaper",
            )
        ],
    ),
}


@pytest.mark.parametrize("name", INFOS)
def test_information(name: str) -> None:
    """What is no mistake, and what costs something but cannot be written better, is an info."""
    build, rules, mesh, expected = INFOS[name]
    assert told(build(), rules, mesh, infos=True) == expected


# Corrections


def hub_map(blocks: int = 1) -> tuple[keras.Model, keras.distribution.LayoutMap]:
    """KerasHub's Llama 3 on the meta device, with the map that KerasHub has for it."""
    with keras.device("meta"):
        model = keras_hub.models.Llama3Backbone(
            vocabulary_size=64,
            num_layers=blocks,
            num_query_heads=4,
            num_key_value_heads=2,
            hidden_dim=32,
            intermediate_dim=64,
            name="llama",
        )
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), ["cpu:0", "cpu:1"])
    return model, keras_hub.models.Llama3Backbone.get_layout_map(mesh)


HUB_INPUTS = {name: keras.InputSpec(shape=(2, 16), dtype="int32") for name in ("token_ids", "padding_mask")}


def test_map_of_keras_hub_shards_the_contracted_dim() -> None:
    """KerasHub's map puts the model axis on the contracted dim of query, key and value; the linter says what to write.

    With the line that it prints there is nothing to warn of, and a step costs what it says.
    """
    model, layout_map = hub_map()
    warning, _ = lint(model, layout_map, HUB_INPUTS)
    pattern = "transformer_layer.*self_attention.*(query|key|value).kernel"
    assert (warning.severity, warning.code, warning.rule) == ("warning", "contracted-dim", pattern)
    assert warning.text == (
        f"layout rule {pattern!r} shards dim 0 of 'transformer_layer_0/self_attention/query/kernel' and 2 others; "
        f"this dim is contracted with a whole tensor, 'transformer_layer_0/self_attention_layernorm output', and the "
        f"output summed over the ranks. A training step takes 9 collectives, in which a rank sends 28672 bytes; "
        f"write {pattern!r} -> (batch, model, None): 5 collectives, in which a rank sends 20480 bytes"
    )
    changed = {key: layout_map._layout_map[key].axes for key in layout_map}
    changed[pattern] = ("batch", "model", None)
    corrected = layout_of(changed, "batch=1,model=2")
    assert {finding.severity for finding in lint(model, corrected, HUB_INPUTS)} == {"info"}


def test_costs_are_those_of_plans() -> None:
    """What a finding says of the layout and of its correction is what their plans have."""
    bad, good = (
        make_plan(attention(), layout_of({**ATTENTION, QUERY_KEY_VALUE: axes}))
        for axes in (("model", None, None), (None, "model", None))
    )
    ((_, _, text),) = MISTAKES["query, key and value by width"][3]
    for plan in (bad, good):
        sent = sum(collective.wire_bytes for collective in plan.collectives)
        assert f"{len(plan.collectives)} collective" in text
        assert f"a rank sends {sent} bytes" in text


def test_only_weights_beside_a_strain_are_proposed() -> None:
    """Rules are proposed for the unnamed weights that a strained layer feeds, not for those of another branch."""
    x = keras.Input((8,), name="x")
    pair = keras.layers.Dense(8, name="down")(keras.layers.Dense(16, name="up")(x))
    model = keras.Model(x, [pair, keras.layers.Dense(4, name="aside")(x)], name="branches")
    layout = layout_of({"up/kernel": (None, "model"), "up/bias": ("model",)})
    plan, graph = make_plan(model, layout), trace(model)
    (strain,) = find_strains(plan, graph)
    proposed = {correction.weights for correction in propose_corrections(layout, plan, graph, strain)}
    assert proposed == {("up/kernel",), ("down/kernel",)}


@pytest.mark.parametrize(
    ("paths", "patterns"),
    [
        (["head/kernel"], ("head/kernel",)),
        (["block_0/up/kernel"], ("block_0/up/kernel",)),
        (["block_0/up/kernel", "block_11/up/kernel", "head/kernel"], ("block_[0-9]+/up/kernel", "head/kernel")),
        (["a.0/kernel", "a.1/kernel"], (r"a\.[0-9]+/kernel",)),
    ],
)
def test_patterns_are_of_the_paths(paths: list[str], patterns: tuple[str, ...]) -> None:
    """Paths that differ in numbers share a pattern, which matches all of them."""
    assert patterns_of(paths) == patterns
    assert all(any(path == pattern or re.fullmatch(pattern, path) for pattern in patterns) for path in paths)


def test_layout_without_a_plan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the planner refuses is found too, with its own words."""

    def refuse(*_: Any) -> None:
        raise PlanError("the model cannot be planned: no; take the layout rules of that layer out")

    monkeypatch.setattr("tp_planner.linter.make_plan", refuse)
    message = "the model cannot be planned: no; take the layout rules of that layer out"
    assert told(mlp(), MLP) == [("error", "no-plan", message)]


# Meshes: what is said beside the rules

NODES = "what each layer communicates crosses the links between nodes, many times slower than those within one"
MESHES: dict[str, tuple[Rules, str, Zero | None, int | None, Told]] = {
    "in parts over one replica": (
        MLP,
        "model=2",
        1,
        None,
        [
            (
                "warning",
                "one-replica",
                "zero=1 stores in parts over the replicas, and on mesh (model=2) there is one: the batch is split over "
                "no axis; give the mesh an axis for the batch, for example batch=2,model=2",
            )
        ],
    ),
    "too short for parts": (
        MLP,
        "batch=16,model=2",
        3,
        None,
        [
            (
                "info",
                "not-in-parts",
                "zero=3 leaves 1 variable whole, 'head/bias', which each replica stores: no dim has an element for "
                "each of 16",
            )
        ],
    ),
    "layers across nodes": (
        MLP,
        "model=16",
        None,
        8,
        [
            (
                "warning",
                "crosses-nodes",
                f"mesh (model=16) has ranks that share layers over 'model' on several nodes of 8 devices: {NODES}; "
                f"split layers over the devices of one node: batch=2, model=8",
            )
        ],
    ),
    "layers on a fitting axis in the wrong place": (
        MLP,
        "model=4,batch=4",
        None,
        8,
        [
            (
                "warning",
                "crosses-nodes",
                f"mesh (model=4, batch=4) has ranks that share layers over 'model' on several nodes of 8 devices: "
                f"{NODES}; put it last, so that its ranks are neighbours: batch=4, model=4",
            )
        ],
    ),
    "layers on three quarters of a node": (
        {},
        "batch=2,model=6",
        None,
        8,
        [
            (
                "warning",
                "crosses-nodes",
                f"mesh (batch=2, model=6) has ranks that share layers over 'model' on several nodes of 8 devices: "
                f"{NODES}; split layers over the devices of one node: batch=6, model=2",
            )
        ],
    ),
    "layers within nodes": (MLP, "batch=8,model=8", None, 8, []),
}


@pytest.mark.parametrize("name", MESHES)
def test_meshes(name: str) -> None:
    rules, mesh, zero, devices_per_node, expected = MESHES[name]
    found = lint(mlp(), layout_of(rules, mesh), zero=zero, devices_per_node=devices_per_node)
    codes = {"one-replica", "not-in-parts", "crosses-nodes"}
    assert [(each.severity, each.code, each.text) for each in found if each.code in codes] == expected


def test_every_code_is_found_and_documented() -> None:
    """plans/lint.md lists exactly the codes that the tests of this file make the linter find."""
    text = (ROOT / "plans" / "lint.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `([a-z-]+)` \|", text.partition("## Codes")[2].partition("\n## ")[0], re.M)
    tables = (*MISTAKES.values(), *INFOS.values())
    found = {code for *_, expected in tables for _, code, _ in expected} | {"layout-file", "no-plan"}
    found |= {code for *_, expected in MESHES.values() for _, code, _ in expected}
    assert sorted(documented) == sorted(found)


# The command line

WRONG = """
[[rules]]
pattern = "(.*/)?up/kernel"
axes = ["", "model"]
[[rules]]
pattern = "down/kernel"
axes = ["model", ""]
[[rules]]
pattern = "haed/kernel"
axes = ["", "model"]
"""

REPORT = """\
Lint of layout 'wrong.toml' for model 'mlp' on mesh (model=2)
  S(d): sharded on dim d; the shape per rank is that of rank 0, the largest

what the rules do
  rules[0] '(.*/)?up/kernel' -> (None, model)
      up/kernel: 16x64 as S(1), 16x32 per rank, column
  rules[1] 'down/kernel' -> (model, None)
      down/kernel: 64x32 as S(0), 32x32 per rank, row
  rules[2] 'haed/kernel' -> (None, model)
      no variable
  no rule: 1440 bytes on every rank
      up/bias: 64, whole on every rank
      down/bias: 32, whole on every rank
      head/kernel: 32x8, whole on every rank
      head/bias: 8, whole on every rank

findings: 2 warnings, 1 info
  warning unmatched-rule rules[2]: layout rule 'haed/kernel' matches no variable
      next: closest: 'head/kernel'
  warning bias-mismatch: 'up/kernel' is sharded on dim 1, but its bias is whole, not sharded on dim 0. That takes 1
    collective, in which a rank sends 128 bytes
      next: write 'up/bias' -> (model)
  info unnamed-variables: no layout rule names 4 variables, which every rank stores whole: 1440 of its 7584 bytes
    (18%), 1024 of them for 'head/kernel' of shape (32, 8)
      next: write a rule for the large ones if ranks are short of memory
      in: up/bias, down/bias, head/kernel, head/bias
"""

BROKEN = """\
Lint of layout 'broken.toml'

findings: 3 errors
  error layout-file: broken.toml: rules[0].axis: unknown key; closest: 'axes'
  error layout-file: broken.toml: rules[0].pattern: 'up/(kernel' is not a regular expression: missing ), unterminated
    subpattern at position 3; correct it, or escape the character with a backslash
  error layout-file: broken.toml: rules[0].axes: missing; write one entry per dim, for example axes = ["", "model"]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with layout files; the command line runs there."""
    (tmp_path / "wrong.toml").write_text(WRONG)
    (tmp_path / "worse.toml").write_text(WRONG.replace('["", "model"]', '["", "modle"]', 1))
    (tmp_path / "broken.toml").write_text('[[rules]]\npattern = "up/(kernel"\naxis = ["model"]\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, layout: str = "wrong.toml", mesh: str = "model=2") -> tuple[int, str, str]:
    """Return exit code, stdout and stderr."""
    command = ["lint", "tests.models:mlp", "--layout", layout, "--mesh", mesh, *arguments]
    result = CliRunner().invoke(app, command)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_report_is_text(folder: Path) -> None:
    """Outside a terminal: every rule with what it does, then the findings, alone on stdout."""
    assert run() == (0, REPORT, "")


@pytest.mark.parametrize(
    ("arguments", "layout", "mesh", "code"),
    [
        ([], "mlp", "model=2", 0),
        (["--strict"], "mlp", "model=2", 0),
        ([], "wrong.toml", "model=2", 0),
        (["--strict"], "wrong.toml", "model=2", 1),
        ([], "worse.toml", "model=2", 1),
        ([], "broken.toml", "model=2", 1),
        ([], "gone.toml", "model=2", 2),
        ([], "mlp", "model", 2),
        ([], "mlp", "batch=2,model=2", 0),
        ([], "mlp", "batch=2,model=2,stage=2", 2),
        (["--input", "2 by 4"], "mlp", "model=2", 2),
        (["--zero", "1", "--strict"], "mlp", "model=2", 1),
        (["--zero", "2"], "mlp", "batch=2,model=2", 2),
        (["--devices-per-node", "2", "--strict"], "mlp", "model=4", 1),
    ],
)
def test_exit_codes(folder: Path, arguments: list[str], layout: str, mesh: str, code: int) -> None:
    """0 without errors, 1 with errors or, if asked, warnings, 2 for what the layout has no part in."""
    found, stdout, stderr = run(*arguments, layout=layout, mesh=mesh)
    assert found == code
    assert (stdout == "", stderr == "") == ((True, False) if code == 2 else (False, True))


def test_broken_layout_file_is_reported(folder: Path) -> None:
    """All problems of a file that cannot be read are findings."""
    _, stdout, _ = run(layout="broken.toml")
    assert stdout == BROKEN


def test_json_has_a_stable_form(folder: Path) -> None:
    """--json writes the findings and what becomes of every variable, the same on every run."""
    code, stdout, _ = run("--json", "--strict")
    assert code == 1
    assert run("--json")[1] == stdout
    report = json.loads(stdout)
    assert (report["format_version"], report["layout"], report["model"]) == (1, "wrong.toml", "mlp")
    assert report["mesh"] == [["model", 2]]
    assert report["rules"][0] == {"pattern": "(.*/)?up/kernel", "axes": [None, "model"]}
    assert report["findings"][0] == {
        "severity": "warning",
        "code": "unmatched-rule",
        "problem": "layout rule 'haed/kernel' matches no variable",
        "advice": "closest: 'head/kernel'",
        "rule": "haed/kernel",
        "paths": [],
    }
    assert report["variables"][0] == {
        "path": "up/kernel",
        "shape": [16, 64],
        "itemsize": 4,
        "rules": ["(.*/)?up/kernel"],
        "placement": "S(1)",
        "local_shape": [16, 32],
        "style": "column",
        "batch_placement": "R",
        "slot_placement": "R",
    }


def test_what_is_in_parts_over_replicas_is_shown(folder: Path) -> None:
    """With --zero the report says what replicas store in parts of each variable."""
    lines = [line.strip() for line in run("--zero", "1", layout="mlp", mesh="batch=2,model=2")[1].splitlines()]
    assert (
        lines[2] == "batch S(d), slots S(d): in parts over the batch axis, the variable or an optimizer's slots alone"
    )
    assert "up/kernel: 16x64 as S(1), slots S(0), 16x32 per rank, column" in lines
    assert "head/bias: 8 as R, slots S(0), 8 per rank" in lines


def test_equal_findings_are_one_line() -> None:
    """What is wrong in the same way in many blocks is said once, with the numbers of the blocks."""
    report = examine(blocks(12), layout_of({**BLOCKS, "block_[0-9]+_up/kernel": ("model",)}))
    assert [len(finding.paths) for finding in report.findings] == [12]
    text = sections_to_text(lint_sections(report)).partition("findings: ")[2]
    assert text == (
        "1 error\n"
        "  error wrong-rank rules[0]: layout rule 'block_[0-9]+_up/kernel' -> (model) has 1 entries, variable\n"
        "    'block_[0-11]_up/kernel' of shape (8, 32) has 2 dims\n"
        "      next: write one entry per dim\n"
        "      in: block_[0-11]_up/kernel\n"
    )


def test_layout_that_cannot_be_planned_still_shows_its_rules() -> None:
    """Where a rule is wrong, the others are listed with what they match."""
    report = examine(mlp(), layout_of({**MLP, "up/bias": (None, "model")}), name="mine")
    assert [each.rules for each in report.variables][:2] == [("up/kernel",), ("up/bias",)]
    assert {each.placement for each in report.variables} == {None}
