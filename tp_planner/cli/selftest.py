"""``tp-planner selftest``: whether ``keras.distribution`` works on this machine, on one process and on two."""

from __future__ import annotations

import os

import typer

from tp_planner.cli.app import app, choose_backend, mistakes_reported
from tp_planner.cli.run import launch, torchrun_settings


@app.command("selftest")
def selftest_command() -> None:
    """Compare keras.distribution on one process and on two with a single device.

    Processes use CUDA devices where there is one for each, else the CPU. The exit code is 1 if a check has failed.
    """
    import torch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    failures = []
    with mistakes_reported():
        choose_backend()
        for processes in (1, 2):
            on_gpus = torch.cuda.device_count() >= processes
            if not on_gpus:
                os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two processes cannot share one GPU
            counted = "1 process" if processes == 1 else f"{processes} processes"
            typer.echo(f"{counted} on {'CUDA' if on_gpus else 'the CPU'}")
            settings = torchrun_settings(processes, 1, 0, None, 0)
            failures.append(launch(settings, ["tp_planner.selftest"], "the self-test"))
    for failure in filter(None, failures):
        typer.echo(f"error: {failure}", err=True)
    if any(failures):
        raise typer.Exit(1)
