"""``tp-planner layout``: a layout that is found, not written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tp_planner.cli.answer import show_sections, working
from tp_planner.cli.app import (
    BatchOption,
    InputOption,
    LossOption,
    ModelArgument,
    OptimizerOption,
    app,
    mistake,
    write,
)
from tp_planner.cli.load import load_job

if TYPE_CHECKING:
    from tp_planner.ir.hardware import Hardware
    from tp_planner.search.found import Found
    from tp_planner.search.meshes import MeshTried


@app.command("layout")
def layout_command(
    model: ModelArgument,
    mesh: Annotated[str | None, typer.Option(metavar="AXIS=SIZE[,...]", help="The device mesh, e.g. model=8.")] = None,
    devices: Annotated[
        int | None, typer.Option(metavar="NUMBER", min=1, help="Instead of a mesh: try all meshes of so many devices.")
    ] = None,
    devices_per_node: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER", min=1, help="With --devices: how many of them a node has, if not as --hardware."
        ),
    ] = None,
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
        from tp_planner.report.found import found_sections, meshes_sections

        if (mesh is None) == (devices is None):
            raise mistake("give either --mesh, or --devices with --devices-per-node and --batch")
        asked = _Question(model, input or [], batch, optimizer, loss, hardware, memory)
        if mesh is not None:
            found, sections = _on_mesh(asked, mesh), []
        else:
            assert devices is not None
            tried = _on_devices(asked, devices, devices_per_node)
            sections = meshes_sections([(str(each.mesh), each.figures, each.problem) for each in tried])
            if (best := tried[0].found) is None:
                raise mistake(f"no mesh of {devices} devices will do: {tried[0].mesh}: {tried[0].problem}")
            found = best
        if output is not None:
            write(output, found.toml)
    if output is None:
        typer.echo(found.toml)
    show_sections([*sections, *found_sections(found.figures)])


@dataclass(frozen=True)
class _Question:
    """What the command line says, but for the mesh."""

    model: str
    inputs: list[str]
    batch: int | None
    optimizer: str | None
    loss: str | None
    hardware: str
    memory: str | None

    @property
    def profile(self) -> Hardware:
        from tp_planner.frontend.hardware_file import find_hardware_file, read_hardware_file

        return read_hardware_file(find_hardware_file(self.hardware))

    @property
    def most(self) -> float | None:
        from tp_planner.search.door import read_memory

        return None if self.memory is None else read_memory(self.memory)


def _on_mesh(asked: _Question, mesh: str) -> Found:
    from tp_planner.ir.mesh import parse_mesh
    from tp_planner.search.find import search

    wanted, profile, most = parse_mesh(mesh), asked.profile, asked.most
    job = load_job(asked.model, asked.inputs, asked.batch, None, asked.optimizer, asked.loss)
    return search(job.model, wanted, profile, job.inputs, job.optimizer, job.loss, most)


def _on_devices(asked: _Question, devices: int, devices_per_node: int | None) -> tuple[MeshTried, ...]:
    from tp_planner.search.meshes import search_meshes

    if asked.batch is None:
        raise mistake("--devices needs --batch, the size of the batch that all devices train on in one step")
    profile, most = asked.profile, asked.most
    job = load_job(asked.model, asked.inputs, asked.batch, None, asked.optimizer, asked.loss)
    return search_meshes(job.model, devices, devices_per_node, asked.batch, profile, job.optimizer, job.loss, most)
