"""Callbacks under a distribution: rank 0 writes and prints, and all ranks decide by its logs."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import keras
import torch.distributed as dist
from keras.src.callbacks.progbar_logger import ProgbarLogger
from keras.src.utils.python_utils import pythonify_logs

from tp_planner.job.rendezvous import exchange, meet

# They write, and do nothing else. ModelCheckpoint and BackupAndRestore are not among them: every rank takes part in
# saving a model. Rank 0 writes the file; what else these two do with files is in WRITES.
WRITERS = (
    ProgbarLogger,
    keras.callbacks.CSVLogger,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.TensorBoard,
)
WRITES = ("makedirs", "remove", "rmtree", "copy")


class FilesOfRankZero:
    """Keras's ``file_utils`` for callbacks in which every rank takes part: other ranks than 0 only read."""

    def __init__(self, plain: ModuleType) -> None:
        self._plain = plain

    def __getattr__(self, name: str) -> Any:
        return _nothing if name in WRITES and is_silent() else getattr(self._plain, name)

    def File(self, path: str, mode: str = "r") -> Any:
        return io.StringIO() if mode != "r" and is_silent() else self._plain.File(path, mode)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


def printing_on_rank_zero(plain: Callable[..., None]) -> Callable[..., None]:
    """Return Keras's ``print_msg``, which prints on rank 0 alone."""

    @functools.wraps(plain)
    def print_msg(*args: Any, **kwargs: Any) -> None:
        if not is_silent():
            plain(*args, **kwargs)

    return print_msg


def writing_on_rank_zero(plain: Callable[..., None]) -> Callable[..., None]:
    """Return the creation of Keras's CallbackList, without the callbacks that only write on ranks other than 0."""

    @functools.wraps(plain)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if is_silent():
            self.callbacks = [callback for callback in self.callbacks if not isinstance(callback, WRITERS)]
            self._progbar = None

    return __init__


def deciding_alike(plain: Callable[..., None]) -> Callable[..., None]:
    """Return ``CallbackList.on_epoch_end`` with rank 0's logs and its wish to stop on every rank."""

    @functools.wraps(plain)
    def on_epoch_end(self: Any, epoch: int, logs: Any = None) -> None:
        if not is_distributed():
            plain(self, epoch, logs)
            return
        if logs is not None:
            logs.update(_of_rank_zero("the logs of an epoch", dict(pythonify_logs(logs))))
        plain(self, epoch, logs)
        self.model.stop_training = _of_rank_zero("the end of an epoch", bool(self.model.stop_training))

    return on_epoch_end


def ending_together(plain: Callable[..., None]) -> Callable[..., None]:
    """Return ``CallbackList.on_train_end``, after which rank 0 has written all that other ranks may read."""

    @functools.wraps(plain)
    def on_train_end(self: Any, logs: Any = None) -> None:
        plain(self, logs)
        if is_distributed():
            meet("the end of training")

    return on_train_end


def is_distributed() -> bool:
    """Whether a distribution is in use and this is one of several processes."""
    return keras.distribution.distribution() is not None and dist.is_initialized() and dist.get_world_size() > 1


def is_silent() -> bool:
    """Whether another rank writes and prints for this one."""
    return is_distributed() and dist.get_rank() != 0


def _of_rank_zero(what: str, value: Any) -> Any:
    """Return rank 0's value, which JSON can write, on every rank."""
    return json.loads(exchange(what, json.dumps(value))[0])
