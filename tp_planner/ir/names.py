"""Names folded for reading: layers that differ in a number only are named once, ``block_[0-11]/up``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_NUMBER = re.compile(r"(?<!\d)(0|[1-9]\d*)(?!\d)")


@dataclass(frozen=True, slots=True)
class FoldedName:
    """One or more names with the same texts: between two texts stands each of some numbers."""

    texts: tuple[str, ...]
    numbers: tuple[tuple[int, ...], ...]
    members: tuple[str, ...]

    def __str__(self) -> str:
        shown = [*map(_ranges, self.numbers), ""]
        return "".join(text + number for text, number in zip(self.texts, shown, strict=True))


def fold_names(names: Iterable[str]) -> list[FoldedName]:
    """Return the names in order of first appearance, those that differ in numbers only folded into one.

    >>> [str(name) for name in fold_names(["block_0/up", "block_0/down", "block_1/up", "block_1/down", "head"])]
    ['block_[0-1]/up', 'block_[0-1]/down', 'head']
    """
    folded = [_split(name) for name in dict.fromkeys(names)]
    for position in range(max((len(name.numbers) for name in folded), default=0)):
        folded = _fold_position(folded, position)
    return folded


def without_numbers_of(name: str, text: str) -> str:
    """Return ``text`` with the numbered words of ``name`` starred, so that equal layers have equal texts.

    >>> without_numbers_of("block_3/up", "'block_3/up/kernel' of shape (3, 5)")
    "'block_*/up/kernel' of shape (3, 5)"
    """
    for word, number in re.findall(r"([A-Za-z_]+)(\d+)", name):
        text = re.sub(rf"\b{re.escape(word)}{number}(?!\d)", f"{word}*", text)
    return text


def _split(name: str) -> FoldedName:
    parts = _NUMBER.split(name)
    return FoldedName(tuple(parts[::2]), tuple((int(part),) for part in parts[1::2]), (name,))


def _fold_position(names: Iterable[FoldedName], position: int) -> list[FoldedName]:
    """Unite the names that are equal but for the numbers at ``position``."""
    folded: dict[object, FoldedName] = {}
    for name in names:
        numbers = name.numbers
        key = (name.texts, numbers[:position], numbers[position + 1 :])
        known = folded.get(key)
        if known is None:
            folded[key] = name
        else:
            united = (*numbers[:position], known.numbers[position] + numbers[position], *numbers[position + 1 :])
            folded[key] = FoldedName(name.texts, united, known.members + name.members)
    return list(folded.values())


def _ranges(numbers: tuple[int, ...]) -> str:
    """Return ``7`` for one number, ``[0-2,4]`` for more."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return "[" + ",".join(f"{first}-{last}" if first < last else str(first) for first, last in runs) + "]"
