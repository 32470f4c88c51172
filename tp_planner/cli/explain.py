"""``tp-planner explain``: why one layer or variable is planned as it is, and what else it could be."""

from __future__ import annotations

from typing import Annotated

import typer

from tp_planner.cli.answer import JsonOption, show, working
from tp_planner.cli.app import (
    BatchOption,
    InputOption,
    LayoutOption,
    LossOption,
    MeshOption,
    ModelArgument,
    OptimizerOption,
    SequenceOption,
    app,
)
from tp_planner.cli.load import load_job, load_layout


@app.command("explain")
def explain_command(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A layer or a variable, as the plan names it, e.g. block_0_up/kernel.")
    ],
    model: ModelArgument,
    layout: LayoutOption,
    mesh: MeshOption,
    input: InputOption = None,
    batch: BatchOption = None,
    sequence: SequenceOption = None,
    optimizer: OptimizerOption = None,
    loss: LossOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show why the layer or variable at PATH of MODEL is planned as it is, and what the alternatives cost.

    An alternative is the layout with other rules for PATH. Each is planned, so that its numbers are those of a plan.
    """
    with working():
        from tp_planner.explain import explain
        from tp_planner.report.explain import explanation_sections

        rules = load_layout(layout, mesh)
        job = load_job(model, input, batch, sequence, optimizer, loss)
        explanation = explain(job.model, rules, path, job.inputs, job.optimizer, job.loss)
    show(explanation, explanation_sections(explanation), as_json)
