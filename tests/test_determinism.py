"""Equal models have byte-identical plans, in every process, with every hash seed, and however often they are made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import keras_hub
import pytest

from tests.models import CASES
from tp_planner.frontend.layout_file import find_layout_file, read_layout_file
from tp_planner.ir.mesh import parse_mesh
from tp_planner.planner import make_plan

ROOT = Path(__file__).resolve().parents[1]


def hub_llama() -> keras.Model:
    with keras.device("meta"):
        return keras_hub.models.LlamaBackbone(
            vocabulary_size=64,
            num_layers=3,
            num_query_heads=4,
            num_key_value_heads=2,
            hidden_dim=16,
            intermediate_dim=32,
            dtype="bfloat16",
            name="llama_backbone",
        )


MODELS: dict[str, tuple[Callable[[], keras.Model], str]] = {
    "hub_llama": (hub_llama, "llama"),
}


def plan(build: Callable[[], keras.Model], preset: str, mesh: str = "model=2") -> str:
    keras.utils.clear_session()  # numbers automatic names as in a new process
    layout = read_layout_file(find_layout_file(preset)).on(parse_mesh(mesh))
    return make_plan(build(), layout, optimizer=keras.optimizers.Adam()).to_json()


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The plan of each model that a new process makes in another folder, with its simulated step."""
    script = "import json, sys; from tests.test_determinism import *; "
    script += "json.dump({name: plan(*MODELS[name]) for name in MODELS}, sys.stdout)"
    environment = os.environ | {"PYTHONHASHSEED": "4242", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plans: dict[str, str] = json.loads(done.stdout)
    return plans


@pytest.mark.parametrize("name", MODELS)
def test_plans_are_equal_byte_for_byte(fresh: dict[str, str], name: str) -> None:
    """Neither hash seeds, nor what a process planned before, nor the folder it runs in are in a plan."""
    plan(CASES["mlp"].build, "mlp", "batch=1,model=4")
    first, second = plan(*MODELS[name]), plan(*MODELS[name])
    assert first == second == fresh[name]
    assert json.loads(first)["step"]["optimizer"] == "Adam"
    assert str(ROOT) not in first
    assert "elsewhere" not in fresh[name]
