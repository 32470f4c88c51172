"""``tp-planner paths``: what layout rules can name in a model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from tp_planner.cli.answer import working
from tp_planner.cli.app import ModelArgument, app
from tp_planner.ir.names import FoldedName, fold_names
from tp_planner.ir.placement import Shape


@app.command("paths")
def paths_command(
    model: ModelArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON: the shape of each path.")] = False,
) -> None:
    """List the paths of MODEL's variables with their shapes: what the rules of a layout match, before there are any.

    Paths that differ in numbers only, and have one shape, are one line; in JSON each has its own.
    """
    with working():
        from tp_planner.cli.load import load_model
        from tp_planner.frontend.survey import survey
        from tp_planner.frontend.trace import require_built

        built = load_model(model)
        require_built(built)
        shapes = {variable.path: variable.shape for variable in survey(built)[1].values()}
    if as_json:
        typer.echo(json.dumps(shapes, indent=1))
        return
    lines = [(str(name), "x".join(map(str, shape)) or "scalar") for name, shape in _folded(shapes)]
    width = max((len(name) for name, _ in lines), default=0)
    for name, shape in lines:
        typer.echo(f"{name:{width}}  {shape}")


def _folded(shapes: dict[str, Shape]) -> list[tuple[FoldedName, Shape]]:
    """Return the paths in their order, those of one shape that differ in numbers only as one."""
    of_shape: dict[Shape, list[str]] = {}
    for path, shape in shapes.items():
        of_shape.setdefault(shape, []).append(path)
    order = {path: place for place, path in enumerate(shapes)}
    folded = [(name, shape) for shape, paths in of_shape.items() for name in fold_names(paths)]
    return sorted(folded, key=lambda each: order[each[0].members[0]])
