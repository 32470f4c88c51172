"""Columns of a file read by each rank for itself, or by shares: what either takes, by the size of a tensor.

    python benchmarks/shared_reading.py --processes 4

Columns lie in short runs, so that a rank reads the rows whole; beside them what all ranks need. Times are medians: of
the processor time of all ranks together, which other programs disturb least, and of what passes until all are done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

SIZES_MIB = (1, 4, 16, 64, 256)
COLUMNS = 4096
REPEAT = 5


def measure(path: Path, placement: Any, shared: bool) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    from tp_planner.checkpoints import reading
    from tp_planner.checkpoints.formats.opening import open_weights
    from tp_planner.ir.placement import Replicate
    from tp_planner.job.axes import Axes, Axis
    from tp_planner.storage.sharding import Sharding

    mesh: Any = None
    axis = Axis(mesh, "model", dist.get_world_size(), dist.get_rank())
    own = Sharding(Axes(mesh, axis, Axis(mesh, "batch", 1, 0)), placement, Replicate())
    passed, computed = [], []
    for _ in range(REPEAT):
        with (
            mock.patch.object(reading, "SMALLEST_SHARED", 0),
            mock.patch.object(reading, "_is_shared", return_value=shared),
            open_weights(path) as weights,
            reading.reading_together("measuring") as together,
        ):
            (tensor,) = weights.tensors.values()
            part = torch.empty(own.local_shape(tensor.shape))
            dist.barrier()
            began, work = time.perf_counter(), time.process_time()
            together.read(tensor, own.pieces(tensor.shape), part)
            work = time.process_time() - work
            dist.barrier()
            passed.append(time.perf_counter() - began)
            computed.append(work)
    total = torch.tensor(statistics.median(computed))
    dist.all_reduce(total)
    return {"processor_ms": round(1e3 * total.item(), 1), "ms": round(1e3 * statistics.median(passed), 1)}


def run_here(folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file

    from tp_planner.ir.placement import Replicate, Shard

    dist.init_process_group("gloo")
    for mib in SIZES_MIB:
        path = folder / f"{mib}.safetensors"
        if dist.get_rank() == 0:
            save_file({"w": torch.zeros(mib * 2**20 // 4 // COLUMNS, COLUMNS)}, path)
        dist.barrier()
        for part, placement in {"columns": Shard(1), "whole": Replicate()}.items():
            for shared in (False, True):
                figures = measure(path, placement, shared)
                if dist.get_rank() == 0:
                    way = "shared" if shared else "apart"
                    line = {"processes": dist.get_world_size(), "mib": mib, "part": part, "way": way, **figures}
                    print(json.dumps(line), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "torch")
    if options.folder:
        run_here(options.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}", __file__]
        subprocess.run([sys.executable, *launcher, "--folder", name], check=True)


if __name__ == "__main__":
    main()
