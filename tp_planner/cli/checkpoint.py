"""``tp-planner checkpoint``: what is in files of weights and in checkpoints, without loading them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tp_planner.cli.app import app, choose_backend, mistakes_reported

if TYPE_CHECKING:
    from collections.abc import Iterator

checkpoint_app = typer.Typer(no_args_is_help=True, help="Look into checkpoints and files of weights.")
app.add_typer(checkpoint_app, name="checkpoint")


@checkpoint_app.callback()
def about() -> None:
    """Look into checkpoints and files of weights."""


@checkpoint_app.command("show")
def show_command(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A folder of checkpoints, one of them, or a file of weights.")
    ],
) -> None:
    """List what is inside: tensors with shapes, dtypes and bytes; of a checkpoint step, epoch, mesh and layout.

    Of a folder of checkpoints each is named, and the newest complete one is shown. Nothing is loaded.
    """
    with mistakes_reported():
        choose_backend()
        for line in _lines(path):
            typer.echo(line)


def _lines(path: Path) -> Iterator[str]:
    from tp_planner.checkpoints.formats.opening import open_weights
    from tp_planner.checkpoints.shelf import checkpoints_in, is_complete

    shelf = checkpoints_in(path) if path.is_dir() else []
    for each in reversed(shelf):
        yield f"{each.name}  {'complete' if is_complete(each) else 'incomplete'}"
    complete = [each for each in shelf if is_complete(each)]
    shown = complete[0] if complete else path
    layout: dict[str, str] = {}
    if is_complete(shown):
        from tp_planner.checkpoints.progress import read_about

        about = read_about(shown)
        layout = about.layout
        yield f"{shown.name}: step {about.step}, epoch {about.epoch}, batch {about.batch}"
        yield f"model {about.model}, {about.dtype_policy}, optimizer {about.optimizer or 'none'}"
        yield f"written on mesh ({about.mesh})" if about.mesh else "written by one process"
    with open_weights(shown) as weights:
        total = 0
        for name, tensor in sorted(weights.tensors.items()):
            size = math.prod(tensor.shape) * tensor.dtype.itemsize
            total += size
            where = f"  [{layout[name]}]" if name in layout else ""
            yield f"  {name}  {tensor.shape}  {str(tensor.dtype).removeprefix('torch.')}  {size} bytes{where}"
        yield f"{len(weights.tensors)} tensors, {total} bytes"
