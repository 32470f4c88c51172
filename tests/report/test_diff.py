"""What differs between two plans, and what ``tp-planner diff`` says of it."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests import models
from tp_planner.cli import app
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import parse_mesh
from tp_planner.ir.step import Holder, Memory, MemoryUse, Step, Work
from tp_planner.passes.compare_plans import compare_plans
from tp_planner.planner import make_plan
from tp_planner.readable_plan import Plan
from tp_planner.report.amounts import bytes_text, count_text
from tp_planner.report.diff import difference_sections
from tp_planner.report.sections import sections_to_renderable, sections_to_text

UP = {"up/kernel": (None, "model"), "up/bias": ("model",)}
PAIR = {**UP, "down/kernel": ("model", None)}
STEP = Step(
    "",
    "",
    Memory(MemoryUse(16, 16, 0, 32, 8), MemoryUse(16, 16, 0, 16, 8), "backward"),
    (Work("forward", (("float32", 64),), 128, 4),),
    holders=(Holder("activations", ("up",), "relu", "float32", (4,), 1, 16),),
)


def mlp_plan(rules: dict[str, tuple[str | None, ...]], mesh: str = "model=2") -> Plan:
    """Return the plan of the MLP, with a step of round numbers."""
    layout = Layout(parse_mesh(mesh), tuple(LayoutRule(pattern, axes) for pattern, axes in rules.items()))
    return replace(make_plan(models.mlp(), layout), step=STEP)


@pytest.fixture(scope="module")
def pair() -> Plan:
    return mlp_plan(PAIR)


def run(*arguments: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of the command line."""
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def text_of(before: Plan, after: Plan) -> str:
    return sections_to_text(difference_sections(compare_plans(before, after), "a.json", "b.json"))


# Whatever differs is seen


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every string, number and empty entry of JSON data."""
    if isinstance(data, dict | list) and data:
        for key in sorted(data) if isinstance(data, dict) else range(len(data)):
            yield from leaves(data[key], (*path, key))
    else:
        yield path


def other(value: Any) -> Any:
    """Return another value of the same kind."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case "R":
            return "P"
        case "P" | "S(0)" | "S(1)":
            return "R"
        case "all_reduce":
            return "all_gather"
        case str():
            return f"{value}x"
        case None:
            return "R"
    return ["x"]


def test_difference_is_empty_exactly_where_the_json_is_equal(pair: Plan) -> None:
    """No entry of a plan, however small, can change without a difference, and an equal plan has none."""
    whole = json.loads(pair.to_json())
    seen = 0
    for path in leaves(whole):
        changed = copy.deepcopy(whole)
        entry = changed
        for key in path[:-1]:
            entry = entry[key]
        entry[path[-1]] = other(entry[path[-1]])
        try:
            damaged = Plan.from_json(json.dumps(changed))
        except ValueError:
            continue  # refused: no plan
        seen += 1
        assert (compare_plans(pair, damaged).is_empty, path) == (damaged.to_json() == pair.to_json(), path)
    assert seen > 100
    assert compare_plans(pair, Plan.from_json(pair.to_json())).is_empty


@pytest.mark.parametrize("name", ["rules", "variables", "layers", "collectives"])
def test_another_order_is_a_difference(pair: Plan, name: str) -> None:
    """Plans are lists, and what runs in another order is another plan."""
    layout = mlp_plan({**PAIR, "head/kernel": (None, "model")})
    turned = replace(layout, **{name: tuple(reversed(getattr(layout, name)))})
    assert [change.what for change in compare_plans(layout, turned).plan] == [f"order of {name}"]


def test_added_and_removed_mirror_each_other(pair: Plan) -> None:
    """Read the other way round, a difference has the same entries with before and after exchanged."""
    other_plan = mlp_plan(UP)
    there, back = compare_plans(pair, other_plan), compare_plans(other_plan, pair)
    fates = {"added": "removed", "removed": "added", "changed": "changed"}
    assert {(each.name, fates[each.fate]) for each in there.rules} == {(each.name, each.fate) for each in back.rules}
    assert {(c.layer, c.kind, c.before, c.after) for c in there.collectives} == {
        (c.layer, c.kind, c.after, c.before) for c in back.collectives
    }
    assert there.figures == tuple(reversed(back.figures))


# What is said of it

ONE_RULE_LESS = """\
from a.json to b.json

one training step on one rank
  what                      before     after     change
  collectives                    1         1
  bytes into collectives     256 B     256 B
  wire bytes                 256 B     256 B
  parameters              7.28 KiB  11.3 KiB  +4.00 KiB
  peak memory                 56 B      56 B

rules
  removed: down/kernel
      axes: (model, None)

variables
  changed: down/kernel
      placement: was S(0); now R
      rule: was down/kernel; now none

layers
  changed: up
      reason: was an output dim of the weight is sharded; now an output dim of the weight is sharded; gathered:
        aten.mm.default in 'down' needs its inputs placed in another way
      output: was none; now S(1)->R, grad R->S(1)
      output placement: was S(1); now R
      scope of the region: was mlp; now none
  changed: down
      style: was row; now replicated
      reason: was a contracted dim of the weight is sharded; now no sharded variable and no sharded input
      output: was P->R, grad R; now none

collectives of one training step
  times  phase    collective  layer  where   ranks  bytes each  wire bytes
     +1  forward  all_gather  up     output      2       256 B      +256 B
     -1  forward  all_reduce  down   output      2       256 B      -256 B
"""

OTHER_STEP = """\
from a.json to b.json
  optimizer: was none; now adam
  phase of the memory peak: was backward; now update

one training step on one rank
  what                      before     after  change
  collectives                    1         1
  bytes into collectives     256 B     256 B
  wire bytes                 256 B     256 B
  parameters              7.28 KiB  7.28 KiB
  peak memory                 56 B      88 B   +32 B

memory and work
  what                                   before         after         change
  optimizer at the memory peak              0 B          32 B          +32 B
  matrix products in float32, forward  64 flops  5.00 k flops  +4.94 k flops

notes
  added: what to hear of
"""


def test_less_rules_are_told(pair: Plan) -> None:
    """The report names what changed, from what to what, and how many collectives came and went."""
    assert text_of(pair, mlp_plan(UP)) == ONE_RULE_LESS


def test_memory_and_work_are_told(pair: Plan) -> None:
    """Numbers of the simulated step have units, and their changes signs."""
    peak = replace(STEP.memory.peak, optimizer=32)
    work = replace(STEP.work[0], matmul_flops=(("float32", 5000),))
    step = Step("adam", "", Memory(STEP.memory.largest, peak, "update"), (work,))
    assert text_of(pair, replace(pair, step=step, notes=("what to hear of",))) == OTHER_STEP


def test_implicit_collectives_have_their_cause(pair: Plan) -> None:
    """The op that communicates is told where a collective is not of a boundary."""
    implicit = replace(pair.collectives[0], cause="aten.sort")
    lines = text_of(pair, replace(pair, collectives=(*pair.collectives, implicit))).splitlines()
    row = next(line for line in lines if "all_reduce" in line)
    assert " ".join(row.split()) == "+1 forward all_reduce down output 2 256 B +256 B aten.sort"


def test_equal_plans_have_no_difference(pair: Plan) -> None:
    """Equal plans have one line."""
    assert text_of(pair, pair) == "from a.json to b.json: no difference\n"


def test_changes_of_equal_blocks_are_one() -> None:
    """What changes alike in every block is said once, and the collectives of the blocks are added up."""
    rules = models.CASES["gpt"].rules
    fewer = {pattern: axes for pattern, axes in rules.items() if "up" not in pattern and "down" not in pattern}
    layouts = [
        Layout(parse_mesh("model=2"), tuple(LayoutRule(pattern, axes) for pattern, axes in each.items()))
        for each in (rules, fewer)
    ]
    text = text_of(*(make_plan(models.gpt(blocks=3), layout) for layout in layouts))
    assert "  changed: block_[0-2]_up\n      style: was column; now replicated\n" in text
    assert "  changed: block_[0-2]_up/kernel\n      placement: was S(1); now R\n" in text
    assert [" ".join(line.split()) for line in text.splitlines() if "all_reduce" in line] == [
        "-3 forward all_reduce block_[0-2]_down output 2 4.00 KiB -12.0 KiB",
        "-3 backward all_reduce block_[0-2]_up input 2 4.00 KiB -12.0 KiB",
    ]


def test_terminal_shows_what_the_text_says(pair: Plan) -> None:
    """In a terminal the report has the same words."""
    sections, output = difference_sections(compare_plans(pair, mlp_plan(UP)), "a.json", "b.json"), io.StringIO()
    Console(file=output, width=200, no_color=True).print(sections_to_renderable(sections))
    words = output.getvalue().split()
    assert [word for word in sections_to_text(sections).split() if word not in words] == []


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (-1023, "-1023 B"),
        (1024, "1.00 KiB"),
        (10 * 1024 - 1, "10.0 KiB"),
        (102300, "99.9 KiB"),
        (1048575, "1.00 MiB"),
        (2**60, "1024 PiB"),
    ],
)
def test_bytes_have_three_digits(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_counts_go_by_thousands() -> None:
    assert [count_text(count) for count in (999, 1000, 12_345_678)] == ["999", "1.00 k", "12.3 M"]


# The command


@pytest.fixture
def folder(tmp_path: Path, pair: Plan, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two plans, a file that is none, and two layouts."""
    (tmp_path / "a.json").write_text(pair.to_json())
    (tmp_path / "b.json").write_text(mlp_plan(UP).to_json())
    (tmp_path / "none.json").write_text("{}")
    rules = '[[rules]]\npattern = "{}/kernel"\naxes = ["", "model"]\n'
    (tmp_path / "up.toml").write_text(rules.format("up"))
    (tmp_path / "head.toml").write_text(rules.format("head"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


MODEL = ["--model", "tests.models:mlp", "--mesh", "model=2"]


@pytest.mark.parametrize(
    ("arguments", "code", "begins"),
    [
        (["a.json", "a.json"], 0, "from a.json to a.json: no difference\n"),
        (["a.json", "b.json"], 1, ONE_RULE_LESS),
        (["up.toml", "up.toml", *MODEL], 0, "from up.toml to up.toml: no difference\n"),
        (["up.toml", "head.toml", *MODEL], 1, "from up.toml to head.toml\n\none training step"),
    ],
)
def test_exit_code_is_that_of_diff(folder: Path, arguments: list[str], code: int, begins: str) -> None:
    """0 where the plans are equal, 1 where they differ, whether they are read or made."""
    exit_code, stdout, stderr = run("diff", *arguments)
    assert (exit_code, stderr) == (code, "")
    assert stdout.startswith(begins)


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no file": (
        ["gone.json", "a.json"],
        "gone.json: cannot be read (No such file or directory); write plans with tp-planner plan --output",
    ),
    "no plan": (
        ["a.json", "none.json"],
        "none.json: JSON document is not a plan: it has no format_version; write plans with plan.to_json()",
    ),
    "layout without a model": (
        ["a.json", "mlp"],
        "'mlp' is not a .json file, so it is a layout to plan: give --model and --mesh too",
    ),
    "layout without a mesh": (
        ["a.json", "mlp", "--model", "tests.models:mlp"],
        "'mlp' is not a .json file, so it is a layout to plan: give --mesh too",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_reported(folder: Path, arguments: list[str], message: str) -> None:
    """Where there is no telling, the message is on stderr and the exit code 2."""
    assert run("diff", *arguments) == (2, "", f"error: {message}\n")


def test_json_has_every_change_with_exact_numbers(folder: Path) -> None:
    """The JSON form is complete where the text leaves out what follows from the rest."""
    code, stdout, _ = run("diff", "a.json", "b.json", "--json")
    found = json.loads(stdout)
    assert code == 1
    assert found["collectives"][0]["wire_bytes"] == 256
    down = next(layer for layer in found["layers"] if layer["name"] == "down")
    assert {"what": "sharded inputs", "before": "0: S(1)", "after": ""} in down["changes"]
    assert found["figures"][1]["parameter_bytes"] - found["figures"][0]["parameter_bytes"] == 64 * 32 * 4 // 2
