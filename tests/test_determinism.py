"""Equal models have byte-identical plans, in every process, with every hash seed, and however often they are made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("encoder", "hub_llama")

# Writes the plan of each model, with its simulated step. An experienced process plans another model first, and each
# of these twice.
SCRIPT = """
import json
import sys

import keras
import keras_hub

from tests.models import CASES
from tp_planner.frontend.layout_file import find_layout_file, read_layout_file
from tp_planner.ir.mesh import parse_mesh
from tp_planner.planner import make_plan

def hub_llama():
    with keras.device("meta"):
        return keras_hub.models.LlamaBackbone(
            vocabulary_size=64, num_layers=3, num_query_heads=4, num_key_value_heads=2, hidden_dim=16,
            intermediate_dim=32, dtype="bfloat16", name="llama_backbone",
        )

def plan(build, preset, mesh="model=2"):
    keras.utils.clear_session()  # numbers automatic names as in a new process
    layout = read_layout_file(find_layout_file(preset)).on(parse_mesh(mesh))
    return make_plan(build(), layout, optimizer=keras.optimizers.Adam()).to_json()

experienced = sys.argv[1] == "experienced"
if experienced:
    plan(CASES["mlp"].build, "mlp", "batch=1,model=4")
plans = {}
for name, build, preset in (("encoder", CASES["encoder"].build, "encoder"), ("hub_llama", hub_llama, "llama")):
    plans[name] = plan(build, preset)
    if experienced:
        assert plan(build, preset) == plans[name], f"the second plan of {name} in a process differs from the first"
json.dump(plans, sys.stdout)
"""


@cache
def plans_of_process(history: str, seed: str, folder: Path) -> dict[str, str]:
    """Return the plan of each model that a new process makes in a folder."""
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, history]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    plans: dict[str, str] = json.loads(done.stdout)
    return plans


@pytest.mark.parametrize("model", MODELS)
def test_plans_are_equal_byte_for_byte(model: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Neither hash seeds, nor what a process planned before, nor the folder it runs in are in a plan."""
    folder = tmp_path_factory.getbasetemp()
    fresh = plans_of_process("fresh", "0", folder)[model]
    assert fresh == plans_of_process("experienced", "4242", ROOT)[model]
    assert json.loads(fresh)["step"]["optimizer"] == "Adam"
    assert str(folder) not in fresh
    assert str(ROOT) not in fresh
