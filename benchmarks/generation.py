"""Time of one more token with a cache of keys and values, on two CPU processes, against hand-written code.

    python benchmarks/generation.py [--sizes tiny,medium] [--repeat 40] [--output FOLDER]

Starts its two gloo processes itself, anew for each size; see benchmarks/README.md for what they measure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np
import torch
import torch.distributed as dist
from models.keras_llama import keras_llama
from peers.handwritten_llama import Llama, Shape
from processes.measure import Step, count_collectives, measure
from showing import machine
from showing.report import HANDWRITTEN, PLANNED, REPLAYED, SINGLE, VERSION_HEAD, version_rows

import tp_planner
from tests.models import randomize
from tests.workers import WorkerPool
from tp_planner.frontend.layout_file import find_layout_file, read_layout_file
from tp_planner.ir.mesh import Mesh

PROCESSES = 2
SHAPES = {
    "tiny": Shape(layers=4, width=64, heads=8, key_value_heads=4, hidden=192, vocabulary=256, batch=1, length=64),
    "medium": Shape(layers=8, width=512, heads=8, key_value_heads=4, hidden=1536, vocabulary=4096, batch=1, length=256),
}
TOLERANCE = 1e-4  # relative to the largest logit, float32


# On the ranks


def measure_size(name: str, repeat: int) -> list[dict[str, Any]]:
    """Return the times of all versions in ms; raise AssertionError if one's logits are not the single device's."""
    shape, rank = SHAPES[name], dist.get_rank()
    rng = np.random.default_rng(0)
    size = (shape.batch, shape.layers, 2, shape.length, shape.key_value_heads, shape.head_size)
    cache = torch.from_numpy(rng.standard_normal(size).astype("float32"))
    token = torch.from_numpy(rng.integers(0, shape.vocabulary, (shape.batch, 1)).astype("int32"))
    steps = {
        SINGLE: keras_token(randomize(keras_llama(shape)), token, cache, shape),
        PLANNED: keras_token(planned_llama(shape, jit_compile=False), token, cache, shape),
        REPLAYED: keras_token(planned_llama(shape, jit_compile=True), token, cache, shape),
        HANDWRITTEN: torch_token(by_hand(shape), token, cache),
    }
    expected = steps[SINGLE]()
    for version, step in steps.items():
        for _ in range(4):  # the first calls run as ever, and are taped
            found = step()
        off = float((found - expected).abs().max() / expected.abs().max())
        assert off < TOLERANCE, f"{version}: logits differ by {off:.1e} from those of a single device"
    if rank:
        steps[SINGLE] = lambda: token
    counts = [dict(count_collectives(step)) for step in steps.values()]
    times, cpu = measure(list(steps.values()), repeat).round(3).tolist()
    return [
        {"version": version, "collectives": count, "times_ms": times_ms, "cpu_ms": cpu_ms}
        for version, count, times_ms, cpu_ms in zip(steps, counts, times, cpu, strict=True)
    ]


def planned_llama(shape: Shape, jit_compile: bool) -> keras.Model:
    """Return the same, parallelized by the preset."""
    model = randomize(keras_llama(shape))
    layout = read_layout_file(find_layout_file("llama")).on(Mesh((("model", PROCESSES),)))
    tokens = np.zeros((shape.batch, shape.length), "int32")
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    model.compile(jit_compile=jit_compile)
    return tp_planner.parallelize(model, layout, inputs=inputs)


def keras_token(model: keras.Model, token: torch.Tensor, cache: torch.Tensor, shape: Shape) -> Step:
    """Return a step that computes the logits of the last position, all positions before it being in the cache."""
    last = torch.tensor(shape.length - 1, dtype=torch.int32)
    with torch.no_grad():
        held = model.call_with_cache(token, cache, last)[2]  # of a rank's own heads

    @torch.no_grad()
    def step() -> torch.Tensor:
        logits: torch.Tensor = model.call_with_cache(token, held, last)[0]
        return logits

    return step


def by_hand(shape: Shape) -> Llama:
    """Return this rank's shards of the same weights in plain torch."""
    rank, model = dist.get_rank(), Llama(shape, PROCESSES)
    weights = {
        variable.path: torch.from_numpy(variable.numpy()) for variable in randomize(keras_llama(shape)).variables
    }

    def own(weight: torch.Tensor, dim: int) -> torch.Tensor:
        return weight.chunk(PROCESSES, dim)[rank]

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            path, dim = _keras_path(name)
            weight = weights[path] if dim is None else own(weights[path], dim)
            if "embedding" not in path or "reverse" in path:
                rows = weight.ndim - 1 if "attention_output" in name else 1
                weight = weight.flatten(0, rows - 1).flatten(1).T if weight.ndim > 1 else weight
            parameter.copy_(weight)
    return model


def _keras_path(name: str) -> tuple[str, int | None]:
    """Return the path of the Keras variable that a parameter is of, and the dim that is cut."""
    match name.split("."):
        case ["embedding", _]:
            return "token_embedding/embeddings", 0
        case ["head", _]:
            return "token_embedding/reverse_embeddings", 1
        case ["final_norm", _]:
            return "sequence_output_layernorm/scale", None
        case ["blocks", index, part, _]:
            kinds: dict[str, tuple[str, int | None]] = {
                "attention_norm": ("self_attention_layernorm/scale", None),
                "mlp_norm": ("feedforward_layernorm/scale", None),
                "gate": ("feedforward_gate_dense/kernel", 1),
                "up": ("feedforward_intermediate_dense/kernel", 1),
                "down": ("feedforward_output_dense/kernel", 0),
                "attention_output": ("self_attention/attention_output/kernel", 0),
            }
            path, dim = kinds.get(part, (f"self_attention/{part}/kernel", 1))
            return f"transformer_layer_{index}/{path}", dim
    raise AssertionError(name)


def torch_token(model: Llama, token: torch.Tensor, cache: torch.Tensor) -> Step:
    """Return the same step of the hand-written model, whose cache is written in place."""
    own = cache.chunk(PROCESSES, -2)[dist.get_rank()].transpose(-3, -2)
    caches = [(layer[:, 0].contiguous(), layer[:, 1].contiguous()) for layer in own.unbind(1)]

    @torch.no_grad()
    def step() -> torch.Tensor:
        logits: torch.Tensor = model(token, caches)
        return logits

    return step


# In the parent


def run(name: str, repeat: int) -> dict[str, Any]:
    """Return what the processes measured at one size."""
    pool = WorkerPool(PROCESSES)
    try:
        rows = pool.run(measure_size, name, repeat)[0]
    finally:
        pool.stop()
    return {"size": {"name": name, **asdict(SHAPES[name])}, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SHAPES), help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--repeat", type=int, default=40, help="timed rounds, at least 2")
    parser.add_argument("--output", type=Path, help="write every single time to generation.json in this folder")
    options = parser.parse_args()
    unknown = [name for name in options.sizes.split(",") if name not in SHAPES]
    if unknown:
        parser.error(f"--sizes has {unknown[0]!r}; sizes are {', '.join(SHAPES)}")
    if options.repeat < 2:
        parser.error(f"--repeat is {options.repeat}; quartiles need at least 2")
    stated = {**machine.facts(), "processes": PROCESSES, "dtype": "float32", "repetitions": options.repeat}
    print(", ".join(f"{name} {value}" for name, value in stated.items()))
    results = []
    for name in options.sizes.split(","):
        results.append(run(name, options.repeat))
        print(f"\n{', '.join(f'{key} {value}' for key, value in results[-1]['size'].items())}")
        for cells in (VERSION_HEAD, *version_rows(results[-1]["rows"])):
            print(f"  {cells[0]:28}" + "".join(f"{cell:>16}" for cell in cells[1:-1]) + f"  {cells[-1]}", flush=True)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "generation.json").write_text(json.dumps({**stated, "sizes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
