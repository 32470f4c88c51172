"""Hardware profiles are read whole or refused with every problem in them; those of the package say their sources."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from tp_planner.frontend import hardware_file
from tp_planner.frontend.hardware_file import find_hardware_file, list_hardware, read_hardware_file
from tp_planner.ir.errors import PlanError
from tp_planner.ir.hardware import Figure, FigureRange, Hardware

PROFILES = ["a100", "cpu", "h100", "h200"]

GOOD = """\
name = "own"
matmul_rate.float32 = { value = 2e12, source = "a" }
matmul_rate.bfloat16 = { value = 4_000_000_000_000, source = "b" }
matmul_efficiency = { value = [0.5, 1], source = "c" }
memory_size = { value = 8e9, source = "d" }
memory_bandwidth = { value = 1e12, source = "e" }
memory_efficiency = { value = [0.25, 0.5], source = "f" }
link_bandwidth = { value = 1e11, source = "g" }
link_efficiency = { value = [0.5, 0.8], source = "h" }
collective_latency = { value = [1e-6, 2e-6], source = "i" }
ring_step_latency = { value = [1e-7, 2e-7], source = "j" }
launch_overhead = { value = [1e-6, 1e-5], source = "k" }
node_size = { value = 4, source = "l" }
node_bandwidth = { value = 1e10, source = "m" }
node_efficiency = { value = [0.25, 1], source = "n" }
node_step_latency = { value = [1e-6, 2e-6], source = "o" }
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "own.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(PlanError) as caught:
        call()
    return str(caught.value)


def test_reads_every_figure_with_its_source(tmp_path: Path) -> None:
    """Rates are in order of their dtypes; integers and floats are both numbers."""
    assert read_hardware_file(write(tmp_path, GOOD)) == Hardware(
        name="own",
        matmul_rate=(("bfloat16", Figure(4e12, "b")), ("float32", Figure(2e12, "a"))),
        matmul_efficiency=FigureRange(0.5, 1.0, "c"),
        memory_size=Figure(8e9, "d"),
        memory_bandwidth=Figure(1e12, "e"),
        memory_efficiency=FigureRange(0.25, 0.5, "f"),
        link_bandwidth=Figure(1e11, "g"),
        link_efficiency=FigureRange(0.5, 0.8, "h"),
        collective_latency=FigureRange(1e-6, 2e-6, "i"),
        ring_step_latency=FigureRange(1e-7, 2e-7, "j"),
        launch_overhead=FigureRange(1e-6, 1e-5, "k"),
        node_size=Figure(4.0, "l"),
        node_bandwidth=Figure(1e10, "m"),
        node_efficiency=FigureRange(0.25, 1.0, "n"),
        node_step_latency=FigureRange(1e-6, 2e-6, "o"),
    )


# A line of the good profile, what stands there instead, and what is said about it.
ONE_PROBLEM: dict[str, tuple[str, str, str]] = {
    "missing name": ('name = "own"', "", "name: missing; write a string"),
    "name of another type": ('"own"', "1", "name: expected a string, got 1"),
    "another device": ('name = "own"', 'name = "own"\ndevice = "tpu"', "device: expected 'cpu' or 'cuda', got \"tpu\""),
    "unknown key": ('name = "own"', 'name = "own"\nnode = 1', "node: unknown key; closest: 'node_size'"),
    "missing figure": (
        'memory_size = { value = 8e9, source = "d" }',
        "",
        "memory_size: missing; write a table with a value and a source",
    ),
    "bare figure": (
        '{ value = 8e9, source = "d" }',
        "8e9",
        "memory_size: expected a table with a value and a source, got 8000000000.0",
    ),
    "missing value": ("value = 8e9, ", "", "memory_size.value: missing; write a positive number"),
    "text for a number": ("8e9", '"8 GB"', 'memory_size.value: expected a positive number, got "8 GB"'),
    "truth for a number": ("8e9", "true", "memory_size.value: expected a positive number, got true"),
    "nothing": ("8e9", "0", "memory_size.value: expected a positive number, got 0"),
    "infinity": ("8e9", "inf", "memory_size.value: expected a positive number, got inf"),
    "no number": ("8e9", "nan", "memory_size.value: expected a positive number, got nan"),
    "missing source": (
        ', source = "d"',
        "",
        "memory_size.source: missing; write where the figure is from, as a string",
    ),
    "empty source": ('"d"', '""', 'memory_size.source: expected where the figure is from, as a string, got ""'),
    "unknown key of a figure": (
        "value = 8e9",
        'value = 8e9, unit = "B"',
        "memory_size.unit: unknown key; known keys: value, source",
    ),
    "number for a range": (
        "[0.5, 0.8]",
        "0.8",
        "link_efficiency.value: expected two positive numbers, [low, high], got 0.8",
    ),
    "range of three": (
        "[0.5, 0.8]",
        "[0.5, 0.8, 0.9]",
        "link_efficiency.value: expected two positive numbers, [low, high], got [0.5, 0.8, 0.9]",
    ),
    "range with a text": (
        "[0.5, 0.8]",
        '[0.5, "0.8"]',
        'link_efficiency.value: expected two positive numbers, [low, high], got [0.5, "0.8"]',
    ),
    "backward range": (
        "[0.5, 0.8]",
        "[0.8, 0.5]",
        "link_efficiency.value: the low end 0.8 is above the high end 0.5; swap the two",
    ),
    "percent": ("[0.5, 0.8]", "[0.5, 80]", "link_efficiency.value: 80 is above 1; write a fraction of the peak"),
    "unknown dtype": (
        "matmul_rate.bfloat16",
        "matmul_rate.bf16",
        "matmul_rate.bf16: unknown key; closest: 'bfloat16'",
    ),
    "rate without a dtype": (
        'matmul_rate.float32 = { value = 2e12, source = "a" }\n'
        'matmul_rate.bfloat16 = { value = 4_000_000_000_000, source = "b" }',
        "matmul_rate = 2e12",
        "matmul_rate: expected a table for each dtype, headed for example [matmul_rate.bfloat16], got 2000000000000.0",
    ),
    "not TOML": ('name = "own"', "name", "not valid TOML: {error}; correct the syntax there"),
}


@pytest.mark.parametrize(("line", "instead", "message"), ONE_PROBLEM.values(), ids=ONE_PROBLEM)
def test_a_problem_is_reported_with_its_place_and_what_to_do(
    tmp_path: Path, line: str, instead: str, message: str
) -> None:
    """The message starts with the file and the path of keys in it."""
    assert line in GOOD
    path = write(tmp_path, GOOD.replace(line, instead))

    found = refusal(lambda: read_hardware_file(path))

    expected = re.escape(f"{path}: {message}").replace(re.escape("{error}"), ".*")
    assert re.fullmatch(expected, found)


def test_all_problems_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    """An empty profile is told everything that it needs."""
    path = write(tmp_path, "")

    lines = refusal(lambda: read_hardware_file(path)).splitlines()

    needed = [field.name for field in fields(Hardware) if field.default is MISSING]
    assert lines[0] == f"{len(needed)} problems:"
    assert [line.split(": ")[1] for line in lines[1:]] == needed


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """A missing file, a folder and another encoding each have their own message."""
    latin = tmp_path / "latin.toml"
    latin.write_bytes('name = "Gr\xfcn"'.encode("latin-1"))
    unreadable = "give the path of a hardware profile"

    assert [refusal(lambda path=path: read_hardware_file(path)) for path in (tmp_path / "no", tmp_path, latin)] == [
        f"{tmp_path / 'no'}: cannot be read (No such file or directory); {unreadable}",
        f"{tmp_path}: cannot be read (Is a directory); {unreadable}",
        f"{latin}: not UTF-8 text at byte 10; save the file as UTF-8",
    ]


def test_profile_is_found_by_name_and_a_file_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An existing path is taken as it is, even where a profile has the same name."""
    monkeypatch.chdir(tmp_path)
    assert find_hardware_file("h100") == list_hardware()["h100"]
    Path("h100").write_text(GOOD, encoding="utf-8")
    assert find_hardware_file("h100") == Path("h100")


def test_packaged_profiles_go_before_those_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel has its own profiles; a folder that is missing is passed over."""
    packaged, beside = tmp_path / "hardware", tmp_path / "plans"
    for folder, names in ((packaged, ("b",)), (beside, ("b", "a"))):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.toml").write_text(GOOD, encoding="utf-8")
    monkeypatch.setattr(hardware_file, "_PROFILE_FOLDERS", (tmp_path / "missing", packaged, beside))

    assert list_hardware() == {"a": beside / "a.toml", "b": packaged / "b.toml"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("H100", "'H100' is neither a file nor a hardware profile; closest profile: 'h100'; profiles: "),
        ("my/h20.toml", "'my/h20.toml' is neither a file nor a hardware profile; closest profile: 'h200'; profiles: "),
        ("resnet", "'resnet' is neither a file nor a hardware profile; profiles: "),
    ],
)
def test_unknown_name_lists_the_profiles(name: str, message: str) -> None:
    """The closest profile is named where one is close."""
    assert refusal(lambda: find_hardware_file(name)) == message + ", ".join(PROFILES)


def test_installation_without_profiles_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to choose from, so the next step is a path."""
    monkeypatch.setattr(hardware_file, "_PROFILE_FOLDERS", ())

    assert refusal(lambda: find_hardware_file("h100")) == (
        "'h100' is neither a file nor a hardware profile; no profiles are installed: give the path of a profile"
    )


def test_profiles_of_the_package_are_sound() -> None:
    """They are found in order of their names, and narrower dtypes are not slower."""
    profiles = {name: read_hardware_file(path) for name, path in list_hardware().items()}

    assert list(profiles) == PROFILES
    for hardware in profiles.values():
        rates = {dtype: figure.value for dtype, figure in hardware.matmul_rate}
        assert rates["bfloat16"] >= rates["float32"] >= rates["float64"]
