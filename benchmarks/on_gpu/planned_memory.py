"""Memory of a training step: what the plan for the device says against what PyTorch's allocator gave."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import keras
import numpy as np
import torch

import tp_planner
from tests.models import CASES, gpt, llama
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.job import process_group

TARGET = 0.05  # relative, of the peak
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Model:
    """One model: the case of tests/models.py that it is like, its builder and sizes, and a batch's size."""

    case: str
    build: Callable[..., keras.Model]
    width: int
    length: int
    vocabulary: int
    batch: int

    def draw_batch(self) -> tuple[Any, np.ndarray]:
        """Return inputs and labels."""
        rng = np.random.default_rng(2)
        tokens, labels = (rng.integers(0, self.vocabulary, (self.batch, self.length)).astype("int32") for _ in range(2))
        return (tokens if self.case == "gpt" else {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}), labels


def _gpt(width: int, length: int, vocabulary: int, batch: int) -> Model:
    build = partial(gpt, width=width, heads=width // 64, blocks=4, length=length, vocabulary=vocabulary)
    return Model("gpt", build, width, length, vocabulary, batch)


def _llama(width: int, length: int, vocabulary: int, batch: int) -> Model:
    heads = width // 64
    sizes = {"width": width, "heads": heads, "kv_heads": heads // 2, "hidden": 3 * width, "blocks": 4}
    return Model(
        "llama", partial(llama, **sizes, length=length, vocabulary=vocabulary), width, length, vocabulary, batch
    )


MODELS = {
    "cuda": [
        make(width, length, vocabulary, batch)
        for make in (_gpt, _llama)
        for width, length, vocabulary, batch in ((512, 512, 8192, 8), (1024, 1024, 32768, 4), (2048, 2048, 32768, 2))
    ],
    "cpu": [_gpt(128, 16, 64, 2), _llama(128, 16, 64, 2)],
}
DTYPES = ("float32", "mixed_bfloat16")


def measure(device: str) -> dict[str, Any]:
    """Return for each model and dtype what the plan predicts, and what was allocated and reserved in a step."""
    process_group.require_process_group(1, "cuda" if device == "cuda" else "cpu")
    rows = [_row(model, dtype, device) for model in MODELS[device] for dtype in DTYPES]
    return {"rows": rows}


def _row(sized: Model, dtype: str, device: str) -> dict[str, Any]:
    x, y = sized.draw_batch()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    model = sized.build(dtype=dtype)
    model.compile(keras.optimizers.AdamW(), CASES[sized.case].make_loss(), jit_compile=False)
    rules = tuple(LayoutRule(pattern, axes) for pattern, axes in CASES[sized.case].rules.items())
    layout = Layout(Mesh((("batch", 1), ("model", 1))), rules, "cuda" if device == "cuda" else "cpu")
    plan = tp_planner.plan(model, layout, inputs=x)
    tp_planner.parallelize(model, plan)
    for _ in range(2):  # Keras builds optimizer and metrics
        model.train_on_batch(x, y)
    memory = plan.step.memory
    return {
        "model": sized.case,
        "dtype": dtype,
        "sizes": {name: getattr(sized, name) for name in ("width", "length", "vocabulary", "batch")},
        "predicted": {"allocated": memory.peak.total, "reserved": memory.reserved, **asdict(memory.peak)},
        "measured": _measured(partial(model.train_on_batch, x, y), before) if device == "cuda" else None,
    }


def _measured(step: Callable[[], Any], before: int) -> dict[str, int]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return {
        "allocated": torch.cuda.max_memory_allocated() - before,
        "reserved": torch.cuda.max_memory_reserved(),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield predicted and measured memory as text."""
    yield f"  {'model':8}{'dtype':16}{'width':>8}{'length':>8}{'predicted MiB':>16}{'measured MiB':>16}{'off':>9}"
    for row in rows:
        predicted, measured = row["predicted"]["allocated"], row["measured"]
        line = f"  {row['model']:8}{row['dtype']:16}{row['sizes']['width']:8}{row['sizes']['length']:8}"
        line += f"{predicted / MIB:16.1f}"
        if measured is None:
            yield f"{line}{'not measured':>16}"
            continue
        off = predicted / measured["allocated"] - 1
        met = "" if abs(off) <= TARGET else f"  MISSED, of {TARGET:.0%}"
        yield f"{line}{measured['allocated'] / MIB:16.1f}{off:9.2%}{met}"
