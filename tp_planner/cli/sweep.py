"""``tp-planner sweep``: one model in several settings, and the largest batch that fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tp_planner.cli.answer import JsonOption, show, working
from tp_planner.cli.app import (
    HardwareOption,
    InputOption,
    LayoutOption,
    LossOption,
    ModelArgument,
    OptimizerOption,
    app,
    mistake,
)
from tp_planner.cli.load import load_hardware, load_job, load_layout, require_one_way

if TYPE_CHECKING:
    from tp_planner.ir.layout import Zero


@app.command("sweep")
def sweep_command(
    model: ModelArgument,
    layout: LayoutOption,
    axis: Annotated[str, typer.Option(metavar="AXIS", help="The mesh axis whose size is varied.")] = "model",
    sizes: Annotated[str, typer.Option(metavar="SIZE[,...]", help="The sizes of the axis to plan.")] = "1,2,4,8,16",
    input: InputOption = None,
    batch: Annotated[
        str | None, typer.Option(metavar="SIZE[,...]", help="The batch sizes to plan; with --hardware the largest.")
    ] = None,
    sequence: Annotated[
        str | None, typer.Option(metavar="LENGTH[,...]", help="The lengths of sequences to plan.")
    ] = None,
    replicas: Annotated[
        str, typer.Option(metavar="NUMBER[,...]", help="The numbers of replicas to plan, each with its own batch.")
    ] = "1",
    zero: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE[,...]",
            help="What replicas store in parts: 1 an optimizer's slots, 3 weights, too; else as the layout says.",
        ),
    ] = None,
    sequence_parallel: Annotated[
        bool, typer.Option("--sequence-parallel", help="Plan with sequence parallelism, too.")
    ] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Plan with blocks that the backward pass runs again, too.")
    ] = False,
    optimizer: OptimizerOption = None,
    loss: LossOption = None,
    hardware: HardwareOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what becomes of MODEL at several sizes of a mesh axis, and which sizes fit its dims.

    Every size is planned on its own, with every batch, length and way to save memory that is asked for. Other axes
    that the layout names get size 1, but for that of the batch with --replicas. With --hardware the largest batch that
    fits its memory is found, and what a step takes is estimated.
    """
    with working():
        from tp_planner.ir.degrees import Device
        from tp_planner.report.sweep import sweep_sections
        from tp_planner.sweep import settings_of, sweep

        wanted, batches, lengths = _sizes(sizes, "sizes"), _sizes(batch, "batches"), _sizes(sequence, "lengths")
        require_one_way(input, batch, sequence)
        rules = load_layout(layout, f"{axis}=1")
        streams = (False, True) if sequence_parallel else (rules.sequence_parallel,)
        recomputed = (False, True) if recompute else (False,)
        copies, stages = _sizes(replicas, "replicas"), _stages(zero, rules.zero)
        settings = settings_of(wanted, batches, lengths, streams, recomputed, copies, stages)
        profile = load_hardware(hardware)
        device = None if profile is None else Device(profile.name, int(profile.memory_size.value), profile.device)
        job = load_job(model, input, None, None, optimizer, loss)
        swept = sweep(job.model, rules.rules, axis, settings, job.inputs, job.optimizer, job.loss, device, profile)
    show(swept, sweep_sections(swept), as_json)


def _stages(text: str | None, of_layout: Zero) -> tuple[Zero, ...]:
    from tp_planner.frontend.layout_map import read_zero

    if text is None:
        return (of_layout,)
    parts = [part.strip() for part in text.split(",")]
    return tuple(sorted({read_zero(int(part) if part.isdecimal() else part) for part in parts}))


def _sizes(text: str | None, word: str) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise mistake(f"{word} {text!r} are not of the form size[,size...], e.g. 1,2,4,8; a size is at least 1")
    return tuple(sorted({int(part) for part in parts}))
