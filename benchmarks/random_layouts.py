"""Layouts that were found beside random ones and beside nothing sharded, for models that nobody wrote a layout for.

    python benchmarks/random_layouts.py [--models unet,clip,resnet50,...] [--layouts 200]

On 2 ranks, with AdamW, on hardware whose links are so fast that even tiny models are worth sharding. A random layout
shards a random dim of each weight with a chance of 0.7. Prints a table: the estimate of a step with what was found and
with the best of the random layouts, both by that with nothing sharded; the gap to the bound; how far program and plan
differ; and the seconds of the search.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEAD = ("| model | found | best of random | gap | program | seconds |", "|---|---|---|---|---|---|")
OF_FAMILIES = ("bloom", "falcon", "deberta", "clip", "siglip", "pali_gemma", "flux", "stable_diffusion_3")
APPLICATIONS = {"resnet50": "ResNet50", "efficientnet_b0": "EfficientNetB0", "convnext_tiny": "ConvNeXtTiny"}


def rows(names: list[str], number: int) -> Iterator[str]:
    """Yield the table's line of each model."""
    import keras

    from tests.search.test_found_models import fast_links, random_layout
    from tp_planner.ir.mesh import Mesh
    from tp_planner.planner import make_plan
    from tp_planner.search.find import search
    from tp_planner.search.prices import seconds_of

    mesh = Mesh((("model", 2),))
    for name in names:
        keras.utils.clear_session()
        model, inputs = _model(name)
        start = time.perf_counter()
        found = search(model, mesh, fast_links(), inputs, keras.optimizers.AdamW())
        seconds, rng = time.perf_counter() - start, random.Random(0)
        costs = []
        for _ in range(number):
            plan = make_plan(model, random_layout(model, mesh, rng), inputs, keras.optimizers.AdamW())
            costs.append(seconds_of(plan, fast_links()))
            gc.collect()  # what a plan leaves in cycles is seldom collected by itself: 150 MB of an EfficientNet
        best = min(costs)
        gap = "not known" if found.gap is None else f"{found.gap:.1%}"
        both = f"{found.cost / found.whole.cost:.2f} | {best / found.whole.cost:.2f}"
        yield f"| {name} | {both} | {gap} | {found.error:+.1%} | {seconds:.0f} |"


def _model(name: str) -> tuple[Any, Any]:
    """Return a model by name, and inputs for it."""
    import keras

    from tests.families import EVERY
    from tests.search.test_found_models import MODELS
    from tests.test_families import batches
    from tests.test_parity import make_batches

    if name in APPLICATIONS:
        made = getattr(keras.applications, APPLICATIONS[name])(weights=None, input_shape=(64, 64, 3), classes=16)
        return made, keras.InputSpec(shape=(4, 64, 64, 3), dtype="float32")
    if name in MODELS:
        return MODELS[name].build("float64"), make_batches(MODELS[name])[0][0]
    return EVERY[name].build(), batches(name)[0][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="comma-separated; by default all")
    parser.add_argument("--layouts", type=int, default=200, help="random layouts of each model")
    options = parser.parse_args()
    os.environ["KERAS_BACKEND"] = "torch"
    sys.path.insert(0, str(ROOT))
    warnings.filterwarnings("ignore", module="keras")

    from tests.search.test_found_models import MODELS

    print(*HEAD, sep="\n")
    names = options.models.split(",") if options.models else [*MODELS, *OF_FAMILIES, *APPLICATIONS]
    for row in rows(names, options.layouts):
        print(row, flush=True)


if __name__ == "__main__":
    main()
