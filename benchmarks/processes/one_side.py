"""One process of one side of vs_keras_nightly.py: trains one model, step by step, as the lines on stdin ask for.

    python one_side.py CASE SIZE SIDE

The sides "keras" and "tp_planner" differ by one line: whether ``enable_keras_distribution`` is called. "single" is one
process without a distribution. Answers are lines of JSON; whatever else is printed goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, TextIO

import keras
import keras_hub
import numpy as np
import torch
import torch.distributed as dist
from models.distributed_models import CASES, Layout
from models.gpt import BLOCKS, SIZES
from processes.measure import CollectiveCounter

import tp_planner
from tp_planner.ir.errors import in_one_line

Scope = Callable[[], AbstractContextManager[Any]]


class Side:
    """A model, and what it is asked to do; all of it happens inside of ``scope``, where the distribution is current."""

    def __init__(self, case_name: str, size_name: str, side: str) -> None:
        if side == "tp_planner":
            tp_planner.enable_keras_distribution()
        case, self.size = CASES[case_name], SIZES[size_name]
        self.scope = contextlib.nullcontext if side == "single" else model_parallel(case.layout)
        self.batch = case.batch(self.size)
        keras.utils.set_random_seed(0)
        with self.scope():
            self.model = case.build(self.size)
            draw_values(self.model)
            self.model.compile(keras.optimizers.AdamW(), case.loss(), jit_compile=False)

    def loss(self) -> float:
        """Train one step and return its loss."""
        with self.scope():
            self.model.reset_metrics()
            return float(self.model.train_on_batch(*self.batch))

    def time(self) -> float:
        """Train one step and return the ms that it took this process, from a moment at which all begin."""
        with self.scope():
            if dist.is_initialized():
                dist.barrier()
            start = time.perf_counter()
            self.model.train_on_batch(*self.batch)
            return 1000 * (time.perf_counter() - start)

    def collectives(self) -> dict[str, int]:
        """Train one step and return how many collectives of each kind this process ran in it."""
        # The counter lies below the mode that Keras's own library enters with the scope: so it sees what DTensor runs.
        with CollectiveCounter() as counter, self.scope():
            self.model.train_on_batch(*self.batch)
        return dict(counter.counts)

    def facts(self) -> dict[str, Any]:
        """Return what the numbers depend on."""
        return {
            "size": {**asdict(self.size), "blocks": BLOCKS},
            "python": platform.python_version(),
            "torch": torch.__version__,
            "keras": keras.__version__,
            "keras_hub": keras_hub.__version__,
            "tp_planner": tp_planner.__version__,
            "threads per process": torch.get_num_threads(),
        }


def model_parallel(layout: Layout) -> Scope:
    """Return the scope of a ModelParallel over all processes, which have to call this together."""
    keras.distribution.initialize()
    devices = keras.distribution.list_devices("cpu")
    mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
    distribution = keras.distribution.ModelParallel(
        layout_map=layout(mesh), batch_dim_name="batch", auto_shard_dataset=False
    )
    scope: Scope = distribution.scope
    return scope


def draw_values(model: keras.Model) -> None:
    """Give every weight the value that it has on all sides; biases and norms are random too."""
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        around = 1.0 if variable.name in ("gamma", "scale") else 0.0
        inputs = np.prod(variable.shape[:-1]) if len(variable.shape) > 1 else 10.0
        variable.assign(around + rng.standard_normal(variable.shape).astype("float32") / inputs**0.5)


def serve(answers: TextIO) -> None:
    """Build the side and do what each line names."""
    side = Side(*sys.argv[1:])
    for line in sys.stdin:
        print(json.dumps({"answer": getattr(side, line.strip())()}), file=answers, flush=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    try:
        serve(answers)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"error": in_one_line(error)}), file=answers, flush=True)
        os._exit(1)  # at once: the end of the process group would wait for the others


if __name__ == "__main__":
    main()
