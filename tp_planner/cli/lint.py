"""``tp-planner lint``: what is wrong with a layout, what it costs, and what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tp_planner.cli.answer import JsonOption, show, working
from tp_planner.cli.app import InputOption, LayoutOption, MeshOption, ModelArgument, ZeroOption, app
from tp_planner.cli.load import load_model, read_inputs

if TYPE_CHECKING:
    from tp_planner.ir.finding import LintReport
    from tp_planner.ir.mesh import Mesh


@app.command("lint")
def lint_command(
    model: ModelArgument,
    layout: LayoutOption,
    mesh: MeshOption,
    input: InputOption = None,
    zero: ZeroOption = None,
    devices_per_node: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many devices fast links connect; by default all.")
    ] = None,
    as_json: JsonOption = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings, too.")] = False,
) -> None:
    """Check a layout for MODEL: rules that miss, contradict each other or cost more than they have to.

    Shows every rule with what it does to which variables, then all findings, with what to write instead. Needs no
    devices and allocates no weights.

    Exits with 0 if there is no error (and with --strict no warning), with 1 if there is one, and with 2 if the model,
    the mesh or the command line itself is wrong. The codes of the findings are explained in plans/lint.md.
    """
    with working():
        from tp_planner.frontend.layout_file import find_layout_file
        from tp_planner.ir.mesh import parse_mesh
        from tp_planner.report.findings import lint_sections

        report = _examined(
            model, find_layout_file(layout), layout, parse_mesh(mesh), input or [], zero, devices_per_node
        )
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        show(report, lint_sections(report), as_json)
    if report.count("error") or (strict and report.count("warning")):
        raise typer.Exit(1)


def _examined(
    model: str, path: Path, layout: str, mesh: Mesh, inputs: list[str], zero: int | None, devices_per_node: int | None
) -> LintReport:
    """Return the report; the problems of a file that cannot be read are findings too, and all that is known then."""
    from tp_planner.frontend.layout_file import read_layout_file
    from tp_planner.frontend.layout_map import read_zero
    from tp_planner.ir.errors import PlanError
    from tp_planner.ir.finding import Finding, LintReport
    from tp_planner.linter import examine

    try:
        rules = read_layout_file(path)
    except PlanError as error:
        findings = tuple(Finding("layout-file", "error", problem) for problem in error.problems)
        return LintReport(layout, model, mesh, (), findings, ())
    specs, stage = read_inputs(inputs), None if zero is None else read_zero(zero)
    return examine(load_model(model), rules.on(mesh), specs, layout, stage, devices_per_node)
