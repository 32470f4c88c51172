"""The application that the commands join, and what they share: options, output, and how mistakes are told."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from tp_planner.files import write_text

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .keras file, or package.module:factory, a callable without arguments that returns a built model.",
    ),
]
LayoutOption = Annotated[
    str, typer.Option(metavar="FILE_OR_PRESET", help="A layout file, or the name of a preset, such as gpt or llama.")
]
MeshOption = Annotated[str, typer.Option(metavar="AXIS=SIZE[,...]", help="The device mesh, e.g. model=8.")]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]SHAPE[:DTYPE]",
        help="An input to plan for, e.g. 2x128:int32; once for each input of a model that does not know its own.",
    ),
]

BatchOption = Annotated[
    int | None,
    typer.Option(
        metavar="SIZE",
        min=1,
        help="Plan for batches of this size.",
    ),
]
SequenceOption = Annotated[
    int | None,
    typer.Option(
        metavar="LENGTH",
        min=1,
        help="Plan for sequences of this length; by default that of the model's preprocessor, where it has one.",
    ),
]
SequenceParallelOption = Annotated[
    bool,
    typer.Option(
        "--sequence-parallel",
        help="Shard what is between sharded layers over the sequence: norms, dropout and sums take less memory.",
    ),
]
ZeroOption = Annotated[
    int | None,
    typer.Option(
        "--zero",
        metavar="0|1|3",
        help="Store in parts over the batch axis: 1 an optimizer's slots, 3 weights, too; else as the layout says.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="cpu|cuda", help="Count memory and work of this device's kernels; by default cpu's."),
]
OptimizerOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The optimizer of the simulated training step, e.g. adamw: its slots count."),
]
LossOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The loss of the simulated training step, e.g. sparse_categorical_crossentropy: its memory counts.",
    ),
]


HardwareOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE_OR_NAME",
        help="The hardware, for what fits and what takes how long: a100, cpu, h100, h200 or a profile.",
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from tp_planner import __version__

        typer.echo(f"tp-planner {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import", metavar="MODULE", help="Import MODULE first: it has classes that a .keras file names."
        ),
    ] = None,
) -> None:
    """Plan tensor parallelism for Keras models on PyTorch."""
    if imports:
        from tp_planner.cli.load import imported

        with mistakes_reported():
            choose_backend()
            for name in imports:
                imported(name)


def choose_backend() -> None:
    """Choose Keras's torch backend, before Keras is imported."""
    backend = os.environ.setdefault("KERAS_BACKEND", "torch")
    if backend != "torch":
        raise mistake(f"KERAS_BACKEND is {backend!r}, plans are for PyTorch; unset it or set it to 'torch'")


@contextlib.contextmanager
def mistakes_reported() -> Iterator[None]:
    """Turn what the user has to mend into a message on stderr and exit code 2."""
    from tp_planner.ir.errors import TpPlannerError

    try:
        yield
    except TpPlannerError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def write(path: Path, text: str, option: str = "--output") -> None:
    """Write a file that the user asked for with ``option``."""
    try:
        write_text(path, text)
    except OSError as error:
        raise mistake(f"{path}: cannot be written ({error.strerror}); give {option} another path") from None


def mistake(message: str) -> Exception:
    """Return the error of something that the user has to mend."""
    from tp_planner.ir.errors import PlanError

    return PlanError(message)
