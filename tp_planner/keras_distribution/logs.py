"""Callbacks under a distribution: rank 0 writes, and all ranks decide by its logs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import keras
import torch.distributed as dist
from keras.src.callbacks.progbar_logger import ProgbarLogger
from keras.src.utils.python_utils import pythonify_logs

from tp_planner.runtime.rendezvous import exchange

# They write, and do nothing else. ModelCheckpoint and BackupAndRestore are not among them: every rank takes part in
# saving a model, and rank 0 writes the file.
WRITERS = (
    ProgbarLogger,
    keras.callbacks.CSVLogger,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.TensorBoard,
)


def writing_on_rank_zero(plain: Callable[..., None]) -> Callable[..., None]:
    """Return the creation of Keras's CallbackList, without the callbacks that only write on ranks other than 0."""

    @functools.wraps(plain)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if is_distributed() and dist.get_rank() != 0:
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


def is_distributed() -> bool:
    """Whether a distribution is in use and this is one of several processes."""
    return keras.distribution.distribution() is not None and dist.is_initialized() and dist.get_world_size() > 1


def _of_rank_zero(what: str, value: Any) -> Any:
    """Return rank 0's value, which JSON can write, on every rank."""
    return json.loads(exchange(what, json.dumps(value))[0])
