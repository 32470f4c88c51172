"""What a plan was made for without knowing: sizes that were guessed, said wherever a figure depends on them."""

from __future__ import annotations

from collections.abc import Sequence

from tp_planner.ir.plan import GuessedDim


def guess_lines(guessed: Sequence[GuessedDim]) -> list[str]:
    """Return a warning in two lines, none where nothing was guessed.

    >>> guess_lines([GuessedDim("ids", 0, 2), GuessedDim("mask", 0, 2), GuessedDim("ids", 1, 16)])[0]
    'GUESSED SIZES: batch 2 (dim 0 of ids, mask), 16 (dim 1 of ids)'
    """
    if not guessed:
        return []
    inputs: dict[tuple[int, int], list[str]] = {}
    for each in guessed:
        inputs.setdefault((each.dim, each.size), []).append(each.input)
    sizes = ", ".join(
        f"{'' if dim else 'batch '}{size} (dim {dim} of {', '.join(names)})" for (dim, size), names in inputs.items()
    )
    return [
        f"GUESSED SIZES: {sizes}",
        "memory and time are for these: plan with the sizes you train with (inputs=; --batch, --sequence or --input)",
    ]
