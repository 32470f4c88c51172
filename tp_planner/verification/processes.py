"""Processes: forked from this one, so that they have its objects and leave them alone; some form a job on CPUs."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from tp_planner.ir.errors import ParallelRuntimeError, PlanError

Result = TypeVar("Result")

_NO_AUTOGRAD = "Autograd-and-Fork"  # what torch says where threads of devices have been started before the fork
PATIENCE = timedelta(seconds=600)  # for a rank that waits for another; one that has ended is not waited for


def run_forked(count: int, function: Callable[[int, Store], Result]) -> list[Result]:
    """Return what ``function(number, store)`` returned in each of ``count`` processes; they share the store.

    What it returns is pickled, what it is given need not be.

    Raises:
        PlanError: if this process cannot be forked, or what the function has raised as one.
        ParallelRuntimeError: what was raised in the first process that failed, with its traceback.
            The others are ended.
    """
    if torch.cuda.is_initialized():
        raise PlanError(
            "this process has used CUDA, so that it cannot be forked; verify before that, or by `tp-planner verify`"
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            start_processes(_run, (function, count, folder), count, start_method="fork")
        except ProcessRaisedException as error:
            if _NO_AUTOGRAD in str(error):
                raise PlanError(
                    "this process has run a backward pass, as every plan's simulated step is one; with a torch that is "
                    "built for CUDA it cannot be forked after that: verify before, or by `tp-planner verify`"
                ) from None
            raise ParallelRuntimeError(f"a process of the verification failed: {error}") from None
        except ProcessExitedException as error:
            raise ParallelRuntimeError(
                f"process {error.error_index} of the verification ended ({error}); was there enough memory?"
            ) from None
        results = [_read(Path(folder) / str(number)) for number in range(count)]
    for each in results:
        if isinstance(each, PlanError):
            raise each
    return results


def _run(number: int, function: Callable[[int, Store], Any], count: int, folder: str) -> None:
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    store = FileStore(f"{folder}/store", count)
    store.set_timeout(PATIENCE)
    try:
        result = function(number, store)
    except PlanError as error:
        result = error
    with (Path(folder) / str(number)).open("wb") as file:
        pickle.dump(result, file, protocol=5)


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        return pickle.load(file)


def join_job(rank: int, size: int, store: Store) -> None:
    """Make this process a rank of a gloo job."""
    dist.init_process_group("gloo", store=PrefixStore("job", store), rank=rank, world_size=size, timeout=PATIENCE)
