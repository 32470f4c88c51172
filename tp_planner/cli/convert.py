"""``tp-planner convert``: weights from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tp_planner.cli.app import app, choose_backend, mistakes_reported
from tp_planner.cli.load import load_model


@app.command("convert")
def convert_command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A file or folder of weights, or a checkpoint.")],
    destination: Annotated[
        Path,
        typer.Argument(metavar="DST", help="A new .safetensors or .weights.h5 file, or a folder for torch's format."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model of the weights: names of tensors are then its variables', or in .weights.h5 their places.",
        ),
    ] = None,
) -> None:
    """Write the weights of SRC to DST, block by block: neither is ever whole in memory.

    Keras's files name tensors by their places in a model, all others by variables: between these --model tells which
    is which. Of a checkpoint the model's weights are written, not the optimizer's.
    """
    with mistakes_reported():
        choose_backend()
        from tp_planner.checkpoints.converting import convert
        from tp_planner.checkpoints.formats.opening import is_of_keras, open_weights
        from tp_planner.checkpoints.values import renamed

        with open_weights(source) as weights:
            to_keras = destination.name.endswith(".weights.h5")
            built = load_model(model) if model is not None else None
            convert(renamed(weights, built, is_of_keras(source), to_keras), destination)
            typer.echo(f"{destination}: written")
