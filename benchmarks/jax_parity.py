"""Compare ``keras.distribution`` on JAX and on torch: one script, unchanged but for ``KERAS_BACKEND``, the same losses.

Runs ``one_script.py`` for each model on meshes of 1, 2 and 4 devices of both backends, batch axis first, and prints the
losses of the last step. JAX is looked for in ``.venv-jax``; where there is none, the comparison is skipped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "processes" / "one_script.py"
JAX = ROOT / ".venv-jax" / "bin" / "python"
MODELS = ("gpt", "llama", "gemma")
MESHES = ("1x1", "2x1", "1x2", "2x2", "1x4")
TOLERANCE = 1e-5  # relative, in float32


def main() -> int:
    """Return 0 if all losses agree, or JAX is absent."""
    if not JAX.exists():
        print(
            f"skipped: there is no JAX in {JAX.parents[1].name}; to compare, run\n"
            f"  python3 -m venv .venv-jax && .venv-jax/bin/pip install jax keras==3.15.1 regex kagglehub tokenizers "
            f"sentencepiece safetensors && .venv-jax/bin/pip install --no-deps keras-hub==0.32.0"
        )
        return 0
    print(f"{'model':8} {'mesh':6} {'backend':8} {'loss of step 5':>15} {'largest relative difference':>28}")
    return max(compare(model) for model in MODELS)


def compare(model: str) -> int:
    """Print the runs of one model; return 1 if a loss differs from that of one JAX device."""
    truth: Sequence[float] = ()
    worst = 0.0
    for mesh in MESHES:
        for backend, run in (("jax", on_jax), ("torch", on_torch)):
            losses = run(model, mesh)
            if not losses:
                print(f"{model:8} {mesh:6} {backend:8} refuses: the mesh does not divide a dim", flush=True)
                continue
            truth = truth or losses
            difference = max(abs(a - b) / abs(b) for a, b in zip(losses, truth, strict=True))
            worst = max(worst, difference)
            print(f"{model:8} {mesh:6} {backend:8} {losses[-1]:15.6f} {difference:28.1e}", flush=True)
    return int(not worst <= TOLERANCE)


def devices(mesh: str) -> int:
    rows, columns = mesh.split("x")
    return int(rows) * int(columns)


def on_jax(model: str, mesh: str) -> Sequence[float]:
    """Return the losses on that many host devices of one process; none where JAX refuses a dim that does not divide."""
    flags = {"KERAS_BACKEND": "jax", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices(mesh)}"}
    return losses_of([str(JAX), str(SCRIPT), model, mesh], {**flags, "JAX_PLATFORMS": "cpu"})


def on_torch(model: str, mesh: str) -> Sequence[float]:
    """Return the losses on that many processes."""
    launcher = [sys.executable, "-m", "tp_planner.cli", "run", "--devices", str(devices(mesh))]
    return losses_of([*launcher, str(SCRIPT), model, mesh], {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})


def losses_of(command: Sequence[str], settings: dict[str, str]) -> Sequence[float]:
    """Run the script and return its losses, which all its processes have to agree on; none if JAX refuses a dim."""
    environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "IndivisibleError" in run.stderr:
        return ()
    found = set(re.findall(r'{"losses".*?}', run.stdout))  # processes write into each other's lines
    if run.returncode or len(found) != 1:
        raise SystemExit(f"{' '.join(command)} ended with {run.returncode}:\n{run.stdout}\n{run.stderr}")
    losses: Sequence[float] = json.loads(found.pop())["losses"]
    return losses


if __name__ == "__main__":
    sys.exit(main())
