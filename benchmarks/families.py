"""What one block of each KerasHub family communicates in a training step, or keeps, as the tables of plans/README.md.

    python benchmarks/families.py [--ranks 2,4] [--activations gpt2,...]

Plans the tiny models of tests/families.py with their presets, without devices; the sizes of a model do not change
what is counted, as long as heads, key-value heads and experts divide by the ranks. Activations are those of models as
wide as the smallest published size of each family, on 4 ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def table(ranks: int) -> list[str]:
    """Return the table's lines for a model axis of ``ranks``."""
    from tests.families import EVERY, TABLE_HEAD, plan_of, table_rows

    rows = [row for name, family in EVERY.items() for row in table_rows(family, plan_of(name, ranks))]
    return [*TABLE_HEAD, *rows]


KEPT_HEAD = ("| family | one device | 4 ranks | stream in shards | formula |", "|---|---|---|---|---|")
KEPT_RANKS = 4


def kept_table(names: Iterable[str]) -> Iterator[str]:
    """Yield the lines of the table of activations that a block keeps for its backward pass.

    In numbers of batch x sequence x width. Of A numbers that tensor parallelism leaves whole and C that it shards over
    t ranks a rank keeps A + C / t; with the stream in shards (A + C) / t.
    """
    from tests.families import FAMILIES

    yield from KEPT_HEAD
    for name in names:
        one, some, stream = (kept_by_block(name, *how) for how in ((1, False), (KEPT_RANKS, False), (KEPT_RANKS, True)))
        whole = (KEPT_RANKS * some - one) / (KEPT_RANKS - 1)
        formula = f"({whole:.1f} + {one - whole:.1f}) / {KEPT_RANKS} = {one / KEPT_RANKS:.1f}"
        yield f"| {FAMILIES[name].title} | {one:.1f} | {some:.1f} | {stream:.1f} | {formula} |"


def kept_by_block(name: str, ranks: int, sequence_parallel: bool) -> float:
    """Return what one more block of a family adds to the largest activations of rank 0, per number of the stream."""
    import keras

    from tests.families import FAMILIES, LENGTH_OF_TEXT, PUBLISHED, published
    from tp_planner.frontend.training_loss import TrainingLoss
    from tp_planner.planner import make_plan

    layout = replace(FAMILIES[name].layout(ranks), sequence_parallel=sequence_parallel)
    loss = TrainingLoss(FAMILIES[name].case.make_loss())
    few, more = (
        make_plan(model, layout, inputs, keras.optimizers.Adam(), loss).step.memory.largest.activations
        for model, inputs in (published(name, 1, blocks) for blocks in (2, 4))
    )
    keys, rows = PUBLISHED[name]
    width = dict(zip(keys, next(iter(rows.values())), strict=True))["hidden_dim"]
    return (more - few) / 2 / (4 * LENGTH_OF_TEXT * width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4", help="comma-separated sizes of the model axis")
    parser.add_argument("--activations", default="", help="print the table of activations for these families instead")
    options = parser.parse_args()
    sizes = [int(size) for size in options.ranks.split(",")]
    os.environ["KERAS_BACKEND"] = "torch"
    sys.path.insert(0, str(ROOT))
    warnings.filterwarnings("ignore", module="keras")
    if options.activations:
        for line in kept_table(options.activations.split(",")):
            print(line, flush=True)
        return
    tables = {size: table(size) for size in sizes}
    first = tables[sizes[0]]
    print(*first, sep="\n")
    for size in sizes[1:]:
        other = [row for row in tables[size] if row not in first]
        print(f"\non {size} ranks: {'the same' if not other else ''}", *other, sep="\n")


if __name__ == "__main__":
    main()
