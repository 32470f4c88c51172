"""Going on within an epoch: what a checkpoint says of the epoch that runs, and how ``fit`` comes to that place again.

The epoch begins with the random state with which it had begun, so that data are shuffled as they were; the batches that
were trained on are read and passed over; then random state and metrics are those of the checkpoint. So what follows is
what would have followed, if the same data come again from the same random state.
"""

from __future__ import annotations

import functools
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import torch
from keras.src.trainers.epoch_iterator import EpochIterator

from tp_planner.checkpoints.progress import About, EpochSoFar, read_about, set_random_state
from tp_planner.ir.errors import PlanError
from tp_planner.patches import wrap_for_good
from tp_planner.training.counts import count_on

logger = logging.getLogger("tp_planner")
_NUMBER = "_tp_planner_number"
_numbers = itertools.count()
_waiting: list[RestOfEpoch] = []  # what is to be made next, one at most
_begun: list[DataOfFit] = []  # of the ``fit`` that begins, one at most


class DataOfFit:
    """The data of the ``fit`` that begins: Keras 3.16 counts their epochs, and shuffles them by that number.

    Args:
        epochs: the number where ``fit`` goes on; None for that with which Keras begins.
    """

    def __init__(self, epochs: int | None) -> None:
        self._goes_on_at, self._number = epochs, next(_numbers)
        self._adapter: Any = None
        _begun[:] = [self]

    def is_of(self, iterator: EpochIterator) -> bool:
        """Whether an iterator is that of ``fit``, which was made before."""
        return getattr(iterator, _NUMBER, self._number) < self._number

    def come_from(self, iterator: EpochIterator) -> None:
        """Take the iterator of ``fit``, and let its data be where ``fit`` goes on."""
        self._adapter = iterator.data_adapter
        if self._goes_on_at is not None and self.epochs is not None:
            self._adapter._epoch = self._goes_on_at

    @property
    def epochs(self) -> int | None:
        """The number of epochs that the data have had; None if Keras does not count them."""
        return getattr(self._adapter, "_epoch", None)


class RestOfEpoch:
    """What is left of an epoch where a checkpoint was written within it.

    Args:
        model: the one that is trained, with the checkpoint's values.
        about: what the checkpoint says.
        so_far: what it says of the epoch.
        folder: of the checkpoint.
        device: of this rank.
    """

    def __init__(
        self, model: keras.Model, about: About, so_far: EpochSoFar, folder: Path, device: torch.device
    ) -> None:
        self.epoch, self.batch, self.so_far = about.epoch, about.batch, so_far
        self._model, self._folder, self._device = weakref.ref(model), folder, device
        self._random_state, self._number = about.random_state, 0

    def begin(self) -> None:
        """Let the epoch begin as it had, and the iterator of the ``fit`` that runs pass over what was trained on."""
        set_random_state(self.so_far.random_state, self._device)
        self._number = next(_numbers)
        _waiting[:] = [self]

    def is_of(self, iterator: EpochIterator) -> bool:
        """Whether this waits for an iterator: that of ``fit`` was made before, those of other calls later."""
        return getattr(iterator, _NUMBER, self._number) < self._number

    def pass_over(self, batches: Iterator[Any]) -> None:
        """Read what was trained on, and go on as it was then. Raises PlanError if there is less."""
        for number in range(self.batch):
            if next(batches, None) is None:
                raise PlanError(
                    f"{self._folder} was written after batch {self.batch} of an epoch, and the data of this one end "
                    f"after {number}; give fit the same data, or tp_planner.Checkpoint resume=False"
                )
        set_random_state(self._random_state, self._device)
        model = self._model()
        if model is not None and not count_on(model, self.so_far.counts):
            logger.warning("[ModelParallel] %s has other metrics: those of this epoch begin anew", self._folder)


def rest_of_epoch(model: keras.Model, folder: Path, batches: int | None, device: torch.device) -> RestOfEpoch | None:
    """Return what is left of the epoch within which a checkpoint was written; None if it has to begin again.

    Args:
        model: the one that is trained, with the checkpoint's values.
        folder: of the checkpoint.
        batches: how many an epoch has, if that is known.
        device: of this rank.
    """
    about = read_about(folder)
    if not about.so_far:
        return None
    so_far = EpochSoFar(**about.so_far)
    if so_far.batches != batches:
        logger.warning(
            "[ModelParallel] %s was written in an epoch of %s batches, and this one has %s: epoch %d begins again",
            *(folder, so_far.batches, batches, about.epoch + 1),
        )
        return None
    return RestOfEpoch(model, about, so_far, folder, device)


def let_epochs_go_on() -> None:
    """From now on, let iterators of epochs pass over what a checkpoint says, where one waits for them."""
    why = "an epoch that was cut off goes on where it was"
    wrap_for_good(EpochIterator, "__init__", _numbering, why)
    wrap_for_good(EpochIterator, "__iter__", _passing_over, why)


def _numbering(plain: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(plain)
    def __init__(self: EpochIterator, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        setattr(self, _NUMBER, next(_numbers))

    return __init__


def _passing_over(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def __iter__(self: EpochIterator) -> Any:
        if _begun and _begun[0].is_of(self):
            _begun.pop().come_from(self)
        batches = plain(self)
        if _waiting and _waiting[0].is_of(self):
            _waiting.pop().pass_over(batches)
        return batches

    return __iter__
