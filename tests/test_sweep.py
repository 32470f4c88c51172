"""One model at several degrees: what ``sweep`` finds, and what ``tp-planner sweep`` says of it."""

from __future__ import annotations

import json
from dataclasses import replace

import keras
import pytest
from typer.testing import CliRunner

from tests import models
from tp_planner.cli import app
from tp_planner.frontend.hardware_file import find_hardware_file, read_hardware_file
from tp_planner.ir.degrees import Degree, Device, Setting, Sweep
from tp_planner.ir.errors import PlanError
from tp_planner.ir.figures import Figures, figures_of
from tp_planner.ir.layout import AxisSpec, Layout, LayoutRule
from tp_planner.ir.mesh import Mesh, parse_mesh
from tp_planner.passes.estimate_time import estimate_time
from tp_planner.planner import make_plan
from tp_planner.report.sections import sections_to_text
from tp_planner.report.sweep import sweep_sections
from tp_planner.sweep import largest_batch, settings_of, sweep

PAIR: dict[str, tuple[AxisSpec, ...]] = {
    "up/kernel": (None, "model"),
    "up/bias": ("model",),
    "down/kernel": ("model", None),
}


def rules(of: dict[str, tuple[AxisSpec, ...]]) -> tuple[LayoutRule, ...]:
    return tuple(LayoutRule(pattern, axes) for pattern, axes in of.items())


def run(*arguments: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of the command line."""
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_degrees_have_the_figures_of_their_plans() -> None:
    """Every degree is planned on its own, as ``plan`` does it."""
    model = models.mlp()
    found = sweep(model, rules(PAIR), "model", settings_of([1, 2, 4]))
    plans = [make_plan(model, Layout(parse_mesh(f"model={size}"), rules(PAIR))) for size in (1, 2, 4)]
    assert [degree.figures for degree in found.degrees] == [figures_of(plan) for plan in plans]
    assert found.inputs == ("2x16 float32",)


def test_indivisible_heads_are_gathered_with_the_reason() -> None:
    """A degree that does not divide is right and gathers; the reason names the shape and the degree."""
    case = models.CASES["gpt"]
    degrees = sweep(models.gpt(blocks=1, heads=4), rules(dict(case.rules)), "model", settings_of([4, 8])).degrees
    assert degrees[0].gathered == ()
    assert [layer for layer, _ in degrees[1].gathered] == [
        f"block_0_attention/{name}" for name in ("query", "key", "value", "attention_output")
    ]
    assert degrees[1].gathered[0][1] == (
        "stored sharded, gathered at use: 'block_0_attention/query/kernel' of shape (32, 4, 8) "
        "does not divide evenly by 8"
    )
    assert [layer for layer, _ in degrees[0].left_early] == ["head"]


def test_other_axes_of_the_layout_have_size_one() -> None:
    """A layout for a mesh of two axes is swept over one of them."""
    found = sweep(models.mlp(), rules({**PAIR, "head/kernel": ("batch", None)}), "model", settings_of([2]))
    assert found.other_axes == ("batch",)
    assert found.degrees[0].figures == sweep(models.mlp(), rules(PAIR), "model", settings_of([2])).degrees[0].figures


@pytest.mark.parametrize(("of", "axis"), [(PAIR, "batch"), ({**PAIR, "head/kernel": (None, "data")}, "data")])
def test_replicas_and_what_they_store_in_parts(of: dict[str, tuple[AxisSpec, ...]], axis: str) -> None:
    """Each setting is the plan on that mesh; of one replica nothing is in parts, so it is planned once."""
    settings = settings_of([1, 2], replicas=[1, 2], zero=[0, 1, 3])
    assert [(each.size, each.replicas, each.zero) for each in settings] == [
        (size, *others) for size in (1, 2) for others in ((1, 0), (2, 0), (2, 1), (2, 3))
    ]
    found = sweep(models.mlp(), rules(of), "model", settings, optimizer=keras.optimizers.Adam())
    for degree in found.degrees:
        each = degree.setting
        mesh = Mesh(((axis, each.replicas), ("model", each.size)), axis)
        plan = make_plan(models.mlp(), Layout(mesh, rules(of), zero=each.zero), None, keras.optimizers.Adam())
        assert degree.figures == figures_of(plan)
    peaks = [degree.figures.peak_bytes for degree in found.degrees if degree.figures]
    assert [peaks[at] < peaks[at - 1] for at in (2, 6)] == [True, True]
    assert "model  replicas  zero  collectives" in sections_to_text(sweep_sections(found))


def test_axis_that_no_rule_names_is_refused() -> None:
    """A sweep over another axis would find the same plan at every size."""
    with pytest.raises(PlanError) as caught:
        sweep(models.mlp(), rules(PAIR), "modle", settings_of([2]))
    assert str(caught.value) == "no layout rule names mesh axis 'modle'; the rules name 'model'"


def test_what_no_size_can_mend_is_told_once() -> None:
    """What is wrong with the layout at every size is an error, not a table of refusals."""
    with pytest.raises(PlanError) as caught:
        sweep(models.mlp(), rules({"up/kernel": ("model",)}), "model", settings_of([1, 2]))
    assert str(caught.value) == (
        "layout rule 'up/kernel' -> (model) has 1 entries, variable 'up/kernel' of shape (16, 64) has 2 dims; "
        "write one entry per dim"
    )


def test_model_is_as_before() -> None:
    """Planning at several sizes leaves no trace in the model."""
    model = models.mlp()
    before = [keras.ops.convert_to_numpy(weight).copy() for weight in model.weights]
    sweep(model, rules(PAIR), "model", settings_of([2, 3]))
    assert all((old == keras.ops.convert_to_numpy(new)).all() for old, new in zip(before, model.weights, strict=True))


# The report

FIGURES = Figures(collectives=11, bytes=2048, wire_bytes=4096, parameter_bytes=8192, peak_bytes=3 * 2**30)
HEADS = [(f"block_{number}/query", f"'block_{number}/query/kernel' does not divide evenly by 4") for number in (0, 1)]
DEGREES = (
    Degree(Setting(2), FIGURES, (), (("head", "it is an output"),), ("a note",), ()),
    Degree(Setting(4), FIGURES, tuple(HEADS), (("head", "it is an output"),), ("a note",), ()),
    Degree(Setting(1024), None, (), (), (), ("nothing fits", "nothing at all")),
)
REPORT = """\
'gpt' with sizes 2, 4, 1024 of mesh axis 'model'
  traced with inputs 2x64 int32
  the layout names mesh axis 'batch' too: it has size 1 here
  each row is one training step on one rank
  gathered: layers whose weights are stored sharded and gathered at use, which is right and slow
  left early: layers whose sharded output is gathered behind them
  model  collectives  wire bytes  parameters  peak memory  gathered  left early  verdict
      2           11    4.00 KiB    8.00 KiB     3.00 GiB         0           1  divides
      4           11    4.00 KiB    8.00 KiB     3.00 GiB         2           1  gathers
   1024                                                                          refused

refused
  at 1024: nothing fits
  at 1024: nothing at all

why weights are gathered
  at 4: block_[0-1]/query: 'block_*/query/kernel' does not divide evenly by 4

why outputs are gathered
  at 2, 4: head: it is an output

notes
  at 2, 4: a note
"""


def test_report_has_a_row_for_each_degree_and_its_reasons() -> None:
    """Reasons that hold for several degrees, or for equal blocks, are told once."""
    shown = Sweep("gpt", "model", ("batch",), ("2x64 int32",), DEGREES)
    assert sections_to_text(sweep_sections(shown)) == REPORT


SETTINGS = (
    (Setting(2, 3, 64, False, True), 2 * 2**30),
    (Setting(2, 4, 64, False, True), 3 * 2**30),
    (Setting(2, 1, 64, True, True), 5 * 2**30),
)
FITTING = """\
'gpt' with sizes 2 of mesh axis 'model'
  each row is one training step on one rank
  gathered: layers whose weights are stored sharded and gathered at use, which is right and slow
  left early: layers whose sharded output is gathered behind them
  model  sequence  sequence parallel  recomputed  batch  collectives  wire bytes  parameters  peak memory  gathered  left early  verdict
      2        64                 no      blocks      3           11    4.00 KiB    8.00 KiB     2.00 GiB         0           0  divides, fits
      2        64                 no      blocks      4           11    4.00 KiB    8.00 KiB     3.00 GiB         0           0  divides, fits
      2        64                yes      blocks      1           11    4.00 KiB    8.00 KiB     5.00 GiB         0           0  divides, does not fit

what fits small (4.00 GiB)
  model 2, sequence 64, sequence parallel no, recomputed blocks: the largest batch is 4, 1.00 GiB left
  model 2, sequence 64, sequence parallel yes, recomputed blocks: nothing fits
  what fits counts tensors alone: leave room for the libraries' own memory and for what an allocator cannot reuse

notes
  everywhere: a note
"""  # noqa: E501


def test_report_answers_what_fits() -> None:
    """Each setting but for its batch has the largest batch that fits."""
    degrees = tuple(
        Degree(setting, replace(FIGURES, peak_bytes=peak), (), (), ("a note",), ()) for setting, peak in SETTINGS
    )
    shown = Sweep("gpt", "model", (), ("3x64 int32", "4x64 int32"), degrees, (), Device("small", 4 * 2**30))
    assert sections_to_text(sweep_sections(shown)) == FITTING


def test_steps_are_estimated() -> None:
    """With hardware each row says what a step takes on its mesh, and what all replicas train on in a second."""
    hardware = read_hardware_file(find_hardware_file("h100"))
    settings = settings_of([2], replicas=[1, 8])
    found = sweep(models.mlp(), rules(PAIR), "model", settings, optimizer=keras.optimizers.AdamW(), hardware=hardware)
    alone, replicas = found.degrees
    layout = Layout(parse_mesh("batch=8,model=2"), rules(PAIR))
    plan = make_plan(models.mlp(), layout, optimizer=keras.optimizers.AdamW())
    assert replicas.seconds == estimate_time(plan, hardware).total.high > (alone.seconds or 0.0) > 0.0
    assert replicas.samples == 8 * alone.samples == 16
    table = sweep_sections(replace(found, degrees=(replace(replicas, seconds=0.5),)))[0].table
    assert table is not None
    assert [(head, cell) for head, cell in zip(table.heads, table.rows[0], strict=True)][-3:-1] == [
        ("step", "500.0 ms"),
        ("samples/s", "32.00"),
    ]


# The largest batch


@pytest.mark.parametrize(
    ("lines", "refused_beyond", "memory", "largest"),
    [
        ([(100, 10), (50, 30)], None, 99, 0),
        ([(100, 10), (50, 30)], None, 110, 1),
        ([(100, 10), (50, 30)], None, 1000, 31),
        ([(100, 10), (50, 30)], None, 10**6, 33331),
        ([(100, 0)], None, 100, 2**20),
        ([(100, 10)], 17, 1000, 17),
        ([(100, 10)], 0, 1000, 0),
    ],
)
def test_largest_batch_is_found_in_few_steps(
    lines: list[tuple[int, int]], refused_beyond: int | None, memory: int, largest: int
) -> None:
    """The one found fits and the next does not, whatever sums make the peak, and whatever is refused."""
    asked: list[int] = []

    def peak(batch: int) -> int | None:
        asked.append(batch)
        refused = refused_beyond is not None and batch > refused_beyond
        return None if refused else max(fixed + slope * batch for fixed, slope in lines)

    assert largest_batch(peak, memory) == largest
    assert len(asked) == len(set(asked)) <= 20


@pytest.mark.slow
def test_largest_batch_is_that_of_plans() -> None:
    """With a device the sweep finds the batch; the plan with it fits, and the one with one more does not."""
    model, layout = models.gpt(), rules(dict(models.CASES["gpt"].rules))
    settings = settings_of([2], recomputed=[False, True])
    found = sweep(model, layout, "model", settings, optimizer=keras.optimizers.AdamW(), device=Device("small", 2**21))
    plain, recomputed = (degree.setting.batch or 0 for degree in found.degrees)
    assert 0 < plain < recomputed
    for batch in (plain, plain + 1):
        inputs = keras.InputSpec(shape=(batch, 16), dtype="int32")
        plan = make_plan(model, Layout(parse_mesh("model=2"), layout), inputs, keras.optimizers.AdamW())
        assert (plan.step.memory.peak.total <= 2**21) == (batch == plain)
    assert not any(layer._remat_mode for layer in model._flatten_layers())


def test_models_without_blocks_have_none_to_recompute() -> None:
    """What has no equal blocks is refused in settings that recompute them."""
    with pytest.raises(PlanError) as caught:
        sweep(models.mlp(), rules(PAIR), "model", settings_of([2], recomputed=[True]))
    assert str(caught.value) == (
        "no blocks of model 'mlp' are equal, so there are none to recompute; "
        "build it with its layers in a keras.RematScope instead"
    )


# The command


def test_command_sweeps_the_preset() -> None:
    """Sizes are in order, each once; JSON has the same numbers."""
    arguments = ("sweep", "tests.models:mlp", "--layout", "mlp", "--sizes", "2, 1,2")
    code, stdout, stderr = run(*arguments)
    assert (code, stderr) == (0, "")
    assert stdout.startswith(
        "'mlp' with sizes 1, 2 of mesh axis 'model'\n  traced with inputs 2x16 float32\n"
        "  GUESSED SIZES: batch 2 (dim 0 of features)\n"
    )
    found = json.loads(run(*arguments, "--json")[1])
    assert [degree["setting"]["size"] for degree in found["degrees"]] == [1, 2]
    assert [degree["figures"]["collectives"] for degree in found["degrees"]] == [0, 1]


@pytest.mark.parametrize("sizes", ["", "1,,2", "two", "0,2", "-1", "1.5"])
def test_sizes_that_are_none_are_refused(sizes: str) -> None:
    """Sizes are whole numbers of at least 1."""
    code, stdout, stderr = run("sweep", "tests.models:mlp", "--layout", "mlp", "--sizes", sizes)
    message = f"sizes {sizes!r} are not of the form size[,size...], e.g. 1,2,4,8; a size is at least 1"
    assert (code, stdout, stderr) == (2, "", f"error: {message}\n")
