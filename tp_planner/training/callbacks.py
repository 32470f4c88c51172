"""Callbacks of parallel models: rank 0 writes and prints, and all ranks decide by its logs.

It holds inside of ``working_together``, into which training a parallel model goes, and under a distribution.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import keras
import torch.distributed as dist
from keras.src.callbacks import CallbackList, backup_and_restore, model_checkpoint
from keras.src.callbacks.progbar_logger import ProgbarLogger
from keras.src.utils import io_utils
from keras.src.utils.python_utils import pythonify_logs

from tp_planner.files import opened_aside
from tp_planner.job.rendezvous import meet
from tp_planner.job.values import of_rank_zero
from tp_planner.patches import Patch, wrapped
from tp_planner.training.writing import is_distributed, save_with_all_ranks

# They write, and do nothing else. ModelCheckpoint and BackupAndRestore are not among them: every rank takes part in
# saving a model. Rank 0 writes the file; what else these two do with files is in WRITES.
WRITERS = (
    ProgbarLogger,
    keras.callbacks.CSVLogger,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.TensorBoard,
)
WRITES = ("makedirs", "remove", "rmtree", "copy")


def patches() -> list[Patch]:
    """Return what of Keras is changed."""
    alike, writes = "ranks decide alike, and end together", "one rank writes"
    return [
        wrapped(CallbackList, "__init__", writing_on_rank_zero, writes),
        wrapped(CallbackList, "on_epoch_end", deciding_alike, alike),
        wrapped(CallbackList, "on_train_end", ending_together, alike),
        wrapped(io_utils, "print_msg", printing_on_rank_zero, "one rank prints"),
        *(wrapped(each, "file_utils", FilesOfRankZero, writes) for each in (backup_and_restore, model_checkpoint)),
    ]


class _Together:
    depth = 0


@contextlib.contextmanager
def working_together() -> Iterator[None]:
    """Inside, all ranks train a parallel model: callbacks act once for all of them."""
    with contextlib.ExitStack() as stack:
        for patch in patches():
            if not hasattr(getattr(patch.owner, patch.name), "works_together"):  # as within another, or a distribution
                stack.enter_context(patch)
        _Together.depth += 1
        stack.callback(_leave)
        yield


def _leave() -> None:
    _Together.depth -= 1


def acts_for_all() -> bool:
    """Whether what callbacks do is done once for all ranks."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return several and (_Together.depth > 0 or is_distributed())


def is_silent() -> bool:
    """Whether another rank writes and prints for this one."""
    return acts_for_all() and dist.get_rank() != 0


def _marked(function: Callable[..., None]) -> Callable[..., None]:
    function.works_together = True  # type: ignore[attr-defined]
    return function


class FilesOfRankZero:
    """Keras's ``file_utils`` for callbacks in which every rank takes part: other ranks than 0 only read."""

    works_together = True

    def __init__(self, plain: ModuleType) -> None:
        self._plain = plain

    def __getattr__(self, name: str) -> Any:
        return _nothing if name in WRITES and is_silent() else getattr(self._plain, name)

    def File(self, path: str, mode: str = "r") -> Any:
        if mode != "w" or self._plain.is_remote_path(path):
            return io.StringIO() if mode != "r" and is_silent() else self._plain.File(path, mode)
        return io.StringIO() if is_silent() else opened_aside(path)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


def printing_on_rank_zero(plain: Callable[..., None]) -> Callable[..., None]:
    """Return Keras's ``print_msg``, which prints on rank 0 alone."""

    @_marked
    @functools.wraps(plain)
    def print_msg(*args: Any, **kwargs: Any) -> None:
        if not is_silent():
            plain(*args, **kwargs)

    return print_msg


def writing_on_rank_zero(plain: Callable[..., None]) -> Callable[..., None]:
    """Return the creation of Keras's CallbackList, without the callbacks that only write on ranks other than 0."""

    @_marked
    @functools.wraps(plain)
    def __init__(self: Any, callbacks: Any = None, *args: Any, **kwargs: Any) -> None:
        if acts_for_all():
            callbacks = [_for_all(each) for each in keras.tree.flatten(callbacks) if each is not None]
            callbacks = [each for each in callbacks if not (is_silent() and isinstance(each, WRITERS))]
        plain(self, callbacks, *args, **kwargs)
        if is_silent():
            self.callbacks = [each for each in self.callbacks if not isinstance(each, WRITERS)]
            self._progbar = None

    return __init__


def _for_all(callback: Any) -> Any:
    """Return the callback, or what lets all ranks contribute where it writes down weights."""
    reads = isinstance(callback, keras.callbacks.TensorBoard) and (callback.histogram_freq or callback.embeddings_freq)
    return ReadingWeights(callback) if reads else callback


class ReadingWeights(keras.callbacks.Callback):
    """Runs a callback on rank 0 alone; where an epoch ends, and it may read weights, the others give theirs."""

    def __init__(self, callback: keras.callbacks.Callback) -> None:
        super().__init__()
        self._callback = callback

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        if not is_silent():
            self._callback.set_model(model)

    def set_params(self, params: Any) -> None:
        super().set_params(params)
        self._callback.set_params(params)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        what = f"{type(self._callback).__name__} at the end of an epoch"
        save_with_all_ranks(what, self.model, lambda: self._callback.on_epoch_end(epoch, logs))


def _passed_on(name: str) -> Callable[..., None]:
    def event(self: ReadingWeights, *args: Any, **kwargs: Any) -> None:
        if not is_silent():
            getattr(self._callback, name)(*args, **kwargs)

    return event


for _phase in ("train", "test", "predict"):
    for _event in ("begin", "end", "batch_begin", "batch_end"):
        setattr(ReadingWeights, f"on_{_phase}_{_event}", _passed_on(f"on_{_phase}_{_event}"))
ReadingWeights.on_epoch_begin = _passed_on("on_epoch_begin")


def deciding_alike(plain: Callable[..., None]) -> Callable[..., None]:
    """Return ``CallbackList.on_epoch_end`` with rank 0's logs and its wish to stop on every rank."""

    @_marked
    @functools.wraps(plain)
    def on_epoch_end(self: Any, epoch: int, logs: Any = None) -> None:
        if not acts_for_all():
            plain(self, epoch, logs)
            return
        if logs is not None:
            logs.update(of_rank_zero("the logs of an epoch", dict(pythonify_logs(logs))))
        plain(self, epoch, logs)
        self.model.stop_training = of_rank_zero("the end of an epoch", bool(self.model.stop_training))

    return on_epoch_end


def ending_together(plain: Callable[..., None]) -> Callable[..., None]:
    """Return ``CallbackList.on_train_end``, after which rank 0 has written all that other ranks may read."""

    @_marked
    @functools.wraps(plain)
    def on_train_end(self: Any, logs: Any = None) -> None:
        plain(self, logs)
        if acts_for_all():
            meet("the end of training")

    return on_train_end
