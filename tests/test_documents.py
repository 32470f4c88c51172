"""What README and the pages under docs/ show runs: Python on two processes, commands, and their output as it is shown.

Blocks of one page follow on one another. In the line that opens a block further words say how it runs: ``alone``, as a
script; with a file's name, by the page's command that names it; ``two machines``, not at all but for its options.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from tests.workers import Pools
from tp_planner.cli import app
from tp_planner.cli.run import torchrun_settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```(?P<language>\w+)(?: (?P<how>[^\n]*))?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#]+)?(?:#(?P<anchor>[^)]+))?\)")
NAMED = re.compile(r"`((?:tp_planner/|tests/)?[a-z_]+/[a-z_/]*(?:\.[a-z]+)?)`")
ANYTHING = "..."  # a line that stands for any number of lines of output


@dataclass(frozen=True, slots=True)
class Block:
    """One block of code; ``output`` is the text block that follows it."""

    page: str
    number: int
    language: str
    how: str
    text: str
    output: str = ""

    def __str__(self) -> str:
        return f"{self.page} {self.number}"


def blocks(page: str) -> Iterator[Block]:
    """Yield the blocks of a page that run, each with its output."""
    found = [(each["language"], each["how"] or "", each["text"]) for each in BLOCK.finditer((ROOT / page).read_text())]
    for number, (language, how, text) in enumerate(found):
        following = found[number + 1] if number + 1 < len(found) else ("", "", "")
        if language != "text":
            yield Block(page, number, language, how, text, following[2] if following[0] == "text" else "")


ALL = [block for page in PAGES for block in blocks(page)]
COMMANDS = [block for block in ALL if block.language == "shell"]
SCRIPTS = {block.how: block for block in ALL if block.how.endswith(".py")}
PYTHON = {
    page: [each.text for each in ALL if (each.page, each.language, each.how) == (page, "python", "")] for page in PAGES
}


def test_blocks_are_of_the_sorts_that_run() -> None:
    assert {block.language for block in ALL} <= {"python", "shell"}
    assert {block.how for block in ALL} <= {"", "alone", "two machines", *SCRIPTS}


# On the ranks


def run_page(page: str, folder: Path) -> None:
    """Run the blocks of a page in a process of a job."""
    os.chdir(folder)
    namespace: dict[str, Any] = {"__name__": page}
    for number, text in enumerate(PYTHON[page]):
        exec(compile(text, f"{page}, Python block {number + 1}", "exec"), namespace)


# In the parent


@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON[page]])
def test_python_runs_on_two_processes(pools: Pools, page: str, tmp_path: Path) -> None:
    pools(2).run(run_page, page, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in ALL if block.how == "alone"], ids=str)
def test_scripts_run_alone(block: Block, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(block.text)
    run_process([sys.executable, "script.py"], tmp_path)


@pytest.mark.parametrize(
    ("block", "line"),
    [
        pytest.param(block, line, marks=[pytest.mark.slow] * ("tp-planner run" in line))
        for block in COMMANDS
        for line in block.text.splitlines()
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_commands_run(block: Block, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(line)
    assert program == "tp-planner"
    monkeypatch.chdir(tmp_path)
    script = next((name for name in SCRIPTS if name in arguments), None)
    if block.how == "two machines":
        options = dict(zip(arguments[1:-1:2], arguments[2::2], strict=False))
        with mock.patch("torch.cuda.device_count", return_value=8):
            torchrun_settings(
                None, int(options["--nodes"]), int(options["--node-rank"]), options["--master-addr"], 29500
            )
    elif script is not None:
        (tmp_path / script).write_text(SCRIPTS[script].text)
        run_process([sys.executable, "-m", "tp_planner.cli", *arguments], tmp_path)
    else:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code in (0, 1), done.output  # 1: lint has found something
        if block.output:
            assert shows(block.output, done.stdout)


def run_process(command: list[str], folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def shows(shown: str, output: str) -> bool:
    """Whether the output is what is shown, any number of lines standing where ``...`` does."""
    parts = [".*" if line == ANYTHING else re.escape(line) for line in shown.splitlines()]
    pattern = "\n".join(parts).replace("\n.*\n", "\n(?:.*\n)?").removesuffix("\n.*")
    open_end = shown.splitlines()[-1] == ANYTHING
    return re.match(pattern + ("" if open_end else "\n*$"), output, re.DOTALL) is not None


@pytest.mark.parametrize(
    ("shown", "output", "expected"),
    [
        ("a\n...\nc\n", "a\nb\nb\nc\n", True),
        ("a\n...\nc\n", "a\nc\n", True),
        ("a\n...\n", "a\nb\n", True),
        ("a\n", "a\nb\n", False),
        ("a\n...\nd\n", "a\nb\nc\n", False),
        ("b\n...\n", "a\nb\n", False),
    ],
)
def test_output_is_compared(shown: str, output: str, expected: bool) -> None:
    assert shows(shown, output) == expected


@pytest.mark.parametrize("page", [*PAGES, "ARCHITECTURE.md", "plans/README.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    for link in LINK.finditer((ROOT / page).read_text()):
        target = (ROOT / page).parent / (link["path"] or Path(page).name)
        assert target.exists(), link[0]
        if link["anchor"]:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert link["anchor"] in {title.lower().replace(" ", "-") for title in titles}, link[0]


def test_files_that_the_architecture_names_exist() -> None:
    """Files of the package by their path in it, of other folders by that in the repository."""
    named = set(NAMED.findall((ROOT / "ARCHITECTURE.md").read_text()))
    assert len(named) > 40
    assert [
        name for name in sorted(named) if not any((root / name).exists() for root in (ROOT, ROOT / "tp_planner"))
    ] == []
