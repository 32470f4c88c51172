"""Install: put tp_planner's distribution library in the place that Keras keeps for a backend's own, and take it out."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src import backend as keras_backend
from keras.src.backend import torch as torch_backend
from keras.src.backend.torch import trainer as torch_trainer
from keras.src.distribution import distribution_lib
from keras.src.models.model import Trainer  # that of the backend
from keras.src.saving import saving_lib
from keras.src.trainers import data_adapters

from tp_planner.checkpoints import loading
from tp_planner.frontend.calling import without_distribution
from tp_planner.ir.errors import PlanError
from tp_planner.keras_distribution import backend, births, data, models
from tp_planner.patches import Patch, added, replaced, wrapped
from tp_planner.training import callbacks, exporting, writing
from tp_planner.training.compiling import note_how_models_are_compiled

logger = logging.getLogger("tp_planner")

_installed: list[contextlib.ExitStack] = []  # one, or none


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
    if _installed:
        return
    if keras_backend.distribution_lib is not None:
        logger.warning(
            "Keras %s brings a distribution library for torch; tp_planner's is in use instead, until "
            "tp_planner.disable_keras_distribution()",
            keras.__version__,
        )
    with contextlib.ExitStack() as stack:  # what fails midway is taken back
        stack.callback(lambda: keras.distribution.set_distribution(keras.distribution.distribution()))
        with without_distribution():  # whose library ends what it does for it, and later begins again
            for place in (keras_backend, distribution_lib, torch_backend):
                stack.enter_context(added(place, "distribution_lib", backend, "torch's distribution library is ours"))
        for patch in _patches():
            stack.enter_context(patch)
        _installed.append(stack.pop_all())
    note_how_models_are_compiled()


def disable_keras_distribution() -> None:
    """Undo ``enable_keras_distribution``; models that are sharded stay so."""
    while _installed:
        _installed.pop().close()


def _patches() -> Iterator[Patch]:
    if hasattr(torch_trainer, "ModelParallel"):
        yield from _keeping_keras_from_distributing()
    born = "variables are stored in shards from the beginning"
    yield wrapped(torch_backend.Variable, "_initialize", births.born_with_value, born)
    yield wrapped(torch_backend.Variable, "_initialize_with_initializer", births.born_with_initializer, born)
    planned = "a model is planned and sharded before it is used"
    yield wrapped(keras.Model, "_maybe_build", models.planned_when_built, planned)
    yield wrapped(keras.Model, "export", exporting.exported_whole, "no format holds shards")
    yield wrapped(keras.Model, "_symbolic_build", models.checked_before_training, planned)
    creation = functools.partial(models.with_other_entries, _wrap_too)
    yield wrapped(Trainer, "__init__", creation, "models have entries of their own")
    for name in ("train", "test", "predict"):
        asking = functools.partial(models.asking_for_its_step, f"{name}_step")
        yield wrapped(Trainer, f"make_{name}_function", asking, "steps are those of planned models")
    for module, name in writing.FUNCTIONS:
        yield wrapped(module, name, writing.written_by_rank_zero, "one rank writes")
    yield wrapped(saving_lib, "is_memory_sufficient", writing.through_the_disk, writing.IN_MEMORY)
    yield wrapped(saving_lib, "load_weights_only", loading.reading_shards, loading.WHY)
    shared = "every replica sees its own share of the data"
    for name in ("train_on_batch", "test_on_batch", "predict_on_batch"):
        yield wrapped(keras.Model, name, data.sharing_its_batch, shared)
    yield wrapped(keras.Model, "make_predict_function", data.predicting_all_rows, shared)
    for name in ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch"):
        yield wrapped(keras.Model, name, models.under_its_distribution, "data is shared out as the model is")
    yield wrapped(data_adapters, "get_data_adapter", data.shared_out, shared)
    yield from callbacks.patches()


def _wrap_too(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Wrap one attribute more, until the library is taken out."""
    if _installed:
        _installed[0].enter_context(wrapped(owner, name, wrapper, "an entry of models of this class"))


def _keeping_keras_from_distributing() -> Iterator[Patch]:
    """Keep Keras 3.16 from distributing variables, batches and models: under a distribution it does, library or not."""
    why = "what Keras would distribute by itself is distributed here"
    yield replaced(torch_backend.Variable, "_initialize_distributed", lambda self, initializer: None, why)
    yield replaced(torch_trainer, "ModelParallel", (), why)  # no distribution is one of these, so batches stay whole
    yield wrapped(Trainer, "_initialize_ddp", models.not_replicated_by_keras, why)
