"""What one block of each KerasHub family communicates in a training step, as the table of plans/README.md.

    python benchmarks/families.py [--ranks 2,4]

Plans the tiny models of tests/families.py with their presets, without devices; the sizes of a model do not change
what is counted, as long as heads, key-value heads and experts divide by the ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def table(ranks: int) -> list[str]:
    """Return the table's lines for a model axis of ``ranks``."""
    from tests.families import EVERY, TABLE_HEAD, plan_of, table_rows

    rows = [row for name, family in EVERY.items() for row in table_rows(family, plan_of(name, ranks))]
    return [*TABLE_HEAD, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4", help="comma-separated sizes of the model axis")
    sizes = [int(size) for size in parser.parse_args().ranks.split(",")]
    os.environ["KERAS_BACKEND"] = "torch"
    sys.path.insert(0, str(ROOT))
    warnings.filterwarnings("ignore", module="keras")
    tables = {size: table(size) for size in sizes}
    first = tables[sizes[0]]
    print(*first, sep="\n")
    for size in sizes[1:]:
        other = [row for row in tables[size] if row not in first]
        print(f"\non {size} ranks: {'the same' if not other else ''}", *other, sep="\n")


if __name__ == "__main__":
    main()
