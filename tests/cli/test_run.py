"""``tp-planner run``: processes with keras.distribution enabled; what fails on one ends all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException

from tp_planner.cli import run
from tp_planner.ir.errors import PlanError

ROOT = Path(__file__).resolve().parents[2]
COUNT = "--nproc-per-node=2"


@pytest.mark.parametrize(
    ("arguments", "gpus", "expected"),
    [
        ((2, 1, 0, None, 29500), 0, ["--standalone", COUNT]),
        ((None, 1, 0, None, 29500), 2, ["--standalone", COUNT]),
        (
            (2, 2, 1, "10.0.0.1", 1234),
            8,
            ["--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=1234", COUNT],
        ),
        (
            (None, 1, 0, None, 29500),
            0,
            "this machine has no CUDA devices; give --devices, the number of processes on its CPU",
        ),
        (
            (4, 1, 0, None, 29500),
            2,
            "--devices is 4, this machine has 2 CUDA devices; one process needs one of them",
        ),
        ((2, 2, 2, "10.0.0.1", 29500), 0, "--node-rank is 2; of 2 machines it is 0 to 1"),
        (
            (2, 2, 0, None, 29500),
            0,
            "--nodes is 2; give --master-addr, the address of machine 0, on all of them",
        ),
    ],
)
def test_torchrun_settings(arguments: Any, gpus: int, expected: Any) -> None:
    with mock.patch("torch.cuda.device_count", return_value=gpus):
        try:
            found: Any = run.torchrun_settings(*arguments)
        except PlanError as error:
            found = str(error)
    assert found == expected


def test_a_job_that_is_interrupted_is_no_error_of_torch() -> None:
    """Who presses Ctrl-C reads one line, not where torch's launcher waited."""
    interrupt = SignalException("received", signal.SIGINT)
    with mock.patch("torch.distributed.run.run", side_effect=interrupt):
        said = run.launch(["--standalone", COUNT], ["module"], "train.py")
    assert said == "train.py was stopped by SIGINT; so were its processes"


SCRIPT = """
import os, sys, time
import keras

# At once, for the processes write to one pipe.
sys.stdout.write(f"has {keras.distribution.list_devices()} {sys.argv[1:]} {__name__}\\n")
sys.stdout.flush()
keras.distribution.initialize()
if os.environ["RANK"] == "1" and "fail" in sys.argv:
    print("dies", time.time(), flush=True)
    os.kill(os.getpid(), 9)
if "fail" in sys.argv:
    time.sleep(600)
"""


def start(script: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tp_planner.cli", "run", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, env=environment, cwd=script.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_a_process_that_dies_ends_the_others(script: Path) -> None:
    """The script needs no line of its own for torch; its arguments are its own, options too."""
    process = start(script, "--devices", "2", "train.py", "fail", "--devices", "3")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    seen = [line for line in out.splitlines() if not line.startswith("dies")]
    assert seen == ["has ['cpu:0', 'cpu:1'] ['fail', '--devices', '3'] __main__"] * 2
    assert err.splitlines()[-1] == (
        "error: rank 1 of train.py ended by signal 9; its output is above; the other processes were stopped"
    )


def test_a_script_that_is_not_there(script: Path) -> None:
    process = start(script, "--devices", "2", "trian.py")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err == "error: trian.py: no such file; give the path of a Python script\n"


# What the rank that lives is at when the other one dies, and what it then says.
COMMUNICATES = "keras.distribution.initialize()"
MEETS = "time.sleep(1); from tp_planner.job.rendezvous import meet; meet('saving')"
GONE = "saving: rank 1 has given no sign of life for 20 s; its process has ended, or its machine is out of reach"
NO_STORE = "saving: the store where ranks meet cannot be reached; the process that keeps it has ended"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dies", "does", "hears"),
    [(None, "pass", ""), (1, COMMUNICATES, "by peer"), (1, MEETS, GONE), (0, MEETS, NO_STORE)],
    ids=["well", "one communicates", "one waits for a rank", "one waits for machine 0"],
)
def test_two_machines(script: Path, dies: int | None, does: str, hears: str) -> None:
    """Two launchers on loopback are one job; within half a minute after a process of one dies, both have ended."""
    script.write_text(SCRIPT.replace('"1"', f'"{dies}"').replace("time.sleep(600)", does))
    arguments = () if dies is None else ("fail",)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # finds a free port
    port = str(store.port)
    del store
    machines = [
        start(
            script,
            *("--devices", "1", "--nodes", "2", "--node-rank", str(number)),
            *("--master-addr", "127.0.0.1", "--master-port", port, "train.py", *arguments),
        )
        for number in range(2)
    ]
    ended = [machine.communicate(timeout=120) for machine in machines]
    after = time.time()
    assert [machine.returncode for machine in machines] == ([0, 0] if dies is None else [1, 1])
    assert all("has ['cpu:0', 'cpu:1']" in out for out, _ in ended)
    if dies is not None:
        died = next(float(line.split()[1]) for line in ended[dies][0].splitlines() if line.startswith("dies"))
        assert after - died < 30
        assert hears in ended[1 - dies][1]


TRAINING = """
import json, os, signal, sys
import keras, numpy as np
import tp_planner

size = int(os.environ["WORLD_SIZE"])
mesh = keras.distribution.DeviceMesh((1, size), ("batch", "model"))
layouts = keras.distribution.LayoutMap(mesh)
layouts["up/kernel"] = (None, "model")
layouts["up/bias"] = ("model",)
layouts["down/kernel"] = ("model", None)
keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch"))
keras.utils.set_random_seed(0)
inputs = keras.Input((8,), name="x")
outputs = keras.layers.Dense(4, name="down")(keras.layers.Dense(16, activation="relu", name="up")(inputs))
model = keras.Model(inputs, outputs, name="net")
model.compile("adam", "mse")


class Killed(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and "killed" in sys.argv and os.environ["RANK"] == "1" and model.optimizer.iterations == 7:
            os.kill(os.getpid(), signal.SIGKILL)


rng = np.random.default_rng(0)
x, y = rng.standard_normal((16, 8)).astype("float32"), rng.standard_normal((16, 4)).astype("float32")
checkpoint = tp_planner.Checkpoint(sys.argv[1], every=2, keep=2)
history = model.fit(x, y, batch_size=4, epochs=int(sys.argv[2]), verbose=0, callbacks=[checkpoint, Killed()])
if os.environ["RANK"] == "0":
    with open(sys.argv[1] + ".json", "w") as file:
        json.dump(history.history["loss"], file)
"""


@pytest.mark.slow
def test_restarts_go_on_from_the_last_checkpoint(script: Path) -> None:
    """A rank that is killed in mid-step and mid-epoch costs a batch, no more; losses go on alike with fewer ranks."""
    script.write_text(TRAINING)
    runs = (
        ("undisturbed", "2", "0", 0, ()),
        ("restarted", "2", "1", 0, ("killed",)),
        ("elastic", "4", "0", 1, ("killed",)),
        ("elastic", "2", "0", 0, ()),
    )
    losses = {}
    for name, devices, restarts, code, rest in runs:
        process = start(script, "--devices", devices, "--max-restarts", restarts, "train.py", name, "4", *rest)
        _, err = process.communicate(timeout=240)
        assert process.returncode == code, err
        if code == 0:
            losses[name] = json.loads((script.parent / f"{name}.json").read_text())
    assert len(losses["undisturbed"]) == 4
    assert losses["restarted"] == losses["undisturbed"][1:]
    np.testing.assert_allclose(losses["elastic"], losses["undisturbed"][1:], rtol=1e-5)
