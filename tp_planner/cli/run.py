"""``tp-planner run``: a script on several processes, with ``keras.distribution`` on torch."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from tp_planner.cli.app import app, mistake, mistakes_reported

SIGNALLED = -1  # exit codes of processes that a signal ended are the signal's number, negative


@app.command("run", context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False})
def run_command(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="The Python script that every process runs.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGUMENTS]...", help="The script's own.")] = None,
    devices: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Processes on this machine, one for each device; all GPUs.")
    ] = None,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Machines of the job.")] = 1,
    node_rank: Annotated[int, typer.Option(metavar="NUMBER", min=0, help="Which of them this is; 0 is the first.")] = 0,
    master_addr: Annotated[
        str | None, typer.Option(metavar="HOST", help="Address of machine 0, for more than one.")
    ] = None,
    master_port: Annotated[int, typer.Option(metavar="PORT", help="A free port there, the same on all.")] = 29500,
    max_restarts: Annotated[
        int, typer.Option(metavar="N", min=0, help="How often to start all processes again if one fails.")
    ] = 0,
) -> None:
    """Run SCRIPT on every device, as torchrun does, with Keras on torch and keras.distribution enabled.

    If one process fails, the others are stopped, and the exit code is 1. With --max-restarts all begin again: a script
    whose fit has the callback tp_planner.Checkpoint goes on from the newest complete checkpoint.
    """
    with mistakes_reported():
        if not Path(script).is_file():
            raise mistake(f"{script}: no such file; give the path of a Python script")
        settings = torchrun_settings(devices, nodes, node_rank, master_addr, master_port)
        settings.append(f"--max-restarts={max_restarts}")
        if failed := launch(settings, ["tp_planner.keras_distribution", script, *(arguments or [])], script):
            typer.echo(f"error: {failed}", err=True)
            raise typer.Exit(1)


def torchrun_settings(
    devices: int | None, nodes: int, node_rank: int, master_addr: str | None, master_port: int
) -> list[str]:
    """Return torchrun's options. Raises PlanError for machines or devices that cannot be."""
    if node_rank >= nodes:
        raise mistake(f"--node-rank is {node_rank}; of {nodes} machines it is 0 to {nodes - 1}")
    if nodes > 1 and master_addr is None:
        raise mistake(f"--nodes is {nodes}; give --master-addr, the address of machine 0, on all of them")
    count = f"--nproc-per-node={_devices_here(devices)}"
    if nodes == 1 and master_addr is None:
        return ["--standalone", count]
    here = f"--node-rank={node_rank}"
    return [f"--nnodes={nodes}", here, f"--master-addr={master_addr}", f"--master-port={master_port}", count]


def _devices_here(wanted: int | None) -> int:
    import torch

    here = torch.cuda.device_count()
    if wanted is None and not here:
        raise mistake("this machine has no CUDA devices; give --devices, the number of processes on its CPU")
    if wanted is not None and 0 < here < wanted:
        raise mistake(f"--devices is {wanted}, this machine has {here} CUDA devices; one process needs one of them")
    return wanted or here


def launch(settings: list[str], command: list[str], name: str) -> str:
    """Run a module with its arguments on every process; return what went wrong, or "" once all have ended well.

    Args:
        settings: torchrun's options.
        command: the module and its arguments.
        name: what a message calls it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    os.environ.setdefault(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "10"
    )  # seconds until a process that will not stop is killed
    try:
        run(get_args_parser().parse_args([*settings, "--module", *command]))
    except (KeyboardInterrupt, SignalException) as error:
        stopped = getattr(error, "sigval", signal.SIGINT)
        return f"{name} was stopped by {signal.Signals(stopped).name}; so were its processes"
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        code = first.exitcode
        how = f"by signal {-code}" if code <= SIGNALLED else f"with exit code {code}"
        return f"rank {rank} of {name} ended {how}; its output is above; the other processes were stopped"
    return ""
