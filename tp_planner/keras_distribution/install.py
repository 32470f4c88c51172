"""Install: put tp_planner's distribution library in the place that Keras keeps for a backend's own, and take it out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import keras
from keras.src import backend as keras_backend
from keras.src.backend import torch as torch_backend
from keras.src.backend.torch import trainer as torch_trainer
from keras.src.callbacks import CallbackList, backup_and_restore, model_checkpoint
from keras.src.distribution import distribution_lib
from keras.src.trainers import data_adapters
from keras.src.utils import io_utils

from tp_planner.ir.errors import PlanError
from tp_planner.keras_distribution import backend, births, data, logs, models

logger = logging.getLogger("tp_planner")

_undo: list[Callable[[], None]] = []


def enable_keras_distribution() -> None:
    """Let ``keras.distribution`` work on the torch backend; a second call does nothing.

    A model is planned and sharded when it is first called under ``keras.distribution.ModelParallel``. Variables that
    are created under it are stored in shards from the beginning.

    Raises PlanError on another backend.
    """
    if keras.backend.backend() != "torch":
        raise PlanError(
            f"Keras runs on the {keras.backend.backend()!r} backend, which has its own distribution library; "
            f"set KERAS_BACKEND=torch before importing keras, or do without tp_planner"
        )
    if _undo:
        return
    if keras_backend.distribution_lib is not None:
        logger.warning(
            "Keras %s brings a distribution library for torch; tp_planner's is in use instead, until "
            "tp_planner.disable_keras_distribution()",
            keras.__version__,
        )
    _undo.append(lambda: keras.distribution.set_distribution(keras.distribution.distribution()))
    with data.without_distribution():  # whose library ends what it does for it, and later begins again
        for place in (keras_backend, distribution_lib, torch_backend):
            _replace(place, "distribution_lib", backend)
    if hasattr(torch_trainer, "ModelParallel"):
        _keep_keras_from_distributing()
    _wrap(torch_backend.Variable, "_initialize", births.born_with_value)
    _wrap(torch_backend.Variable, "_initialize_with_initializer", births.born_with_initializer)
    _wrap(keras.Model, "_maybe_build", models.planned_when_built)
    _wrap(keras.Model, "_symbolic_build", models.checked_before_training)
    _wrap(keras.Model, "save", models.planned_before_saving)
    _wrap(keras.Model, "save_weights", models.planned_before_saving)
    for name in ("train_on_batch", "test_on_batch", "predict_on_batch"):
        _wrap(keras.Model, name, data.sharing_its_batch)
    _wrap(keras.Model, "make_predict_function", data.predicting_all_rows)
    for name in ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch"):
        _wrap(keras.Model, name, models.under_its_distribution)
    _wrap(data_adapters, "get_data_adapter", data.shared_out)
    _wrap(CallbackList, "__init__", logs.writing_on_rank_zero)
    _wrap(CallbackList, "on_epoch_end", logs.deciding_alike)
    _wrap(CallbackList, "on_train_end", logs.ending_together)
    _wrap(io_utils, "print_msg", logs.printing_on_rank_zero)
    _wrap(backup_and_restore, "file_utils", logs.FilesOfRankZero)
    _wrap(model_checkpoint, "file_utils", logs.FilesOfRankZero)


def disable_keras_distribution() -> None:
    """Undo ``enable_keras_distribution``; models that are sharded stay so."""
    while _undo:
        _undo.pop()()


def _keep_keras_from_distributing() -> None:
    """Keep Keras 3.16 from distributing variables, batches and models: under a distribution it does, library or not."""
    _replace(torch_backend.Variable, "_initialize_distributed", lambda self, initializer: None)
    _replace(torch_trainer, "ModelParallel", ())  # no distribution is one of these, so that batches stay as they are
    _wrap(torch_trainer.Trainer, "_initialize_ddp", models.not_replicated_by_keras)


def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    _replace(owner, name, wrapper(getattr(owner, name)))


def _replace(owner: Any, name: str, new: Any) -> None:
    """Set an attribute; undoing gives back the old one, or removes what was inherited before."""
    had, old = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, new)
    _undo.append(lambda: setattr(owner, name, old) if had else delattr(owner, name))
