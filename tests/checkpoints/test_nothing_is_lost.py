"""Whatever is cut off, damaged, killed or full: the last complete checkpoint is there, and it is loaded."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest

import tp_planner
from tp_planner.checkpoints import saving
from tp_planner.checkpoints.contents import contents_of
from tp_planner.checkpoints.manifest import NAME
from tp_planner.checkpoints.shelf import checkpoints_in, is_complete

X, Y = np.ones((4, 8), "float32"), np.zeros((4, 4), "float32")


def built() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [keras.Input((8,)), keras.layers.Dense(16, name="up"), keras.layers.Dense(4, name="down")]
    model = keras.Sequential(layers, name="small")
    model.compile("adam", "mse")
    return model


def values(model: keras.Model) -> dict[str, np.ndarray]:
    return {name: variable.numpy().copy() for name, variable in contents_of(model).items()}


@pytest.fixture
def two(tmp_path: Path) -> tuple[keras.Model, Path, dict[str, np.ndarray]]:
    """Return a model, the folder of its checkpoints after one and two steps, and its values after one."""
    model = built()
    model.train_on_batch(X, Y)
    tp_planner.save_checkpoint(model, tmp_path)
    first = values(model)
    model.train_on_batch(X, Y)
    tp_planner.save_checkpoint(model, tmp_path)
    return model, tmp_path, first


def harmed(path: Path, fine: bool) -> Iterator[bytes]:
    """Yield contents that a file has when it is cut, or a bit of it flipped."""
    data = path.read_bytes()
    cuts = range(len(data)) if fine else (0, 1, len(data) // 2, len(data) - 1)
    yield from (data[:cut] for cut in cuts)
    for place in (0, len(data) // 3, len(data) - 2):
        yield data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def test_a_damaged_checkpoint_is_passed_over(two: Any) -> None:
    """Cut or changed in any file, the newest is not loaded: the one before is, bit for bit."""
    model, folder, first = two
    newest = checkpoints_in(folder)[0]
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for data in harmed(path, fine=False):
            path.write_bytes(data)
            assert tp_planner.load_checkpoint(model, folder).step == 1
            np.testing.assert_equal(values(model), first)
        path.unlink()
        assert tp_planner.load_checkpoint(model, folder).step == 1
        path.write_bytes(whole)
    assert tp_planner.load_checkpoint(model, folder).step == 2


def test_a_manifest_is_cut_at_any_byte(two: Any) -> None:
    """A checkpoint is complete with the whole manifest alone."""
    _, folder, _ = two
    manifest = checkpoints_in(folder)[0] / NAME
    whole = manifest.read_bytes()
    assert is_complete(manifest.parent)
    for data in harmed(manifest, fine=True):
        manifest.write_bytes(data)
        assert not is_complete(manifest.parent)
    manifest.write_bytes(whole)
    assert is_complete(manifest.parent)


def test_nothing_complete_is_refused(two: Any) -> None:
    """If none is left, each is named with what is wrong with it."""
    model, folder, _ = two
    before = values(model)
    for each in checkpoints_in(folder):
        (each / "progress.json").write_text("{}")
    with pytest.raises(tp_planner.PlanError) as refusal:
        tp_planner.load_checkpoint(model, folder)
    named = [f"{each}: progress.json is missing or has not its " for each in checkpoints_in(folder)]
    assert refusal.value.problems[0] == f"{folder}: holds no complete checkpoint"
    for problem, beginning in zip(refusal.value.problems[1:], named, strict=True):
        assert problem.startswith(beginning)
    np.testing.assert_equal(values(model), before)


def test_old_ones_are_removed_but_the_last_complete(two: Any) -> None:
    """``keep`` counts complete ones; what is not complete does not push the last complete one out."""
    model, folder, _ = two
    for _ in range(3):
        tp_planner.save_checkpoint(model, folder, keep=2)
    assert [each.name for each in checkpoints_in(folder)] == ["000005-step-2", "000004-step-2"]
    (folder / "000005-step-2" / NAME).unlink()
    tp_planner.save_checkpoint(model, folder, keep=2)
    assert [each.name for each in checkpoints_in(folder)] == ["000006-step-2", "000005-step-2", "000004-step-2"]


def test_a_full_disk_leaves_the_last_one(two: Any) -> None:
    """What cannot be written is an error with the words of the system, and nothing is left aside."""
    model, folder, _ = two
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        mock.patch.object(saving, "write_manifest", side_effect=full),
        pytest.raises(tp_planner.PlanError, match="No space left on device"),
    ):
        tp_planner.save_checkpoint(model, folder)
    assert sorted(each.name for each in folder.iterdir()) == [".lock", "000001-step-1", "000002-step-2"]
    assert tp_planner.load_checkpoint(model, folder).step == 2


def test_two_jobs_on_one_folder(two: Any) -> None:
    """The second is refused."""
    model, folder, _ = two
    with (folder / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(tp_planner.PlanError) as refusal:
            tp_planner.save_checkpoint(model, folder)
    assert str(refusal.value) == f"{folder}: another job writes checkpoints to this folder; give each its own"
    tp_planner.save_checkpoint(model, folder)


def test_a_checkpoint_of_another_model(two: Any) -> None:
    """All that does not fit is named, and nothing is loaded."""
    _, folder, _ = two
    other = keras.Sequential([keras.Input((8,)), keras.layers.Dense(15, name="up")], name="small")
    before = values(other)
    with pytest.raises(tp_planner.PlanError) as refusal:
        tp_planner.load_checkpoint(other, folder)
    path = checkpoints_in(folder)[0]
    assert refusal.value.problems == (
        f"{path}: 'model/small/up/kernel' has shape (8, 16), not the (8, 15) of the model",
        f"{path}: 'model/small/up/bias' has shape (16,), not the (15,) of the model",
        f"{path} has 'model/small/down/bias', which the model has not",
        f"{path} has 'model/small/down/kernel', which the model has not",
    )
    np.testing.assert_equal(values(other), before)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_fit_goes_on_where_it_was(tmp_path: Path, asynchronous: bool) -> None:
    """A fit that was cut off, and begins again in a new model, ends with the weights of one that was not."""
    undisturbed = built()
    undisturbed.fit(X, Y, batch_size=2, epochs=4, verbose=0)

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                raise KeyboardInterrupt

    def checkpoint() -> tp_planner.Checkpoint:
        return tp_planner.Checkpoint(tmp_path, keep=2, asynchronous=asynchronous)

    first = checkpoint()
    with pytest.raises(KeyboardInterrupt):
        built().fit(X, Y, batch_size=2, epochs=4, verbose=0, callbacks=[first, Stop()])
    first.on_train_end()
    resumed = built()
    resumed.fit(X, Y, batch_size=2, epochs=4, verbose=0, callbacks=[checkpoint()])
    np.testing.assert_equal(values(resumed), values(undisturbed))
    assert [each.name for each in checkpoints_in(tmp_path)] == ["000004-step-8", "000003-step-6"]


def _save_for_ever(folder: Path) -> None:
    model = built()
    while True:
        model.train_on_batch(X, Y)
        tp_planner.save_checkpoint(model, folder, keep=2)


def killed(times: int, folder: Path) -> None:
    """Kill a process that writes checkpoints at random moments; each time the newest is loaded, none is older."""
    rng, server, step = np.random.default_rng(0), multiprocessing.get_context("forkserver"), 0
    server.set_forkserver_preload(["tests.preloaded"])
    model = built()
    model.train_on_batch(X, Y)
    for _ in range(times):
        process = server.Process(target=_save_for_ever, args=(folder,))
        process.start()
        newest = len(list(folder.glob("0*")))
        while process.is_alive() and not newest:  # the first one takes longest
            time.sleep(0.01)
            newest = len(list(folder.glob("0*")))
        time.sleep(rng.uniform(0.1, 0.4))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        number = max(int(each.name[:6]) for each in folder.glob("0*"))
        progress = tp_planner.load_checkpoint(model, folder)
        assert int(progress.folder.name[:6]) == number >= step
        step = number


def test_killed_while_writing(tmp_path: Path) -> None:
    """What bears a name is complete, whenever the process that wrote it was killed."""
    killed(4, tmp_path)


@pytest.mark.slow
def test_killed_while_writing_200_times(tmp_path: Path, record_property: Any) -> None:
    """As above, 200 times."""
    killed(200, tmp_path)
    record_property("counted", "200 writers of checkpoints killed at random moments: the newest was whole each time")


def test_a_checkpoint_from_before_the_first_step(tmp_path: Path) -> None:
    """It has no slots of the optimizer; a model whose optimizer has none takes it, one that has made steps does not."""
    x, y = np.ones((2, 3)), np.ones((2, 4))
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, name="dense")], name="plain")
    model.compile("adam", "mse")
    path, kernel = tp_planner.save_checkpoint(model, tmp_path), model.get_weights()[0]
    model.set_weights([each + 1 for each in model.get_weights()])
    tp_planner.load_checkpoint(model, tmp_path)
    np.testing.assert_array_equal(model.get_weights()[0], kernel)
    model.train_on_batch(x, y)
    with pytest.raises(tp_planner.PlanError) as refusal:
        tp_planner.load_checkpoint(model, tmp_path)
    assert str(refusal.value) == (
        f"{path} was written before the optimizer's first step, and the model's optimizer has state of steps; compile "
        f"the model again, and load it then"
    )
