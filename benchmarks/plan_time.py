"""Time and memory of planning tensor parallelism for published models, most of which fit no device, on one core.

    python benchmarks/plan_time.py [--sizes 8b,70b,t5-xxl,...] [--curve] [--repeat 5] [--output FOLDER]

Every repetition is a fresh process; see benchmarks/README.md for what they measure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from showing import machine

HERE = Path(__file__).resolve().parent
MESH = "model=8"
CURVE_LAYERS = (2, 8, 16, 32, 64, 96, 126)
GIB = 2**30

FOOTNOTE = """\
Counted: make_plan on a built model, with Adam: two traces, the passes, the proof, the simulated training step.
Not counted: starting Python, importing Keras, torch and tp_planner, building the model, reading the layout.
"first" is the first plan of a process, which also loads what torch loads late; "again" the second. "search" finds a
layout: the plan with nothing sharded, the integer program, the plan of what it chose. AutoParallel is published with
46.8 s for a search for 8b, Alpa with up to 600 s."""


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a published model, and what planning it may take; finding a layout is timed where it has a target.

    ``takes`` are the arguments of KerasHub's ``backbone``; without one it is so many Dense layers in a row. A
    ``with_loss`` model has the head and a cross-entropy that takes logits in shards.
    """

    name: str
    layers: int
    takes: Mapping[str, Any]
    target_s: float
    search_target_s: float | None = None
    preset: str = "llama"
    backbone: str = "LlamaBackbone"
    sequence_parallel: bool = False
    with_loss: bool = False


def _llama(width: int, heads: int, hidden: int) -> dict[str, Any]:
    return {
        "vocabulary_size": 128256,
        "hidden_dim": width,
        "num_query_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_dim": hidden,
    }


_8B, _70B, _405B = _llama(4096, 32, 14336), _llama(8192, 64, 28672), _llama(16384, 128, 53248)
_T5 = {
    "vocabulary_size": 32128,
    "hidden_dim": 4096,
    "num_heads": 64,
    "key_value_dim": 64,
    "intermediate_dim": 10240,
    "use_gated_activation": True,
}
_MIXTRAL = {**_8B, "vocabulary_size": 32000, "num_experts": 8}
_QWEN3_MOE = {
    "vocabulary_size": 151936,
    "hidden_dim": 2048,
    "num_query_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_dim": 6144,
    "head_dim": 128,
    "num_experts": 128,
    "top_k": 8,
    "moe_intermediate_dim": 768,
}
_GEMMA3 = {
    "vocabulary_size": 262144,
    "hidden_dim": 5376,
    "num_query_heads": 32,
    "num_key_value_heads": 16,
    "intermediate_dim": 21504,
    "head_dim": 128,
    "image_size": None,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
    "sliding_window_size": 1024,
}
_WHISPER = {
    "vocabulary_size": 51865,
    "hidden_dim": 1280,
    "num_heads": 20,
    "intermediate_dim": 5120,
    "num_mels": 80,
    "max_encoder_sequence_length": 3000,
    "max_decoder_sequence_length": 448,
}
_VIT = {"image_shape": (224, 224, 3), "patch_size": 14, "hidden_dim": 1280, "num_heads": 16, "mlp_dim": 5120}
SIZES = {
    size.name: size
    for size in (
        Size("8b", 32, _8B, 1.0, 3.0),
        Size("70b", 80, _70B, 2.0, 5.0),
        Size("405b", 126, _405B, 3.0, 6.0),
        Size("8b-sequence", 32, _8B, 1.0, sequence_parallel=True, with_loss=True),
        Size("405b-sequence", 126, _405B, 3.0, sequence_parallel=True),
        Size("t5-xxl", 24, _T5, 5.0, preset="t5", backbone="T5Backbone"),
        Size("mixtral-8x7b", 32, _MIXTRAL, 3.0, preset="mixtral", backbone="MixtralBackbone"),
        Size("qwen3-moe-30b", 48, _QWEN3_MOE, 4.0, preset="qwen3_moe", backbone="Qwen3MoeBackbone"),
        Size("gemma3-27b", 62, _GEMMA3, 2.0, preset="gemma", backbone="Gemma3Backbone"),
        Size("whisper-large", 32, _WHISPER, 2.0, preset="whisper", backbone="WhisperBackbone"),
        Size("vit-huge", 32, _VIT, 1.0, preset="vit", backbone="ViTBackbone"),
        Size("dense-2000", 2000, {"width": 1024, "hidden": 4096}, 10.0, preset="mlp", backbone=""),
    )
}
TARGET_BYTES = 2 * GIB

Measured = Sequence[Mapping[str, Any]]  # what each process measured
Rows = Sequence[tuple[Size, Measured]]


# One process


def measure(size: Size) -> dict[str, Any]:
    """Plan one model twice in this process and return the times in seconds and the memory in bytes."""
    import torch

    torch.set_num_threads(1)
    import keras

    from tp_planner.frontend.layout_file import find_layout_file, read_layout_file
    from tp_planner.ir.mesh import parse_mesh

    keras.config.set_dtype_policy("bfloat16")
    with keras.device("meta"):
        model = _build(size)
    layout = read_layout_file(find_layout_file(size.preset)).on(parse_mesh(MESH))
    layout = replace(layout, sequence_parallel=size.sequence_parallel)
    before = _peak_bytes()
    first, again = (_plan(model, layout, size.with_loss) for _ in range(2))
    if first["plan_sha256"] != again["plan_sha256"]:
        raise AssertionError(f"two plans of {size.name} in one process differ")
    return {
        "parameters": model.count_params(),
        "bytes_before": before,
        "bytes_peak": _peak_bytes(),
        "first": first,
        "again": again,
        "search": None if size.search_target_s is None else _search(model),
    }


def _build(size: Size) -> Any:
    import keras
    import keras_hub

    if size.backbone:
        backbone = getattr(keras_hub.models, size.backbone)(num_layers=size.layers, **size.takes)
        return keras_hub.models.LlamaCausalLM(backbone, preprocessor=None) if size.with_loss else backbone
    sys.setrecursionlimit(10 * size.layers + 1000)  # Keras goes through a Functional model's nodes by recursion
    inputs = outputs = keras.Input((size.takes["width"],))
    for pair in range(size.layers // 2):
        outputs = keras.layers.Dense(size.takes["hidden"], "relu", name=f"pair_{pair}_up")(outputs)
        outputs = keras.layers.Dense(size.takes["width"], name=f"pair_{pair}_down")(outputs)
    return keras.Model(inputs, outputs)


def _plan(model: Any, layout: Any, with_loss: bool) -> dict[str, Any]:
    """Plan the model as users do, with a clock around the whole and one around the simulation."""
    from unittest import mock

    import keras

    from tp_planner import planner
    from tp_planner.frontend.training_loss import TrainingLoss

    loss = TrainingLoss(keras.losses.SparseCategoricalCrossentropy(from_logits=True)) if with_loss else None
    simulations = []

    def simulate(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            simulations.append(time.perf_counter() - start)

    original = planner.simulate
    with mock.patch.object(planner, "simulate", simulate):
        start, start_cpu = time.perf_counter(), time.process_time()
        plan = planner.make_plan(model, layout, optimizer=keras.optimizers.Adam(), loss=loss)
        wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return {
        "total_s": wall,
        "cpu_s": cpu,
        "simulation_s": sum(simulations),
        "collectives": len(plan.collectives),
        "plan_sha256": hashlib.sha256(plan.to_json().encode()).hexdigest(),
    }


def _search(model: Any) -> dict[str, Any]:
    """Find a layout of the model as users do, with a clock around the whole."""
    import tp_planner

    find_layout = tp_planner.find_layout  # which imports the solver
    start, start_cpu = time.perf_counter(), time.process_time()
    found = find_layout(model, MESH, optimizer="adam")
    wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return {"total_s": wall, "cpu_s": cpu, "gap": found.gap, "error": found.error, "layout": found.toml}


def _peak_bytes() -> int:
    """Return the largest memory of this process so far; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# All processes


def repeat(size: Size, repetitions: int) -> list[dict[str, Any]]:
    """Return what each of some fresh processes measured, one after the other.

    Raises SystemExit if one of them fails, and AssertionError if their plans differ.
    """
    measured = [_measure_in_process(size) for _ in range(repetitions)]
    if len({each["first"]["plan_sha256"] for each in measured}) > 1:
        raise AssertionError(f"plans of {size.name} with {size.layers} layers differ between processes")
    if size.search_target_s is not None and len({each["search"]["layout"] for each in measured}) > 1:
        raise AssertionError(f"layouts found for {size.name} differ between processes")
    return measured


def _measure_in_process(size: Size) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--measure", json.dumps(asdict(size)), "--result", str(result)]
        if subprocess.run(command, env=_environment()).returncode:
            raise SystemExit(f"the process that plans {size.name} failed; its error is above")
        measured: dict[str, Any] = json.loads(result.read_text())
        return measured


def _environment() -> dict[str, str]:
    """Return this environment with one thread, and this checkout's tp_planner first."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "KERAS_BACKEND": "torch",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def facts(repetitions: int) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        **machine.facts(),
        "threads": 1,
        "processes for each size": repetitions,
        "mesh": MESH,
        "dtype policy": "bfloat16",
    }


# The numbers as text and as a picture


def table(rows: Rows) -> Iterator[str]:
    """Yield the lines of a table with one line for each size."""
    yield (
        f"  {'model':>14}{'layers':>8}{'parameters':>13}{'first s':>10}{'quartiles':>16}{'CPU s':>8}"
        f"{'simulation':>12}{'again s':>9}{'search s':>10}{'gap':>7}{'collectives':>13}{'peak GiB':>10}{'before':>8}"
    )
    for size, measured in rows:
        lower, median, upper = statistics.quantiles(_each(measured, "first", "total_s"), n=4, method="inclusive")
        quartiles = f"{lower:.2f} to {upper:.2f}"
        search, gap = "", ""
        if size.search_target_s is not None:
            search = f"{_median(measured, 'search', 'total_s'):.2f}"
            gaps = _each(measured, "search", "gap")
            gap = "unknown" if None in gaps else f"{max(gaps):.2%}"
        yield (
            f"  {size.name:>14}{size.layers:8}{measured[0]['parameters'] / 1e9:11.1f} B{median:10.2f}{quartiles:>16}"
            f"{_median(measured, 'first', 'cpu_s'):8.2f}{_median(measured, 'first', 'simulation_s'):12.2f}"
            f"{_median(measured, 'again', 'total_s'):9.2f}{search:>10}"
            f"{gap:>7}{measured[0]['first']['collectives']:13}"
            f"{_memory(measured, 'bytes_peak'):10.2f}{_memory(measured, 'bytes_before'):8.2f}"
        )


def verdicts(rows: Rows) -> Iterator[str]:
    """Yield lines for each size: whether its medians and its memory are within the targets."""
    for size, measured in rows:
        seconds, memory = _median(measured, "first", "total_s"), _memory(measured, "bytes_peak")
        met = seconds < size.target_s and memory < TARGET_BYTES / GIB
        yield (
            f"  {size.name}: {seconds:.2f} s of {size.target_s:g} s, {memory:.2f} GiB of {TARGET_BYTES / GIB:g} GiB: "
            f"{'within the target' if met else 'MISSED'}"
        )
        if size.search_target_s is not None:
            search = _median(measured, "search", "total_s")
            yield (
                f"  {size.name}: a layout found in {search:.2f} s of {size.search_target_s:g} s: "
                f"{'within the target' if search < size.search_target_s else 'MISSED'}"
            )


def _each(measured: Measured, which: str, figure: str) -> list[float]:
    return [each[which][figure] for each in measured]


def _median(measured: Measured, which: str, figure: str) -> float:
    return statistics.median(_each(measured, which, figure))


def _memory(measured: Measured, figure: str) -> float:
    """Return the largest of the processes' memories in GiB."""
    largest: int = max(each[figure] for each in measured)
    return largest / GIB


def draw(rows: Rows, path: Path) -> None:
    """Draw the medians over the number of layers, with the quartiles as bars, and the peak memory beside them."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "plan_time"  # the same picture from the same numbers
    from matplotlib import pyplot

    layers = [size.layers for size, _ in rows]
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(10, 4))
    quartiles = [
        statistics.quantiles(_each(measured, "first", "total_s"), n=4, method="inclusive") for _, measured in rows
    ]
    spread = [[q[1] - q[0] for q in quartiles], [q[2] - q[1] for q in quartiles]]
    times.errorbar(layers, [q[1] for q in quartiles], yerr=spread, marker="o", capsize=3, label="first plan")
    times.plot(layers, [_median(m, "again", "total_s") for _, m in rows], marker="o", label="planned again")
    times.plot(
        layers, [_median(m, "first", "simulation_s") for _, m in rows], marker="o", label="simulation in the first plan"
    )
    times.set(ylabel="seconds, one core", title="Planning a Llama of 405B's width for 8 ranks")
    memory.plot(layers, [_memory(m, "bytes_peak") for _, m in rows], marker="o", label="peak")
    memory.plot(layers, [_memory(m, "bytes_before") for _, m in rows], marker="o", label="before planning")
    memory.set(ylabel="resident memory in GiB", title="Memory of the process")
    for axes in (times, memory):
        axes.set(xlabel="decoder layers", xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="8b,70b,405b", help=f"comma-separated, of {', '.join(SIZES)}")
    parser.add_argument("--curve", action="store_true", help="also plan 405b's width with 2 to 126 layers")
    parser.add_argument("--repeat", type=int, default=5, help="processes for each size, at least 2")
    parser.add_argument("--output", type=Path, help="write every single figure, and the curve, to this folder")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what the processes are started with
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repeat < 2:
        parser.error(f"--repeat is {options.repeat}; quartiles need at least 2")
    unknown = [name for name in options.sizes.split(",") if name not in SIZES]
    if unknown:
        parser.error(f"--sizes has {unknown[0]!r}; sizes are {', '.join(SIZES)}")
    return options


def main() -> None:
    options = arguments()
    if options.measure:
        options.result.write_text(json.dumps(measure(Size(**json.loads(options.measure)))))
        return
    sizes = [SIZES[name] for name in options.sizes.split(",")]
    rows = [(size, repeat(size, options.repeat)) for size in sizes]
    stated = facts(options.repeat)
    print(", ".join(f"{name} {value}" for name, value in stated.items()))
    print("", *table(rows), "", *verdicts(rows), sep="\n", flush=True)
    curve = []
    if options.curve:
        of_layers = [replace(SIZES["405b"], name="curve", layers=layers) for layers in CURVE_LAYERS]
        curve = [(size, repeat(size, options.repeat)) for size in of_layers]
        print("", *table(curve), sep="\n")
    print(f"\n{FOOTNOTE}")
    if options.output:
        write(options.output, stated, rows, curve)


def write(folder: Path, stated: Mapping[str, Any], rows: Rows, curve: Rows) -> None:
    """Write the figures as JSON, and the curve as a picture where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        **stated,
        "rows": [{"size": asdict(size), "processes": measured} for size, measured in (*rows, *curve)],
    }
    (folder / "plan_time.json").write_text(json.dumps(data, indent=1) + "\n")
    if curve:
        draw(curve, folder / "plan_time.svg")


if __name__ == "__main__":
    main()
