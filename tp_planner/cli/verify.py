"""``tp-planner verify``: whether a model under a layout is the same function as on one device."""

from __future__ import annotations

from pathlib import Path
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
    SequenceParallelOption,
    ZeroOption,
    app,
    write,
)
from tp_planner.cli.load import load_layout, load_model_and_inputs


@app.command("verify")
def verify_command(
    model: ModelArgument,
    layout: LayoutOption,
    mesh: MeshOption,
    input: InputOption = None,
    batch: BatchOption = None,
    optimizer: OptimizerOption = None,
    loss: LossOption = None,
    sequence_parallel: SequenceParallelOption = False,
    zero: ZeroOption = None,
    steps: Annotated[int, typer.Option(metavar="COUNT", min=1, help="Training steps to compare.")] = 1,
    scale: Annotated[
        int,
        typer.Option(
            metavar="FACTOR", min=1, help="Divide the widths of a KerasHub model by this: it has to fit here."
        ),
    ] = 1,
    as_json: JsonOption = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plan as a page with the differences, too.")
    ] = None,
) -> None:
    """Compare MODEL under a layout with MODEL on one device, tensor by tensor, on random weights and data.

    One process for each device of the mesh, and one for the single device, run on this machine's CPUs: the model, its
    gradients and its training. Whatever differs by more than rounding is named, with the first layer where it does.

    Exits with 0 if it is the same function, with 1 if it is not, and with 2 if something given is wrong.
    """
    with working():
        from tp_planner.frontend.scaled import scaled_down
        from tp_planner.report.html import plan_to_html
        from tp_planner.report.verdict import verdict_sections
        from tp_planner.verification.verify import verify

        rules = load_layout(layout, mesh, sequence_parallel, zero=zero)
        built, specs = load_model_and_inputs(model, input or [], batch)
        if scale > 1:
            built = scaled_down(built, scale)
        verdict = verify(built, rules, specs, loss=loss, optimizer=optimizer, steps=steps)
        if html is not None:
            write(html, plan_to_html(verdict.plan, verdict=verdict), "--html")
    if as_json:
        typer.echo(verdict.to_json(), nl=False)
    else:
        show(verdict, verdict_sections(verdict), as_json)
    if not verdict.is_same:
        raise typer.Exit(1)
