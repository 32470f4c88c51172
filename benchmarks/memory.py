"""Memory of a training step: what the plan predicts against what two processes measure.

    python benchmarks/memory.py [--models gpt-64,...] [--output FOLDER]

Starts its two gloo processes itself, anew for each model; see benchmarks/README.md for what they measure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np
from showing import machine

import tp_planner
from tests.dryrun.test_simulation import metered_step, metered_training, size_of
from tests.models import CASES, gpt, llama
from tests.workers import WorkerPool, layout_map
from tp_planner.ir.step import Memory, MemoryUse

PROCESSES = 2
TARGET = 0.05  # relative, of the peak
KINDS = tuple(field.name for field in fields(MemoryUse))
MIB = 2**20

FOOTNOTE = """\
Rank 0 of two, AdamW, float32. "predicted" is the plan's, "measured" the same step on real tensors, storage by storage;
kinds are each at its own largest. "by Keras" is the peak of train_on_batch, with metrics and with the gradients of the
step before; "off" is how far the prediction is from it."""


@dataclass(frozen=True, slots=True)
class Model:
    """One model: its builder and sizes, the case of tests/models.py that it is like, and a batch's size.

    ``whole_logits``: every rank gathers the logits for the loss. ``sequence_parallel``: as for ``tp_planner.plan``.
    """

    name: str
    case: str
    build: Callable[..., keras.Model]
    vocabulary: int
    length: int
    batch: int = 8
    whole_logits: bool = False
    sequence_parallel: bool = False

    def make_loss(self) -> keras.losses.Loss:
        """Return the loss; where it is over an axis that is no last one by name, ranks gather the logits for it."""
        axis = 2 if self.whole_logits else -1
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True, axis=axis)

    def draw_batch(self) -> tuple[Any, np.ndarray]:
        """Return inputs and labels."""
        rng = np.random.default_rng(2)
        tokens, labels = (rng.integers(0, self.vocabulary, (self.batch, self.length)).astype("int32") for _ in range(2))
        if self.case == "gpt":
            return tokens, labels
        return {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}, labels


def _gpt(width: int, length: int, vocabulary: int) -> Model:
    build = partial(gpt, width=width, heads=8, blocks=4, length=length, vocabulary=vocabulary)
    return Model(f"gpt-{width}", "gpt", build, vocabulary, length)


def _llama(width: int, length: int, vocabulary: int, recomputed: bool = False) -> Model:
    sizes = {"width": width, "heads": 8, "kv_heads": 4, "hidden": 3 * width, "blocks": 4}
    build = partial(llama, **sizes, length=length, vocabulary=vocabulary, recomputed=recomputed)
    name = f"llama-{width}{'-recomputed' if recomputed else ''}"
    return Model(name, "llama", build, vocabulary, length)


def _with_whole_logits(model: Model) -> Model:
    return replace(model, name=f"{model.name}-whole-logits", whole_logits=True)


def _on_sequence(model: Model) -> Model:
    return replace(model, name=f"{model.name}-sequence", sequence_parallel=True)


MODELS = {
    model.name: model
    for model in (
        _gpt(64, 32, 256),
        _gpt(256, 64, 1024),
        _gpt(512, 128, 4096),
        _llama(64, 32, 256),
        _llama(256, 64, 1024),
        _llama(512, 128, 4096),
        _llama(512, 128, 4096, recomputed=True),
        _with_whole_logits(_gpt(512, 128, 4096)),
        _with_whole_logits(_llama(512, 128, 4096)),
        _on_sequence(_gpt(512, 128, 4096)),
        _on_sequence(_llama(512, 128, 4096, recomputed=True)),
    )
}


# On the ranks


def measure(name: str) -> dict[str, Any]:
    """Return what the plan predicts and what this rank measures of one model, in bytes."""
    sized = MODELS[name]
    x, y = sized.draw_batch()
    model = sized.build()
    model.compile(keras.optimizers.AdamW(), sized.make_loss(), jit_compile=False)
    rules = layout_map(CASES[sized.case].rules)
    plan = tp_planner.plan(model, rules, inputs=x, sequence_parallel=sized.sequence_parallel)
    tp_planner.parallelize(model, plan)
    model.train_on_batch(x, y)  # Keras builds optimizer and metrics
    # Gloo's thread may let go of a tensor a moment after its collective is done, so the least of a few steps is taken.
    same = min((metered_step(model, x).memory for _ in range(3)), key=size_of)
    by_keras = min((metered_training(model, x, y) for _ in range(3)), key=size_of)
    return {
        "parameters": model.count_params(),
        "predicted": _data(plan.step.memory),
        "measured": _data(same),
        "by_keras": _data(by_keras),
    }


def _data(memory: Memory) -> dict[str, Any]:
    return {"largest": asdict(memory.largest), "peak": asdict(memory.peak), "peak_total": memory.peak.total}


# In the parent


def run(name: str) -> dict[str, Any]:
    """Return what both ranks measured of one model, in fresh processes."""
    model, pool = MODELS[name], WorkerPool(PROCESSES)
    try:
        ranks = pool.run(measure, name)
    finally:
        pool.stop()
    sizes = {**model.build.keywords, "batch": model.batch}
    return {"model": name, "size": sizes, "ranks": ranks}


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table in MiB with two lines for each model: predicted, measured."""
    yield (
        f"  {'model':28}{'':10}{'peak':>9}" + "".join(f"{kind:>13}" for kind in KINDS) + f"{'by Keras':>10}{'off':>8}"
    )
    for row in rows:
        first = row["ranks"][0]
        for what in ("predicted", "measured"):
            memory = first[what]
            line = f"  {row['model'] if what == 'predicted' else '':28}{what:10}{memory['peak_total'] / MIB:9.2f}"
            line += "".join(f"{memory['largest'][kind] / MIB:13.2f}" for kind in KINDS)
            if what == "measured":
                line += f"{first['by_keras']['peak_total'] / MIB:10.2f}{off(row):8.2%}"
            yield line


def off(row: Mapping[str, Any]) -> float:
    """Return how far the predicted peak is from that of training by Keras, on the rank where it is farthest."""
    errors = [rank["predicted"]["peak_total"] / rank["by_keras"]["peak_total"] - 1 for rank in row["ranks"]]
    return max(errors, key=abs)


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return for how many models the prediction is within the target, and where the same step differs."""
    missed = [f"{row['model']} {off(row):+.1%}" for row in rows if abs(off(row)) > TARGET]
    equal = sum(rank["predicted"] == rank["measured"] for row in rows for rank in row["ranks"])
    return (
        f"peak of training by Keras: predicted within {TARGET:.0%} for {len(rows) - len(missed)} of {len(rows)} models"
        f"{'; MISSED for ' + ', '.join(missed) if missed else ''}\n"
        f"the same step: every kind and the peak equal to the byte on {equal} of "
        f"{sum(len(row['ranks']) for row in rows)} ranks"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument("--output", type=Path, help="write every figure to memory.json in this folder")
    options = parser.parse_args()
    unknown = [name for name in options.models.split(",") if name not in MODELS]
    if unknown:
        parser.error(f"--models has {unknown[0]!r}; models are {', '.join(MODELS)}")
    rows = [run(name) for name in options.models.split(",")]
    stated = {**machine.facts(), "processes": PROCESSES, "dtype": "float32", "optimizer": "AdamW"}
    print(", ".join(f"{name} {value}" for name, value in stated.items()))
    print("", *table(rows), "", verdict(rows), "", FOOTNOTE, sep="\n")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "memory.json").write_text(json.dumps({**stated, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
