"""``tp-planner diff``: what differs between two plans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tp_planner.cli.answer import JsonOption, show, working
from tp_planner.cli.app import (
    BatchOption,
    DeviceOption,
    InputOption,
    LossOption,
    OptimizerOption,
    SequenceOption,
    app,
    mistake,
)
from tp_planner.cli.load import load_device, load_job, load_layout

if TYPE_CHECKING:
    from tp_planner.readable_plan import Plan


@app.command("diff")
def diff_command(
    before: Annotated[
        str,
        typer.Argument(metavar="BEFORE", help="A .json file that tp-planner plan wrote, or a layout, with --model."),
    ],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="Another one.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model to plan layouts for: a .keras file, or package.module:factory."),
    ] = None,
    mesh: Annotated[
        str | None, typer.Option(metavar="AXIS=SIZE[,...]", help="The device mesh to plan layouts for, e.g. model=8.")
    ] = None,
    input: InputOption = None,
    batch: BatchOption = None,
    sequence: SequenceOption = None,
    optimizer: OptimizerOption = None,
    loss: LossOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what differs between two plans, decision by decision, from the first to the second.

    With --model and --mesh, what does not end in .json is a layout, a file or a preset, and is planned first. The
    exit code is 0 if the plans are equal, 1 if they differ, and 2 if there is no telling.
    """
    with working():
        from tp_planner.passes.compare_plans import compare_plans
        from tp_planner.report.diff import difference_sections

        sizes = batch, sequence
        plans = [_plan(text, model, mesh, input, sizes, optimizer, loss, device) for text in (before, after)]
        difference = compare_plans(*plans)
    show(difference, difference_sections(difference, before, after), as_json)
    raise typer.Exit(0 if difference.is_empty else 1)


def _plan(
    text: str,
    model: str | None,
    mesh: str | None,
    inputs: list[str] | None,
    sizes: tuple[int | None, int | None],
    optimizer: str | None,
    loss: str | None,
    device: str | None,
) -> Plan:
    if text.endswith(".json"):
        return _read(Path(text))
    if model is None or mesh is None:
        missing = " and ".join(name for name, given in (("--model", model), ("--mesh", mesh)) if given is None)
        raise mistake(f"{text!r} is not a .json file, so it is a layout to plan: give {missing} too")
    from tp_planner.planner import make_plan

    rules = load_layout(text, mesh, devices=load_device(device))
    job = load_job(model, inputs, *sizes, optimizer, loss)
    return make_plan(job.model, rules, job.inputs, job.optimizer, job.loss)


def _read(path: Path) -> Plan:
    from tp_planner.ir.errors import PlanError
    from tp_planner.readable_plan import Plan

    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise mistake(f"{path}: cannot be read ({error.strerror}); write plans with tp-planner plan --output") from None
    except UnicodeDecodeError:
        raise mistake(f"{path}: not UTF-8 text; write plans with tp-planner plan --output") from None
    except PlanError as error:
        raise mistake(f"{path}: {error}") from None
