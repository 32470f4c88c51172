"""``tp-planner verify``: what it says and writes, and what it exits with."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.test_cli import run, shop
from tests.verification.faults import at, dropped
from tp_planner.ir.placement import Partial, Replicate

__all__ = ["shop"]  # the fixture
COMMAND = ("verify", "shop:pair", "--layout", "mlp", "--mesh", "model=2")


def test_a_right_model(shop: Path) -> None:
    """The exit code is 0; JSON has every tensor, the page the layers with their differences."""
    code, stdout, _ = run(*COMMAND, "--json", "--html", "verdict.html")
    data = json.loads(stdout)
    assert (code, data["same"], data["begins"]) == (0, True, None)
    assert {each["is"] for each in data["tensors"]} <= {"equal", "rounding"}
    page = (shop / "verdict.html").read_text()
    assert '<section id="verdict" class="right">' in page
    assert "differs by" in page


def test_a_wrong_model(shop: Path) -> None:
    """The exit code is 1, and the layer is named; on the page it is marked."""
    with at("down", Partial, Replicate, dropped)():
        code, stdout, _ = run(*COMMAND, "--html", "verdict.html")
    assert code == 1
    assert "'pair' on mesh (model=2) is NOT the function it is on one device" in stdout
    assert "it begins to differ at 'down'" in stdout
    assert '<section id="verdict" class="wrong">' in (shop / "verdict.html").read_text()


def test_mistakes(shop: Path) -> None:
    code, _, stderr = run(*COMMAND, "--scale", "3")
    assert code == 2
    assert "model 'pair' cannot be scaled down: its configuration has no sizes such as hidden_dim that" in stderr
