"""``tp-planner plan``: what a layout makes of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tp_planner.cli.answer import show, working
from tp_planner.cli.app import (
    BatchOption,
    DeviceOption,
    HardwareOption,
    InputOption,
    LayoutOption,
    LossOption,
    MeshOption,
    ModelArgument,
    OptimizerOption,
    SequenceOption,
    SequenceParallelOption,
    ZeroOption,
    app,
    write,
)
from tp_planner.cli.load import load_device, load_hardware, load_job, load_layout

if TYPE_CHECKING:
    from tp_planner.readable_plan import Plan


@app.command("plan")
def plan_command(
    model: ModelArgument,
    layout: LayoutOption,
    mesh: MeshOption,
    input: InputOption = None,
    batch: BatchOption = None,
    sequence: SequenceOption = None,
    optimizer: OptimizerOption = None,
    loss: LossOption = None,
    sequence_parallel: SequenceParallelOption = False,
    zero: ZeroOption = None,
    device: DeviceOption = None,
    hardware: HardwareOption = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Show what is held at the peak, by layer and op, instead of the plan.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the plan as JSON instead of as tables.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan as JSON to FILE, too.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan as a page to look at, too.")] = None,
) -> None:
    """Show how MODEL would be sharded: every layer, variable and collective, with the reasons, and the memory.

    Needs no devices, starts no processes and allocates no weights.
    """
    with working():
        from tp_planner.planner import make_plan
        from tp_planner.report.estimate import estimate_lines
        from tp_planner.report.holders import memory_sections
        from tp_planner.report.html import plan_to_html

        profile = load_hardware(hardware)
        devices = load_device(device) or (None if profile is None else profile.device)
        rules = load_layout(layout, mesh, sequence_parallel, devices, zero)
        job = load_job(model, input, batch, sequence, optimizer, loss)
        plan = make_plan(job.model, rules, job.inputs, job.optimizer, job.loss)
        estimate = [] if profile is None else estimate_lines(plan, profile)
        if output is not None:
            write(output, plan.to_json())
        if html is not None:
            write(html, plan_to_html(plan, estimate), "--html")
    if as_json:
        typer.echo(plan.to_json(), nl=False)
    elif memory:
        show(plan, memory_sections(plan), as_json)
    else:
        _print_report(plan)
        for line in ["", *estimate] if estimate else []:
            typer.echo(line)


def _print_report(plan: Plan) -> None:
    from rich.console import Console

    from tp_planner.report.terminal import plan_to_renderable
    from tp_planner.report.text import plan_to_text

    console = Console()
    if console.is_terminal:
        console.print(plan_to_renderable(plan))
    else:
        typer.echo(plan_to_text(plan), nl=False)
