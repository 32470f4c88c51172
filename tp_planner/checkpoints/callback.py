"""The callback that writes checkpoints during ``fit``, and goes on from the newest one."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import keras
import torch.distributed as dist
from keras.src.utils.python_utils import pythonify_logs

from tp_planner.checkpoints import shelf as shelves
from tp_planner.checkpoints.progress import EpochSoFar, random_state, read_about
from tp_planner.checkpoints.resuming import DataOfFit, RestOfEpoch, let_epochs_go_on, rest_of_epoch
from tp_planner.checkpoints.saving import load_checkpoint, own_device, prepare
from tp_planner.ir.errors import PlanError
from tp_planner.job.rendezvous import exchange
from tp_planner.job.together import together
from tp_planner.training.counts import counts_of


class Checkpoint(keras.callbacks.Callback):
    """Writes a sharded checkpoint every so often, and begins with the newest complete one that is there.

    What fit is told about epochs counts from the first run: ``fit(epochs=10)`` that was cut off in the fourth epoch
    makes seven more. Where a checkpoint was written within an epoch, fit goes on with the batch after it: the epoch
    begins with the random state that it had begun with, the batches before are read and passed over, and metrics count
    on. With arrays, a ``keras.utils.PyDataset`` or a ``torch.utils.data.DataLoader`` that shuffle by the global random
    state or by a seed, losses and weights are those of an undisturbed run. What a generator, or an object with a random
    state of its own, has given in earlier epochs is not counted: it goes on with what it gives first. An epoch of
    another number of batches begins again.

    Args:
        folder: where checkpoints lie; no other job may write there.
        every: "epoch", or a number of batches.
        keep: how many complete ones stay.
        resume: whether to begin with the newest one.
        asynchronous: whether training goes on while files are written. Each rank then holds a copy of its shards and of
            their optimizer slots on the host until they are written, and training waits for the copying alone. At
            most one is being written; a failure is raised at the next one, or at the end of training.

    Raises PlanError if ``every`` or ``keep`` is none of these.
    """

    def __init__(
        self,
        folder: str | Path,
        every: int | str = "epoch",
        keep: int = 3,
        resume: bool = True,
        asynchronous: bool = False,
    ) -> None:
        super().__init__()
        if every != "epoch" and not (isinstance(every, int) and every > 0):
            raise PlanError(f"every is {every!r}; it is 'epoch' or a number of batches")
        if keep < 1:
            raise PlanError(f"keep is {keep}; at least one checkpoint stays")
        self.folder, self.every, self.keep, self.resume = Path(folder), every, keep, resume
        self._writing = _Background() if asynchronous else None
        self._mine = contextlib.ExitStack()
        self._epoch = self._batches = 0
        self._rest: RestOfEpoch | None = None
        self._data: DataOfFit | None = None
        self._begun: dict[str, Any] = {}  # the random state with which the epoch began
        let_epochs_go_on()

    def on_train_begin(self, logs: Any = None) -> None:
        """Take the folder, and load the newest checkpoint in it."""
        first = not dist.is_initialized() or dist.get_rank() == 0
        what = "tp_planner.Checkpoint"
        tell = exchange if dist.is_initialized() else lambda what, text: [text]
        together(what, lambda: self._mine.enter_context(shelves.alone(self.folder)) if first else None, tell)
        goes_on_at: int | None = None
        there = str(len(shelves.checkpoints_in(self.folder)) if self.folder.is_dir() else 0)
        if self.resume and tell(what, there)[0] != "0":
            progress = load_checkpoint(self.model, self.folder)
            self.model._initial_epoch = progress.epoch  # as Keras's BackupAndRestore does
            self._rest = rest_of_epoch(self.model, progress.folder, self._length(), own_device())
            goes_on_at = read_about(progress.folder).data_epochs
        self._data = DataOfFit(goes_on_at)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Note how the epoch begins; the one of the checkpoint as it began then."""
        self._epoch, self._batches = epoch, 0
        if self._rest is not None and self._rest.epoch == epoch:
            self._batches = self._rest.batch
            self._rest.begin()
        self._begun = random_state(own_device())

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Write, if it is time."""
        self._batches = batch + 1
        self._rest = None
        if self.every != "epoch" and self._batches % int(self.every) == 0:
            known = {name: value for name, value in pythonify_logs(logs).items() if isinstance(value, float)}
            so_far = EpochSoFar(self._begun, self._length(), known, [counts_of(self.model)])
            self._save(self._epoch, self._batches, so_far)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Write, if it is time; of an epoch of which nothing was left, say what was known of it."""
        if self._rest is not None and self._rest.epoch == epoch and logs is not None:
            logs.update({name: value for name, value in self._rest.so_far.logs.items() if name not in logs})
        self._rest = None
        if self.every == "epoch":
            self._save(epoch + 1, 0)

    def on_train_end(self, logs: Any = None) -> None:
        """Wait for what is being written, and let go of the folder."""
        self._data = None
        with self._mine:
            if self._writing is not None:
                self._writing.wait()

    def _length(self) -> int | None:
        """Return how many batches an epoch has, if that is known."""
        steps: int | None = (self.params or {}).get("steps")
        return steps

    def _save(self, epoch: int, batch: int, so_far: EpochSoFar | None = None) -> None:
        copied = self._writing is not None
        data_epochs = None if self._data is None else self._data.epochs
        write = prepare(self.model, self.folder, epoch, batch, self.keep, copied, so_far, data_epochs)
        if self._writing is not None:
            self._writing.start(write)
        else:
            write(exchange if dist.is_initialized() else lambda what, text: [text], None)


class _Background:
    """One thread that writes, with a process group of its own, so that it does not get in training's way."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._group: Any = None
        self._error: BaseException | None = None

    def start(self, write: Any) -> None:
        """Write in the background, once what was begun before is done; raise what went wrong with that."""
        self.wait()
        if self._group is None and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        self._thread = threading.Thread(target=self._run, args=(write,), name="tp_planner checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return once nothing is being written; raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def _run(self, write: Any) -> None:
        try:
            write(self._tell, self._group)
        except BaseException as error:  # raised where training meets it
            self._error = error

    def _tell(self, what: str, text: str) -> list[str]:
        if self._group is None:
            return [text]
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, text, group=self._group)
        return answers
