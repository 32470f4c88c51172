"""``tp-planner sweep``: one model at several degrees of tensor parallelism."""

from __future__ import annotations

from typing import Annotated

import typer

from tp_planner.cli.answer import JsonOption, show, working
from tp_planner.cli.app import (
    BatchOption,
    InputOption,
    LayoutOption,
    LossOption,
    ModelArgument,
    OptimizerOption,
    app,
    mistake,
)
from tp_planner.cli.load import load_job, load_layout


@app.command("sweep")
def sweep_command(
    model: ModelArgument,
    layout: LayoutOption,
    axis: Annotated[str, typer.Option(metavar="AXIS", help="The mesh axis whose size is varied.")] = "model",
    sizes: Annotated[str, typer.Option(metavar="SIZE[,...]", help="The sizes of the axis to plan.")] = "1,2,4,8,16",
    input: InputOption = None,
    batch: BatchOption = None,
    optimizer: OptimizerOption = None,
    loss: LossOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what becomes of MODEL at several sizes of a mesh axis, and which sizes fit its dims.

    Every size is planned on its own. Other axes that the layout names get size 1.
    """
    with working():
        from tp_planner.report.sweep import sweep_sections
        from tp_planner.sweep import sweep

        wanted = _sizes(sizes)
        rules = load_layout(layout, f"{axis}=1").rules
        job = load_job(model, input, batch, optimizer, loss)
        swept = sweep(job.model, rules, axis, wanted, job.inputs, job.optimizer, job.loss)
    show(swept, sweep_sections(swept), as_json)


def _sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise mistake(f"sizes {text!r} are not of the form size[,size...], e.g. 1,2,4,8; a size is at least 1")
    return tuple(sorted({int(part) for part in parts}))
