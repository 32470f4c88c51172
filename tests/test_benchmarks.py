"""What benchmarks make of what they measure: pages of results, and what counts as communication of a block."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a script by its name, as scripts beside it do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_pages_say_what_the_figures_beside_them_say(script: Callable[[str], ModuleType]) -> None:
    page = script("page")
    folders = [each.parent for each in BENCHMARKS.glob("results/*/bench.json")]
    assert folders
    for folder in folders:
        assert (folder / "README.md").read_text().splitlines() == "\n".join(page.page(page.read(folder))).splitlines()


@pytest.mark.slow
def test_communication_is_told_apart_by_blocks(script: Callable[[str], ModuleType]) -> None:
    """Whisper has layers in front of its blocks that are named like blocks, and cross-attention."""
    row = script("communication").measure("whisper", 2)
    assert row["blocks"] == 4
    assert row["inside"]["sent_bytes"] == row["formula"]["sent_bytes"]
    assert [each["layer"] for each in row["outside_layers"]] == ["transformer_decoder_layer_0/cross_attention/key"]
