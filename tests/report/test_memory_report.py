"""``plan --memory`` and the page show what is held at the peak, and all of it."""

from __future__ import annotations

import keras
from typer.testing import CliRunner

from tests import models
from tp_planner.cli import app
from tp_planner.frontend.layer_tree import named_layers
from tp_planner.frontend.layout_file import find_layout_file, read_layout_file
from tp_planner.ir.mesh import parse_mesh
from tp_planner.planner import make_plan
from tp_planner.report.holders import HOLDER_HEADS, holder_rows
from tp_planner.report.html import plan_to_html

ARGUMENTS = ("plan", "tests.models:gpt", "--layout", "gpt", "--mesh", "model=2", "--optimizer", "adamw", "--memory")


def test_holders_are_all_that_is_held() -> None:
    """Rows add up to the peak, name layers of the plan, and have equal blocks in one; the page shows them."""
    layout = read_layout_file(find_layout_file("gpt")).on(parse_mesh("model=2"))
    inputs = keras.InputSpec(shape=(4, 16), dtype="int32")
    model = models.gpt(blocks=3)
    plan = make_plan(model, layout, inputs, keras.optimizers.AdamW())
    step, layers = plan.step, set(named_layers(model))
    held, peak = step.holders, step.memory.peak
    assert 0 <= peak.activations + peak.temporaries - sum(each.bytes for each in held) < peak.total / 20
    assert {layer for each in held for layer in each.layers} <= layers | {""}
    kept_by_blocks = [each for each in held if each.kind == "activations" and "block_0_up" in each.layers]
    assert kept_by_blocks
    assert all(len(each.layers) == 3 and each.count % 3 == 0 for each in kept_by_blocks)
    page = plan_to_html(plan)
    assert all(cell in page for row in holder_rows(plan) for cell in row if "[" not in cell)


def test_command_shows_holders_instead_of_the_plan() -> None:
    """The report begins with the peak and has the table alone."""
    result = CliRunner().invoke(app, ARGUMENTS)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("memory of rank 0 at its peak, ")
    assert lines[1] == "  GUESSED SIZES: batch 2 (dim 0 of tokens)"
    assert " ".join(HOLDER_HEADS).split() in map(str.split, lines)
