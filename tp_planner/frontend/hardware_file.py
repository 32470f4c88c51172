"""Hardware profiles: TOML documents of a device's figures, and those that come with the package."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from tp_planner.ir.errors import PlanError
from tp_planner.ir.hardware import Figure, FigureRange, Hardware
from tp_planner.ir.layout import DeviceType

_PACKAGE = Path(__file__).resolve().parent.parent
# A wheel carries the profiles inside the package; a source tree has them beside it.
_PROFILE_FOLDERS = (_PACKAGE / "hardware", _PACKAGE.parent / "plans" / "hardware")

_KEYS = tuple(field.name for field in fields(Hardware))
_FIGURE_KEYS = ("value", "source")
_FRACTIONS = ("matmul_efficiency", "memory_efficiency", "link_efficiency", "node_efficiency")
# Names of torch dtypes that a rate can be given for.
_DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int32", "int64")


def read_hardware_file(path: str | Path) -> Hardware:
    """Return the hardware profile at ``path``; the files in ``plans/hardware`` say what each key means.

    Raises PlanError with every problem of the file, each with the file and the place in it: the file is missing,
    unreadable or not TOML, a key is unknown or missing, a value is no positive number, a range runs backwards, a
    fraction is above 1, a source is missing.

    >>> read_hardware_file(find_hardware_file("h100")).name
    'NVIDIA H100 SXM, 80 GB'
    """
    reader = _Reader(_load_toml(Path(path)), [])
    hardware = reader.hardware()
    if reader.problems:
        raise PlanError(f"{path}: {problem}" for problem in reader.problems)
    return hardware


def find_hardware_file(name_or_path: str | Path) -> Path:
    """Return ``name_or_path`` where it is a file, else the file of the profile of that name, e.g. ``h100``.

    Profiles are looked up in the package first and then in ``plans/hardware`` beside it.
    Raises PlanError, with the profiles there are and the closest of them, where it is neither.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    profiles = list_hardware()
    profile = profiles.get(str(name_or_path))
    if profile is None:
        closest = _closest(path.stem, profiles)
        raise PlanError(f"{str(name_or_path)!r} is neither a file nor a hardware profile; {closest}")
    return profile


def list_hardware() -> dict[str, Path]:
    """Return the file of every hardware profile by its name, sorted by name."""
    found: dict[str, Path] = {}
    for folder in _PROFILE_FOLDERS:
        for path in folder.glob("*.toml"):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def _closest(name: str, profiles: Iterable[str]) -> str:
    names = list(profiles)
    if not names:
        return "no profiles are installed: give the path of a profile"
    close = get_close_matches(name.lower(), names, n=1)
    return (f"closest profile: {close[0]!r}; " if close else "") + f"profiles: {', '.join(names)}"


def _load_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: cannot be read ({error.strerror}); give the path of a hardware profile") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"{path}: not valid TOML: {error}; correct the syntax there") from error


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the values of one document; what is wrong with them is added to ``problems``."""

    document: Mapping[str, object]
    problems: list[str]

    def hardware(self) -> Hardware:
        self._check_keys(self.document, _KEYS, "")
        return Hardware(
            name=self._text(self.document, "name", ""),
            matmul_rate=self._rates(),
            matmul_efficiency=self._range("matmul_efficiency"),
            memory_size=self._figure("memory_size"),
            memory_bandwidth=self._figure("memory_bandwidth"),
            memory_efficiency=self._range("memory_efficiency"),
            link_bandwidth=self._figure("link_bandwidth"),
            link_efficiency=self._range("link_efficiency"),
            collective_latency=self._range("collective_latency"),
            ring_step_latency=self._range("ring_step_latency"),
            launch_overhead=self._range("launch_overhead"),
            node_size=self._figure("node_size"),
            node_bandwidth=self._figure("node_bandwidth"),
            node_efficiency=self._range("node_efficiency"),
            node_step_latency=self._range("node_step_latency"),
            device=self._device(),
        )

    def _device(self) -> DeviceType:
        match self.document.get("device", "cpu"):
            case "cpu" | "cuda" as device:
                return device
            case other:
                self._report("device", other, "'cpu' or 'cuda'")
                return "cpu"

    def _rates(self) -> tuple[tuple[str, Figure], ...]:
        table = self.document.get("matmul_rate")
        if not isinstance(table, dict) or not table:
            self._report("matmul_rate", table, "a table for each dtype, headed for example [matmul_rate.bfloat16]")
            return ()
        self._check_keys(table, _DTYPES, "matmul_rate.")
        return tuple((dtype, self._figure_of(table[dtype], f"matmul_rate.{dtype}")) for dtype in sorted(table))

    def _figure(self, key: str) -> Figure:
        return self._figure_of(self.document.get(key), key)

    def _figure_of(self, table: object, place: str) -> Figure:
        if not isinstance(table, dict):
            self._report(place, table, "a table with a value and a source")
            return Figure(1.0, "")
        self._check_keys(table, _FIGURE_KEYS, f"{place}.")
        value = _positive(table.get("value"))
        if value is None:
            self._report(f"{place}.value", table.get("value"), "a positive number")
        return Figure(value or 1.0, self._text(table, "source", f"{place}."))

    def _range(self, key: str) -> FigureRange:
        table = self.document.get(key)
        if not isinstance(table, dict):
            self._report(key, table, "a table with a value and a source")
            return FigureRange(1.0, 1.0, "")
        self._check_keys(table, _FIGURE_KEYS, f"{key}.")
        source = self._text(table, "source", f"{key}.")
        low, high = _positive_pair(table.get("value"))
        if low is None or high is None:
            self._report(f"{key}.value", table.get("value"), "two positive numbers, [low, high]")
            return FigureRange(1.0, 1.0, source)
        if low > high:
            self.problems.append(f"{key}.value: the low end {low:g} is above the high end {high:g}; swap the two")
        if key in _FRACTIONS and high > 1:
            self.problems.append(f"{key}.value: {high:g} is above 1; write a fraction of the peak")
        return FigureRange(low, high, source)

    def _text(self, table: Mapping[str, object], key: str, prefix: str) -> str:
        value = table.get(key)
        if isinstance(value, str) and value:
            return value
        self._report(f"{prefix}{key}", value, "where the figure is from, as a string" if prefix else "a string")
        return ""

    def _report(self, place: str, value: object, expected: str) -> None:
        if value is None:
            self.problems.append(f"{place}: missing; write {expected}")
        else:
            self.problems.append(f"{place}: expected {expected}, got {_shown(value)}")

    def _check_keys(self, table: Mapping[str, object], known: tuple[str, ...], prefix: str) -> None:
        for key in table:
            if key not in known:
                close = get_close_matches(key, known, n=1)
                hint = f"closest: {close[0]!r}" if close else f"known keys: {', '.join(known)}"
                self.problems.append(f"{prefix}{key}: unknown key; {hint}")


def _positive(value: object) -> float | None:
    """Return a positive, finite number as it is, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 < value < math.inf else None


def _positive_pair(value: object) -> tuple[float | None, float | None]:
    if not isinstance(value, list) or len(value) != 2:
        return None, None
    return _positive(value[0]), _positive(value[1])


def _shown(value: object) -> str:
    """Return ``value`` as it would stand in the file, for an error message."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return "a table" if isinstance(value, dict) else str(value)
