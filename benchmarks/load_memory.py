"""Loading and saving a large model: seconds, bytes, and host memory above a rank's own shards, by format and way.

    python benchmarks/load_memory.py --gib 1 --processes 2

The naive way, for comparison, is what is done without tp_planner's readers and writers: each rank builds the model on
the CPU with Keras, loads the whole file, and keeps its shards; to save it, each rank gathers the whole model, and rank
0 writes that. "apart" is what slices are without shared reading. Each figure is of processes of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FORMATS = {"h5": "w.weights.h5", "keras": "w.keras", "safetensors": "w.safetensors", "torch": "dcp"}
WAYS = ("whole file", "apart", "slices")
SAVINGS = ("checkpoint", "checkpoint, asynchronous", "one file", "one file, model gathered")
WIDTH = 4096  # a kernel of 64 MiB


def build(gib: float) -> Any:
    import keras

    layers = max(1, round(gib * 2**30 / (4 * WIDTH * WIDTH)))
    x = inputs = keras.Input((WIDTH,), name="x")
    for number in range(layers):
        x = keras.layers.Dense(
            WIDTH, use_bias=False, kernel_initializer="ones", name=f"{'down' if number % 2 else 'up'}_{number}"
        )(x)
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


def moved() -> dict[str, int]:
    """Return the bytes that this process has read and written."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"read_mib": int(lines["rchar"]), "written_mib": int(lines["wchar"])}


def counting_reads() -> list[int]:
    """Return a list that from now on takes the length of each read of a file of weights."""
    from tp_planner.checkpoints.formats.stored import RawFile

    read, plain = [], RawFile.read

    def counted(self: Any, offset: int, length: int) -> Any:
        read.append(length)
        return plain(self, offset, length)

    RawFile.read = counted
    return read


def used() -> int:
    """Return the memory in use; from now on the peak is counted."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def layout_map() -> Any:
    import keras
    import torch.distributed as dist

    size = dist.get_world_size()
    mesh = keras.distribution.DeviceMesh((1, size), ("batch", "model"), [f"cpu:{rank}" for rank in range(size)])
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["up_.*kernel"] = (None, "model")
    layouts["down_.*kernel"] = ("model", None)
    return layouts


def load(folder: Path, gib: float, kind: str, way: str) -> None:
    """Load on this rank, and print what it took as JSON, from rank 0."""
    import keras

    import tp_planner
    from tp_planner.api import parallelize
    from tp_planner.checkpoints import reading

    if way == "apart":
        reading.MOST_IN_VAIN = float("inf")
    read = counting_reads()
    with keras.device("meta"):
        model = build(gib)
    plan = tp_planner.plan(model, layout_map())
    before, bytes_before, began = used(), moved(), time.perf_counter()
    if way == "whole file":
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
    figures = {"loads": kind, "way": way, "seconds": round(seconds, 2)}
    if way != "whole file":  # where what arrives from other ranks is among the bytes that the system counts
        figures["of_file_mib"] = sum(read) >> 20
    say(figures, own(model), _memory("VmHWM") - before - own(model), bytes_before)


def save(folder: Path, gib: float, way: str) -> None:
    """Save on this rank, and print what it took as JSON, from rank 0; training waits for ``seconds``."""
    import torch.distributed as dist

    import tp_planner

    with tp_planner.deferred_init():
        model = build(gib)
    tp_planner.parallelize(model, layout_map())
    shards, waits = own(model), None
    before, bytes_before, began = used(), moved(), time.perf_counter()
    if way == "one file":
        model.save_weights(folder / "saved.weights.h5")
    elif way == "one file, model gathered":
        tp_planner.restore(model)
        if dist.get_rank() == 0:
            model.save_weights(folder / "saved.weights.h5")
        dist.barrier()
    elif way == "checkpoint":
        tp_planner.save_checkpoint(model, folder / "saved")
    else:
        callback = tp_planner.Checkpoint(folder / "saved", resume=False, asynchronous=True)
        callback.set_model(model)
        callback.on_epoch_end(0)
        waits = time.perf_counter() - began
        callback.on_train_end()
    seconds = time.perf_counter() - began
    figures = {"saves": way, "seconds": round(seconds, 2), "training_waits": round(waits or seconds, 2)}
    say(figures, shards, _memory("VmHWM") - before, bytes_before)


def own(model: Any) -> int:
    """Return how many bytes of the model this rank stores."""
    from tp_planner.storage.variables import local_tensor

    return sum(local_tensor(variable).nbytes for variable in model.variables)


def say(figures: dict[str, Any], shards: int, above: int, before: dict[str, int]) -> None:
    """Print the figures of the rank that took most, on rank 0."""
    import torch.distributed as dist

    size = dist.get_world_size()
    figures |= {"processes": size, "own_mib": shards >> 20, "above_own_mib": above >> 20}
    figures |= {name: (count - before[name]) >> 20 for name, count in moved().items()}
    answers: list[Any] = [None] * size
    dist.all_gather_object(answers, figures)
    if dist.get_rank() == 0:
        print(json.dumps(max(answers, key=lambda each: each["above_own_mib"])), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--formats", default=",".join(FORMATS), help="those to load")
    parser.add_argument("--loads-only", action="store_true")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", choices=FORMATS, help=argparse.SUPPRESS)
    parser.add_argument("--save", choices=SAVINGS, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, default="slices", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "torch")
    if options.load or options.save:
        run_here(options)
        return
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), options.gib)
        for kind in options.formats.split(","):
            if kind in ("h5", "keras"):  # which Keras itself reads
                start(options, name, "--load", kind, "--way", "whole file")
            start(options, name, "--load", kind, "--way", "apart")
            start(options, name, "--load", kind)
    for way in () if options.loads_only else SAVINGS:
        with tempfile.TemporaryDirectory() as name:
            start(options, name, "--save", way)


def run_here(options: argparse.Namespace) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if options.load:
        load(options.folder, options.gib, options.load, options.way)
    else:
        save(options.folder, options.gib, options.save)
    dist.destroy_process_group()


def start(options: argparse.Namespace, folder: str, *what: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}", __file__]
    arguments = ["--folder", folder, "--gib", str(options.gib), *what]
    done = subprocess.run([sys.executable, *launcher, *arguments], check=True, text=True, stdout=subprocess.PIPE)
    print(done.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
