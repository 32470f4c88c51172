"""``tp-planner plan``: what a layout makes of a model."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tp_planner.cli.app import (
    InputOption,
    LayoutOption,
    MeshOption,
    ModelArgument,
    app,
    choose_backend,
    mistakes_reported,
    write,
)
from tp_planner.cli.load import load_layout, load_model, read_inputs

if TYPE_CHECKING:
    from tp_planner.ir.plan import Plan


@app.command("plan")
def plan_command(
    model: ModelArgument,
    layout: LayoutOption,
    mesh: MeshOption,
    input: InputOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the plan as JSON instead of as tables.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan as JSON to FILE, too.")] = None,
) -> None:
    """Show how MODEL would be sharded: every layer, variable and collective, with the reasons.

    Needs no devices, starts no processes and allocates no weights.
    """
    with mistakes_reported():
        choose_backend()
        with contextlib.redirect_stdout(sys.stderr):  # a factory may print; the plan has stdout to itself
            from tp_planner.planner import make_plan

            rules = load_layout(layout, mesh)
            specs = read_inputs(input or [])
            plan = make_plan(load_model(model), rules, specs)
        if output is not None:
            write(output, plan.to_json())
    if as_json:
        typer.echo(plan.to_json(), nl=False)
    else:
        _print_report(plan)


def _print_report(plan: Plan) -> None:
    from rich.console import Console

    from tp_planner.report.terminal import plan_to_renderable
    from tp_planner.report.text import plan_to_text

    console = Console()
    if console.is_terminal:
        console.print(plan_to_renderable(plan))
    else:
        typer.echo(plan_to_text(plan), nl=False)
