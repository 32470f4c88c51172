"""Why a layer or a variable is planned as it is, and what the alternatives cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import keras
import pytest
from typer.testing import CliRunner

from tests import models
from tp_planner.cli import app
from tp_planner.explain import explain
from tp_planner.ir.errors import PlanError
from tp_planner.ir.explanation import Alternative, PathExplanation
from tp_planner.ir.figures import figures_of
from tp_planner.ir.layout import AxisSpec, Layout, LayoutRule
from tp_planner.ir.mesh import parse_mesh
from tp_planner.planner import make_plan
from tp_planner.report.explain import explanation_sections
from tp_planner.report.sections import sections_to_text

Rules = Mapping[str, tuple[AxisSpec, ...]]
PAIR: Rules = {"up/kernel": (None, "model"), "up/bias": ("model",), "down/kernel": ("model", None)}


def layout_of(rules: Rules, mesh: str = "model=2") -> Layout:
    return Layout(parse_mesh(mesh), tuple(LayoutRule(pattern, axes) for pattern, axes in rules.items()))


def explain_case(name: str, path: str, mesh: str = "model=2", **sizes: int) -> PathExplanation:
    case = models.CASES[name]
    return explain(case.build(**sizes), layout_of(case.rules, mesh), path)


def tried(alternatives: tuple[Alternative, ...]) -> list[str]:
    """Return what each alternative stores and the styles that it makes."""
    return [
        f"{', '.join(' '.join(pair) for pair in each.placements)}: {', '.join(style for _, style, _ in each.styles)}"
        for each in alternatives
    ]


@pytest.fixture(scope="module")
def up() -> PathExplanation:
    """The second of two layers that read the same tensor, in the second of two equal blocks."""
    return explain_case("subclassed", "block_1/up")


# Facts


def test_layer_has_its_style_variables_and_equals(up: PathExplanation) -> None:
    """A layer is explained with its variables and the layers of other blocks that are planned alike."""
    assert [(each.layer, each.style, each.reason) for each in up.layers] == [
        ("block_1/up", "column", "an output dim of the weight is sharded")
    ]
    assert [(each.key, each.placement, each.whole_bytes, each.local_bytes) for each in up.variables] == [
        ("subclassed/block_1/up/kernel", "S(1)", 8192, 4096),
        ("subclassed/block_1/up/bias", "S(0)", 256, 128),
    ]
    assert up.equals == ("block_0/up", "block_1/up")


def test_shared_boundary_is_told_to_all_that_share_it(up: PathExplanation) -> None:
    """The collective of a boundary stands at the first layer; the others show it as theirs too."""
    (entering,) = (each for each in up.layers[0].crossings if each.place == "input 0")
    assert entering.shared_with == ("block_1/gate",)
    assert (entering.tensor, entering.forward, entering.backward) == ("block_1/norm output", "R", "P->R")
    assert [(each.layer, each.phase, each.kind) for each in up.collectives] == [
        ("block_1/gate", "backward", "all_reduce")
    ]


def test_layer_has_the_collectives_of_all_its_functions() -> None:
    """A tied embedding is explained with the collectives of its lookup and of its head."""
    case = models.CASES["tied"]
    layout = layout_of(case.rules)
    own = [each for each in make_plan(case.build(), layout).collectives if each.layer == "token_embedding"]
    assert [each.kind for each in own] == ["all_reduce", "all_gather", "all_reduce"]
    explanation = explain(case.build(), layout, "token_embedding/embeddings")
    assert list(explanation.collectives) == own
    assert [layer.layer for layer in explanation.layers] == ["token_embedding", "token_embedding [reverse]"]
    assert tried(explanation.alternatives) == [
        "token_embedding/embeddings S(1): column, row",
        "token_embedding/embeddings R: replicated, replicated",
    ]


@pytest.mark.parametrize(
    ("path", "name", "kind"),
    [
        ("subclassed/block_0/up", "block_0/up", "Dense"),
        ("block_0/norm", "block_0/norm", "RMSNormalization"),
        ("subclassed/head/bias", "subclassed/head/bias", "variable"),
    ],
)
def test_paths_are_those_of_keras_or_of_the_plan(path: str, name: str, kind: str) -> None:
    """A layer is found by its path in Keras and by its name in the plan."""
    explanation = explain_case("subclassed", path, blocks=1)
    assert (explanation.path, explanation.kind) == (name, kind)


UNKNOWN = {
    "block_0_upp": "model 'gpt' has no layer or variable 'block_0_upp'; "
    "closest: 'block_0_up', 'block_0_up/bias', 'block_0_up/kernel'",
    "query": "model 'gpt' has no layer or variable 'query'; closest: 'block_0_attention/query'",
    "block_.*_up": "model 'gpt' has no layer or variable 'block_.*_up'; "
    "closest: 'block_0_up', 'block_0_up/bias', 'block_0_up/kernel'",
    "gpt": "'gpt' is the whole model: tp-planner plan shows it; name one of its layers or variables",
}


@pytest.mark.parametrize(("path", "message"), UNKNOWN.items(), ids=UNKNOWN)
def test_unknown_paths_are_refused_with_the_closest(path: str, message: str) -> None:
    """Paths are exact: what is none is refused, with paths that end so or look so."""
    with pytest.raises(PlanError) as caught:
        explain_case("gpt", path, blocks=1)
    assert str(caught.value) == message


# Alternatives


def test_alternatives_are_each_dim_and_none() -> None:
    """Each dim of the weight is tried in turn, then none; the bias follows its label."""
    explanation = explain(models.mlp(), layout_of(PAIR), "up")
    assert tried(explanation.alternatives) == [
        "up/kernel S(0), up/bias R: row",
        "up/kernel R, up/bias R: replicated",
    ]
    assert explanation.alternatives_for_equals == ()


def test_alternatives_are_planned_as_a_layout_of_that_kind() -> None:
    """The numbers of an alternative are those of the plan for a layout that says so."""
    row = layout_of({"up/kernel": ("model", None), "down/kernel": ("model", None)})
    explanation = explain(models.mlp(), layout_of(PAIR), "up")
    assert explanation.figures == figures_of(make_plan(models.mlp(), layout_of(PAIR)))
    assert explanation.alternatives[0].figures == figures_of(make_plan(models.mlp(), row))
    assert explanation.alternatives[0].figures != explanation.figures


def test_alternatives_name_the_other_layers_that_change(up: PathExplanation) -> None:
    """What another choice does to the neighbours is told, in equal blocks too."""
    assert [each.changed for each in up.alternatives] == [("block_1",)] * 2
    both = ("block_0", "block_1")
    assert [each.changed for each in up.alternatives_for_equals] == [both] * 2


def test_equal_blocks_change_together(up: PathExplanation) -> None:
    """The alternatives for all blocks change the same variables of each, and cost as often more."""
    assert tried(up.alternatives_for_equals)[0] == (
        "subclassed/block_0/up/kernel S(0), subclassed/block_0/up/bias R, "
        "subclassed/block_1/up/kernel S(0), subclassed/block_1/up/bias R: row, row"
    )
    before = up.figures.collectives
    alone, together = (each[0].figures for each in (up.alternatives, up.alternatives_for_equals))
    assert alone is not None
    assert together is not None
    assert together.collectives - before == 2 * (alone.collectives - before) > 0


def test_blocks_that_are_planned_otherwise_are_not_equal() -> None:
    """A block with another rule is not of those that are planned alike."""
    rules: Rules = {"block_0/up/kernel": (None, "model"), "block_1/up/kernel": ("model", None)}
    renamed = {f"subclassed/{pattern}": axes for pattern, axes in rules.items()}
    explanation = explain(models.subclassed(), layout_of(renamed), "block_0/up")
    assert explanation.equals == ("block_0/up",)
    assert explanation.alternatives_for_equals == ()


def test_rule_for_the_exact_path_is_replaced() -> None:
    """A layout that names the variable by its own path does not collide with the alternatives."""
    explanation = explain(models.mlp(), layout_of(PAIR), "up/kernel")
    assert [each.problem for each in explanation.alternatives] == ["", ""]
    assert tried(explanation.alternatives) == [
        "up/kernel S(0), up/bias R: row",
        "up/kernel R, up/bias R: replicated",
    ]


def test_composite_layer_can_be_left_whole() -> None:
    """A layer of layers has one alternative: none of its variables is sharded."""
    explanation = explain_case("vit", "block_0", blocks=1)
    (whole,) = explanation.alternatives
    assert {placement for _, placement in whole.placements} == {"R"}
    assert {style for _, style, _ in whole.styles} == {"replicated"}
    assert whole.figures is not None
    assert whole.figures.collectives == 0


def test_what_no_rule_can_change_has_no_alternatives() -> None:
    """A seed state stays whole whatever the rules say, and so does everything on a mesh of one."""
    model = models.gpt(blocks=1, dropout=0.1)
    layout = layout_of(models.CASES["gpt"].rules)
    assert explain(model, layout, "block_0_mlp_dropout").alternatives == ()
    assert explain_case("mlp", "up", "model=1").alternatives == ()


def test_refused_alternatives_say_why() -> None:
    """An alternative that cannot be planned is shown with the problem."""
    features = keras.Input((4,), name="features")
    outputs = keras.layers.Dense(4, name="up")(keras.layers.Dense(4, name="up+")(features))
    explanation = explain(keras.Model(features, outputs), layout_of({".*/kernel": (None, "model")}), "up+/kernel")
    assert [each.problem for each in explanation.alternatives] == [
        "variable 'up/kernel' matches 2 layout rules: '.*/kernel', 'up+/kernel'; make each path match at most one"
    ] * 3


# The report

DOWN = """\
down (Dense) of 'mlp' on mesh (model=2)
  down: row: a contracted dim of the weight is sharded

variables
  S(0): rule 'down/kernel' -> (model, None)
      down/kernel
  R: no layout rule names it
      down/bias
  variable     dtype    shape  stored  per rank  bytes whole  bytes per rank
  down/kernel  float32  64x32  S(0)    32x32        8.00 KiB        4.00 KiB
  down/bias    float32  32     R       32              128 B           128 B

what enters and leaves
  R: whole on every rank; S(d): sharded on dim d; P: a summand on every rank
  layer  where    tensor       shape  forward  gradient
  down   input 0                      S(1)
  down   output   down output  2x32   P->R     R         then bias and activation

collectives of one training step: 1
  times  phase    collective  layer  where   bytes  wire bytes  why
      1  forward  all_reduce  down   output  256 B       256 B  summands of the ranks are added

alternatives, each planned: other rules for its exact path, the whole model's figures, other layers changed
  kernel S(1), bias S(0)
      down: column: an output dim of the weight is sharded; gathered: aten.mm.default in 'head' needs its inputs
        placed in another way
      changes up too
  all R: refused
      why
  stored                  computed  collectives      wire bytes        parameters           peak memory  changed
  as planned              row                 1           256 B          7.28 KiB              14.0 KiB        0
  kernel S(1), bias S(0)  column         3 (+2)  896 B (+640 B)  7.22 KiB (-64 B)  13.0 KiB (-1.00 KiB)        1
  all R                   refused
"""


def test_report_explains_a_row_parallel_layer() -> None:
    """The report says how the layer is computed and why, what it stores, what it costs, and what else could be."""
    explanation = explain(models.mlp(), layout_of(PAIR), "down")
    column, whole = explanation.alternatives
    figures = replace(explanation.figures, peak_bytes=14 * 1024)
    column = replace(column, figures=replace(column.figures, peak_bytes=13 * 1024))
    shown = replace(explanation, figures=figures, alternatives=(column, replace(whole, figures=None, problem="why")))
    assert sections_to_text(explanation_sections(shown)) == DOWN


# The command


def test_command_explains_in_text_and_json() -> None:
    """PATH stands before MODEL; JSON has exact numbers."""
    arguments = ("explain", "down/kernel", "tests.models:mlp", "--layout", "mlp", "--mesh", "model=2")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert result.stdout.startswith("down/kernel (variable) of 'mlp' on mesh (model=2)\n  down: row: ")
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert (found["path"], found["variables"][0]["local_bytes"]) == ("down/kernel", 64 * 32 * 4 // 2)


def test_command_refuses_unknown_paths() -> None:
    """A mistake is one message on stderr and exit code 2."""
    result = CliRunner().invoke(app, ["explain", "dwn", "tests.models:mlp", "--layout", "mlp", "--mesh", "model=2"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "error: model 'mlp' has no layer or variable 'dwn'; closest: 'down', 'down/bias', 'down/kernel'\n"
    )
