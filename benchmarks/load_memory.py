"""Loading a large model, per format: seconds, bytes read and host memory above its own shards on each rank.

    python benchmarks/load_memory.py --gib 1 --processes 2

The naive way, for comparison, is what is done without tp_planner's readers: each rank builds the model on the CPU with
Keras, loads the whole file, and keeps its shards. Each figure is of a process of its own, for peaks do not fall.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FORMATS = {"h5": "w.weights.h5", "keras": "w.keras", "safetensors": "w.safetensors", "torch": "dcp"}
WIDTH = 4096  # a kernel of 64 MiB


def build(gib: float) -> Any:
    import keras

    layers = max(1, round(gib * 2**30 / (4 * WIDTH * WIDTH)))
    x = inputs = keras.Input((WIDTH,), name="x")
    for number in range(layers):
        x = keras.layers.Dense(WIDTH, use_bias=False, name=f"{'down' if number % 2 else 'up'}_{number}")(x)
    return keras.Model(inputs, x, name="large")


def write(folder: Path, gib: float) -> None:
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file

    from tp_planner.frontend.layer_tree import named_variables

    model = build(gib)
    tensors = {key: variable._value.detach() for key, variable in named_variables(model).items()}
    model.save_weights(folder / FORMATS["h5"])
    model.save(folder / FORMATS["keras"])
    save_file(tensors, folder / FORMATS["safetensors"])
    dcp.save(tensors, checkpoint_id=folder / FORMATS["torch"], no_dist=True)


def bytes_read() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def load(folder: Path, gib: float, kind: str, naive: bool) -> None:
    """Load on this rank, and print what it took as JSON, from rank 0."""
    import keras
    import torch.distributed as dist

    import tp_planner
    from tp_planner.api import parallelize
    from tp_planner.storage.variables import local_tensor

    dist.init_process_group("gloo")
    size = dist.get_world_size()
    mesh = keras.distribution.DeviceMesh((1, size), ("batch", "model"), [f"cpu:{rank}" for rank in range(size)])
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["up_.*kernel"] = (None, "model")
    layouts["down_.*kernel"] = ("model", None)
    with keras.device("meta"):
        model = build(gib)
    plan = tp_planner.plan(model, layouts)
    before, read, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, bytes_read(), time.perf_counter()
    if naive:
        model = build(gib)
        path = folder / FORMATS[kind]
        if kind == "keras":
            model = keras.saving.load_model(path)
        else:
            model.load_weights(path)
        parallelize(model, plan)
    else:
        parallelize(model, plan, weights=folder / FORMATS[kind])
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    own = sum(local_tensor(variable).nbytes for variable in model.variables)
    figures = {
        "format": kind,
        "way": "whole file" if naive else "slices",
        "processes": size,
        "seconds": round(seconds, 2),
        "own_mib": own >> 20,
        "above_own_mib": (peak >> 10) - (own >> 20),
        "read_mib": (bytes_read() - read) >> 20,
    }
    answers: list[Any] = [None] * size
    dist.all_gather_object(answers, figures)
    if dist.get_rank() == 0:
        print(json.dumps(max(answers, key=lambda each: each["above_own_mib"])), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--format")
    parser.add_argument("--naive", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "torch")
    if options.format:
        load(options.folder, options.gib, options.format, options.naive)
        return
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), options.gib)
        for kind in FORMATS:
            if kind in ("h5", "keras"):  # which Keras itself reads
                run(options, name, kind, ["--naive"])
            run(options, name, kind, [])


def run(options: argparse.Namespace, folder: str, kind: str, naive: list[str]) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}", __file__]
    arguments = ["--folder", folder, "--gib", str(options.gib), "--format", kind, *naive]
    done = subprocess.run([sys.executable, *launcher, *arguments], check=True, text=True, stdout=subprocess.PIPE)
    print(done.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
