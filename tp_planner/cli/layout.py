"""``tp-planner layout``: a layout that is found, not written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tp_planner.cli.answer import show_sections, working
from tp_planner.cli.app import (
    BatchOption,
    InputOption,
    LossOption,
    MeshOption,
    ModelArgument,
    OptimizerOption,
    app,
    write,
)
from tp_planner.cli.load import load_loss, load_model_and_inputs, load_optimizer


@app.command("layout")
def layout_command(
    model: ModelArgument,
    mesh: MeshOption,
    input: InputOption = None,
    batch: BatchOption = None,
    optimizer: OptimizerOption = None,
    loss: LossOption = None,
    hardware: Annotated[
        str, typer.Option(metavar="FILE_OR_NAME", help="What a step is estimated on: a100, cpu, h100, h200 or a file.")
    ] = "h100",
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What a rank may hold at its peak, e.g. 80GB.")
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the layout to FILE, too.")] = None,
) -> None:
    """Find a layout for MODEL: the one whose training step is estimated to take the least time, and a proof of it.

    Shows the layout as a file, what its plan costs, and what no layout that shards whole dims can cost less than.
    Needs no devices, starts no processes and allocates no weights.
    """
    with working():
        from tp_planner.frontend.hardware_file import find_hardware_file, read_hardware_file
        from tp_planner.ir.mesh import parse_mesh
        from tp_planner.report.found import found_sections
        from tp_planner.search.door import read_memory
        from tp_planner.search.find import search

        wanted, profile = parse_mesh(mesh), read_hardware_file(find_hardware_file(hardware))
        most = None if memory is None else read_memory(memory)
        updating, training_loss = load_optimizer(optimizer), load_loss(loss)
        built, specs = load_model_and_inputs(model, input or [], batch)
        found = search(built, wanted, profile, specs, updating, training_loss, most)
        if output is not None:
            write(output, found.toml)
    if output is None:
        typer.echo(found.toml)
    show_sections(found_sections(found.figures))
