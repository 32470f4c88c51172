"""Collectives and sent bytes of one training step against Megatron-LM's formula, by family and degree.

    python benchmarks/communication.py [--families gpt2,...] [--ranks 2,4,8] [--output FOLDER]

Plans KerasHub's families, tiny, with their presets, and the demonstration's GPT; no devices are needed. See
benchmarks/README.md for the formula.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np
import torch
from showing import machine

from tests.families import FAMILIES
from tp_planner.frontend.layer_tree import named_layers
from tp_planner.frontend.layout_file import find_layout_file, read_layout_file
from tp_planner.gpt import BYTES, LENGTH, build_gpt
from tp_planner.ir.layout import Layout
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.plan import Plan
from tp_planner.ir.step import Collective
from tp_planner.planner import make_plan

BATCH = 2
DEMO = "demo"
NAMES = (DEMO, *FAMILIES)
BLOCK = re.compile(r"(?P<block>(.*?/)?(transformer_)?((en|de)coder_)?(layer|block)_[0-9]+)([/_].*)?")
# Sizes of the tiny families which eight ranks divide too.
DIVISIBLE = {"num_heads": 8, "num_query_heads": 16, "num_key_value_heads": 8, "num_experts": 8}

FOOTNOTE = """\
Per step: batch 2, tiny sizes, two blocks a stack. Formula: in each block 2 all-reduces forward and 2 backward, 3 and 3
where there is cross-attention, of batch x sequence x hidden; a rank sends 2 (N - 1) / N of that (Shoeybi et al.,
Megatron-LM, 2019, section 3). Outside of the blocks are embedding, head, and the gradient of an encoder's output.
With the residual stream sharded over the sequence, each all-reduce is a reduce-scatter and an all-gather, which send as
much, and each region's input is gathered once more, in the backward pass (Korthikanti et al., 2022, section 4.2)."""


def measure(name: str, ranks: int) -> dict[str, Any]:
    """Return what one training step of a family communicates over ``ranks``, and what the formula says."""
    title, model, inputs, layout = _family(name, ranks)
    shapes = block_shapes(model, inputs)
    plan, on_shards = (make_plan(model, replace(layout, sequence_parallel=on), inputs) for on in (False, True))
    crossing = {block_of(layer.path) for layer in plan.layers if "cross_attention" in layer.path}
    pairs = {block: 3 if block in crossing else 2 for block in shapes}
    reduced = sum(pairs[block] * ring_bytes(shape, ranks) for block, shape in shapes.items())
    return {
        "family": name,
        "title": title,
        "ranks": ranks,
        "blocks": len(shapes),
        "formula": {
            "forward": sum(pairs.values()),
            "backward": sum(pairs.values()),
            "sent_bytes": 2 * reduced,
            "sequence_sent_bytes": 2 * reduced + reduced // 2,
        },
        **_sent(plan),
        "sequence": _sent(on_shards),
    }


def _family(name: str, ranks: int) -> tuple[str, keras.Model, Any, Layout]:
    """Return the family's title, its tiny model, a batch, and its preset on a model axis of ``ranks``."""
    rng = np.random.default_rng(0)
    if name == DEMO:
        layout = read_layout_file(find_layout_file("gpt")).on(Mesh((("model", ranks),)))
        return "GPT of the demonstration", build_gpt(), rng.integers(0, BYTES, (BATCH, LENGTH)).astype("int32"), layout
    family = FAMILIES[name]
    sizes = {size: value for size, value in DIVISIBLE.items() if size in family.sizes}
    return family.title, family.build(**sizes), family.batch(rng, BATCH)[0], family.layout(ranks)


def _sent(plan: Plan) -> dict[str, Any]:
    """Return what the blocks of a plan send, and what stands outside of them, also one by one."""
    outside = [each for each in plan.collectives if not is_inside(each)]
    return {
        "inside": _summary(filter(is_inside, plan.collectives)),
        "outside": _summary(outside),
        "outside_layers": [
            {"kind": each.kind, "phase": each.phase, "layer": each.layer, "place": each.place, "bytes": each.bytes}
            for each in outside
        ],
    }


def block_of(path: str) -> str:
    """Return the block that a layer belongs to; empty for a layer outside of all blocks."""
    match = BLOCK.fullmatch(path)
    return match["block"] if match else ""


def is_inside(collective: Collective) -> bool:
    """Whether it belongs to a block: it stands there, and is not for the gradient of an encoder's output."""
    tensor = collective.place.partition(" (")[2]
    of_encoder = "cross_attention" in collective.layer and not block_of(tensor.partition(" ")[0])
    return bool(block_of(collective.layer)) and not of_encoder


def block_shapes(model: keras.Model, inputs: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of what each block returns when the plain model is called on ``inputs``."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(block: str, layer: keras.Layer, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            shapes[block] = tuple(output.shape)  # the last layer of a block to return is the block, or its residual

    hooks = [
        layer.register_forward_hook(partial(note, block_of(path)))
        for path, layer in named_layers(model).items()
        if block_of(path)
    ]
    with torch.no_grad():
        model(keras.tree.map_structure(torch.as_tensor, inputs), training=False)
    for hook in hooks:
        hook.remove()
    return shapes


def ring_bytes(shape: Sequence[int], ranks: int, itemsize: int = 4) -> int:
    """Return the bytes that a rank sends for an all-reduce of a tensor of ``shape``."""
    size = itemsize
    for dim in shape:
        size *= dim
    return 2 * size * (ranks - 1) // ranks


def _summary(collectives: Iterable[Collective]) -> dict[str, Any]:
    """Return how many of each kind there are, by phase, and the bytes of all of them."""
    collectives = list(collectives)
    return {
        **{
            phase: dict(Counter(each.kind for each in collectives if each.phase == phase))
            for phase in ("forward", "backward")
        },
        "bytes": sum(each.bytes for each in collectives),
        "sent_bytes": sum(each.wire_bytes for each in collectives),
    }


def table(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table with one line for each family and number of ranks."""
    yield (
        f"  {'family':26}{'ranks':>6}{'blocks':>7}  {'in blocks: forward':20}{'backward':26}{'formula':>9}"
        f"{'sent bytes':>12}{'formula':>9}{'ratio':>7}  {'outside: forward':28}{'backward':16}{'sent bytes':>10}"
    )
    for row in rows:
        inside, formula, outside = row["inside"], row["formula"], row["outside"]
        yield (
            f"  {row['title']:26}{row['ranks']:6}{row['blocks']:7}  {kinds(inside['forward']):20}"
            f"{kinds(inside['backward']):26}{formula['forward']:>5} + {formula['backward']}"
            f"{inside['sent_bytes']:12}{formula['sent_bytes']:9}{inside['sent_bytes'] / formula['sent_bytes']:7.3f}"
            f"  {kinds(outside['forward']):28}{kinds(outside['backward']):16}{outside['sent_bytes']:10}"
        )


def kinds(counts: Mapping[str, int]) -> str:
    """Return how many collectives of each kind, in words."""
    return ", ".join(f"{count} {kind.replace('_', '-')}" for kind, count in sorted(counts.items(), reverse=True)) or "-"


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how many rows have the formula's collectives in their blocks, and what the others have beyond them."""
    others = sorted({f"{row['title']} (+ {kinds(_beyond(row))})" for row in rows if _beyond(row)})
    text = f"{sum(not _beyond(row) for row in rows)} of {len(rows)} send in their blocks just what the formula says"
    return text + (f"; the others: {', '.join(others)}" if others else "")


def _beyond(row: Mapping[str, Any]) -> dict[str, int]:
    """Return the collectives inside the blocks that the formula does not have, by kind."""
    found = Counter(row["inside"]["forward"]) + Counter(row["inside"]["backward"])
    found.subtract(all_reduce=row["formula"]["forward"] + row["formula"]["backward"])
    return {kind: count for kind, count in found.items() if count}


def main() -> None:
    warnings.filterwarnings("ignore", module="keras")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(NAMES), help=f"comma-separated, of {', '.join(NAMES)}")
    parser.add_argument("--ranks", default="2,4,8", help="comma-separated sizes of the model axis")
    parser.add_argument("--output", type=Path, help="write every figure to communication.json in this folder")
    options = parser.parse_args()
    unknown = [name for name in options.families.split(",") if name not in NAMES]
    if unknown:
        parser.error(f"--families has {unknown[0]!r}; families are {', '.join(NAMES)}")
    degrees = [int(size) for size in options.ranks.split(",")]
    rows = [measure(name, ranks) for name in options.families.split(",") for ranks in degrees]
    stated = {**machine.facts(), "batch": BATCH, "dtype": "float32"}
    print(", ".join(f"{name} {value}" for name, value in stated.items()))
    print("", *table(rows), "", verdict(rows), "", FOOTNOTE, sep="\n")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "communication.json").write_text(json.dumps({**stated, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
