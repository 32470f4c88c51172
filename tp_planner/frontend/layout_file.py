"""Layout files: TOML documents of layout rules, and the presets that come with the package."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import AxisSpec, Layout, LayoutRule, Zero
from tp_planner.ir.mesh import Mesh

_PACKAGE = Path(__file__).resolve().parent.parent
# A wheel carries the presets inside the package; a source tree has them beside it.
_PRESET_FOLDERS = (_PACKAGE / "presets", _PACKAGE.parent / "plans" / "presets")

_FILE_KEYS = ("name", "description", "sequence_parallel", "zero", "rules")
_RULE_KEYS = ("pattern", "axes")


@dataclass(frozen=True, slots=True)
class LayoutFile:
    """The content of one layout file: its name, what it is for, its rules in order, and what is to be in shards beside.

    That are streams, if ``sequence_parallel``, and what ``zero`` is the stage of.
    """

    name: str
    description: str
    rules: tuple[LayoutRule, ...]
    sequence_parallel: bool = False
    zero: Zero = 0

    def on(self, mesh: Mesh) -> Layout:
        """Return the rules as a layout for ``mesh``."""
        return Layout(mesh, self.rules, sequence_parallel=self.sequence_parallel, zero=self.zero)


def read_layout_file(path: str | Path) -> LayoutFile:
    """Return the layout file at ``path``; ``plans/README.md`` describes the format.

    Raises PlanError with every problem of the file, each with the file and the place in it:
    the file is missing, unreadable or not TOML, a key is unknown or missing, a value has the wrong
    type, a pattern is no regular expression or stands there twice.

    >>> read_layout_file(find_layout_file("gpt")).name
    'gpt'
    """
    document = _load_toml(Path(path))
    problems: list[str] = []
    _check_keys(document, _FILE_KEYS, "", problems)
    layout_file = LayoutFile(
        name=_read_text(document, "name", Path(path).stem, problems),
        description=_read_text(document, "description", "", problems),
        rules=_read_rules(document, problems),
        sequence_parallel=_read_bool(document, "sequence_parallel", problems),
        zero=_read_zero(document, problems),
    )
    if problems:
        raise PlanError(f"{path}: {problem}" for problem in problems)
    return layout_file


def find_layout_file(name_or_path: str | Path) -> Path:
    """Return ``name_or_path`` where it is a file, else the file of the preset of that name, e.g. ``gpt``.

    Presets are looked up in the package first and then in ``plans/presets`` beside it.
    Raises PlanError, with the presets there are and the closest of them, where it is neither.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    presets = list_presets()
    preset = presets.get(str(name_or_path))
    if preset is None:
        raise PlanError(f"{str(name_or_path)!r} is neither a file nor a preset; {_closest_preset(path.stem, presets)}")
    return preset


def list_presets() -> dict[str, Path]:
    """Return the file of every preset by its name, sorted by name."""
    found: dict[str, Path] = {}
    for folder in _PRESET_FOLDERS:
        for path in folder.glob("*.toml"):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def _closest_preset(name: str, presets: Iterable[str]) -> str:
    names = list(presets)
    if not names:
        return "no presets are installed: give the path of a layout file"
    close = get_close_matches(name, names, n=1)
    closest = f"closest preset: {close[0]!r}; " if close else ""
    return f"{closest}presets: {', '.join(names)}"


def _load_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(
            f"{path}: no such file; give the path of a layout file, "
            f"or the name of a preset to find_layout_file ({', '.join(list_presets())})"
        ) from None
    except OSError as error:
        raise PlanError(f"{path}: cannot be read ({error.strerror}); give a readable TOML file") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"{path}: not valid TOML: {error}; correct the syntax there") from error


def _read_text(document: Mapping[str, object], key: str, default: str, problems: list[str]) -> str:
    value = document.get(key, default)
    if isinstance(value, str):
        return value
    problems.append(f"{key}: expected a string, got {_shown(value)}")
    return default


def _read_bool(document: Mapping[str, object], key: str, problems: list[str]) -> bool:
    value = document.get(key, False)
    if isinstance(value, bool):
        return value
    problems.append(f"{key}: expected true or false, got {_shown(value)}")
    return False


def _read_zero(document: Mapping[str, object], problems: list[str]) -> Zero:
    match document.get("zero", 0):
        case 0 | 1 | 3 as stage if not isinstance(stage, bool | float):
            return stage
        case value:
            problems.append(f"zero: expected 0, 1 or 3, got {_shown(value)}")
            return 0


def _read_rules(document: Mapping[str, object], problems: list[str]) -> tuple[LayoutRule, ...]:
    tables = document.get("rules", [])
    if not isinstance(tables, list):
        problems.append(
            f"rules: expected an array of tables, got {_shown(tables)}; "
            f"head each rule with [[rules]], in double brackets"
        )
        return ()
    if not tables:
        problems.append("rules: no rule; add a [[rules]] table with a pattern and axes")
    rules: list[LayoutRule] = []
    places: dict[str, str] = {}
    for index, table in enumerate(tables):
        place = f"rules[{index}]"
        rule = _read_rule(table, place, problems)
        _check_duplicate(rule.pattern, place, places, problems)
        rules.append(rule)
    return tuple(rules)


def _read_rule(table: object, place: str, problems: list[str]) -> LayoutRule:
    if not isinstance(table, dict):
        problems.append(f"{place}: expected a table with a pattern and axes, got {_shown(table)}")
        return LayoutRule("", ())
    _check_keys(table, _RULE_KEYS, f"{place}.", problems)
    pattern = _read_pattern(table.get("pattern"), f"{place}.pattern", problems)
    return LayoutRule(pattern, _read_axes(table.get("axes"), f"{place}.axes", problems))


def _read_pattern(value: object, place: str, problems: list[str]) -> str:
    if value is None:
        problems.append(f'{place}: missing; write for example pattern = ".*up/kernel"')
        return ""
    if not isinstance(value, str) or not value:
        problems.append(f"{place}: expected a regular expression for variable paths, got {_shown(value)}")
        return ""
    try:
        re.compile(value)
    except re.error as error:
        problems.append(
            f"{place}: {value!r} is not a regular expression: {error}; "
            f"correct it, or escape the character with a backslash"
        )
    return value


def _check_duplicate(pattern: str, place: str, places: dict[str, str], problems: list[str]) -> None:
    if not pattern:
        return
    first = places.setdefault(pattern, place)
    if first != place:
        problems.append(f"{place}.pattern: {pattern!r} is the pattern of {first} too; remove one of them")


def _read_axes(value: object, place: str, problems: list[str]) -> tuple[AxisSpec, ...]:
    if value is None:
        problems.append(f'{place}: missing; write one entry per dim, for example axes = ["", "model"]')
        return ()
    if not isinstance(value, list):
        problems.append(f'{place}: expected a list with an axis name or "" per dim, got {_shown(value)}')
        return ()
    return tuple(_read_axis(entry, f"{place}[{dim}]", problems) for dim, entry in enumerate(value))


def _read_axis(value: object, place: str, problems: list[str]) -> AxisSpec:
    if isinstance(value, str):
        return value or None
    if not isinstance(value, list):
        problems.append(f'{place}: expected an axis name or "", got {_shown(value)}')
        return None
    if not value:
        problems.append(f'{place}: expected axis names, got []; write "" for a dim that is not sharded')
    return tuple(_read_axis_name(name, f"{place}[{index}]", problems) for index, name in enumerate(value))


def _read_axis_name(value: object, place: str, problems: list[str]) -> str:
    if isinstance(value, str) and value:
        return value
    problems.append(f"{place}: expected an axis name, got {_shown(value)}")
    return ""


def _check_keys(table: Mapping[str, object], known: tuple[str, ...], prefix: str, problems: list[str]) -> None:
    for key in table:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f"closest: {close[0]!r}" if close else f"known keys: {', '.join(known)}"
            problems.append(f"{prefix}{key}: unknown key; {hint}")


def _shown(value: object) -> str:
    """Return ``value`` as it would stand in the file, for an error message."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    return "a table" if isinstance(value, dict) else str(value)
