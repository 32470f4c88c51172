"""Rules: a layout as short as a person would write it.

Numbers of blocks become ``[0-9]+``, siblings ``(query|key|value)``, and of a path only as much stands as tells it from
others. Each rule is checked: it matches the variables that it is for, and no other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from tp_planner.ir.layout import AxisSpec, LayoutRule
from tp_planner.ir.placement import Shard
from tp_planner.passes.check_rules import matching_rules

Segments = tuple[str, ...]
_NUMBER = "[0-9]+"
_ANYWHERE = "(.*/)?"


def write_rules(
    placed: Mapping[str, tuple[AxisSpec, ...]], paths: Sequence[str], most: int = 8
) -> tuple[LayoutRule, ...]:
    """Return rules that give each path in ``placed`` its axes, and match no other of ``paths``.

    Args:
        placed: axes by the paths of the variables that are sharded.
        paths: all paths that rules can match.
        most: how many siblings one rule names.

    >>> write_rules({"a_0/up/kernel": (None, "model"), "a_1/up/kernel": (None, "model")}, ["a_0/up/kernel",
    ...     "a_1/up/kernel", "a_0/down/kernel", "a_1/down/kernel"])[0].pattern
    '(.*/)?up/kernel'
    """
    rules: list[LayoutRule] = []
    for axes in dict.fromkeys(placed.values()):
        wanted = [path for path, each in placed.items() if each == axes]
        for pattern in _patterns(wanted, paths, most):
            rules.append(LayoutRule(pattern, axes))
    if any(_said(rules, path) != ([placed[path]] if path in placed else []) for path in paths):
        return tuple(LayoutRule(escaped(path), axes) for path, axes in placed.items())
    return tuple(rules)


def _said(rules: Sequence[LayoutRule], path: str) -> list[tuple[AxisSpec, ...]]:
    """Return what rules say of a path: one thing, if they are a layout."""
    return [rule.axes for rule in matching_rules(rules, path)]


def escaped(text: str) -> str:
    """Return the pattern of this text: ``re.escape``, but for characters that mean nothing in patterns."""
    return re.sub(r"([.^$*+?{}\[\]\\|()])", r"\\\1", text)


def axes_of(placement: Shard, ndim: int, axis: str) -> tuple[AxisSpec, ...]:
    """Return a rule's entries for a variable of ``ndim`` dims that is sharded over ``axis``."""
    return tuple(axis if dim == placement.dim else None for dim in range(ndim))


def _patterns(wanted: Sequence[str], paths: Sequence[str], most: int) -> Iterator[str]:
    """Yield the patterns for paths of equal axes."""
    own = set(wanted)
    others = [path for path in dict.fromkeys(paths) if path not in own]
    starred: dict[Segments, list[str]] = {}
    for path in wanted:
        starred.setdefault(tuple(_with_any_number(each) for each in path.split("/")), []).append(path)
    groups: list[Segments] = []
    for segments, members in starred.items():
        if _matches_any("/".join(segments), others):
            groups += [tuple(map(escaped, path.split("/"))) for path in members]
        else:
            groups.append(segments)
    left = list(wanted)
    for segments in _with_siblings([_shortened(each, others) for each in groups], others, most):
        pattern = "/".join(segments).replace(f"{_ANYWHERE}/", _ANYWHERE)
        covered = list(filter(_matching(pattern), left))
        if covered:
            gone = set(covered)
            left = [path for path in left if path not in gone]
            yield covered[0] if len(covered) == 1 and _is_simpler(covered[0], pattern, others) else pattern


def _is_simpler(path: str, pattern: str, others: Sequence[str]) -> bool:
    """Whether the path itself can stand for the pattern: it is as short, and as a pattern matches no other."""
    return len(path) <= len(pattern) and not _matches_any(path, others)


def _with_any_number(segment: str) -> str:
    return re.sub(r"\d+", _NUMBER, escaped(segment))


def _matching(pattern: str) -> Callable[[str], object]:
    """Return what is true of the paths that a pattern matches."""
    return re.compile(pattern.replace(f"{_ANYWHERE}/", _ANYWHERE)).fullmatch


def _matches_any(pattern: str, paths: Iterable[str]) -> bool:
    return any(map(_matching(pattern), paths))


def _shortened(segments: Segments, others: Sequence[str]) -> Segments:
    """Return the shortest end of a path, two names or more, that no other path has."""
    for length in range(min(2, len(segments)), len(segments)):
        short = (_ANYWHERE, *segments[-length:])
        if not _matches_any("/".join(short), others):
            return short
    return segments


def _with_siblings(groups: Sequence[Segments], others: Sequence[str], most: int) -> list[Segments]:
    """Return the patterns with those as one that differ in a single name."""
    merged = list(dict.fromkeys(groups))
    position = 0
    while position < len(merged):
        longest = len(merged[position])
        for place in reversed(range(longest)):
            siblings = [each for each in merged if _differ_only_at(each, merged[position], place)]
            names = list(dict.fromkeys(each[place] for each in siblings))
            one = (*merged[position][:place], f"({'|'.join(names)})", *merged[position][place + 1 :])
            fits = 1 < len(siblings) <= most and _ANYWHERE not in names and not any("(" in name for name in names)
            if fits and not _matches_any("/".join(one), others):
                merged = [one if each == merged[position] else each for each in merged if each not in siblings[1:]]
                break
        position += 1
    return merged


def _differ_only_at(one: Segments, other: Segments, place: int) -> bool:
    return len(one) == len(other) and one[:place] == other[:place] and one[place + 1 :] == other[place + 1 :]
