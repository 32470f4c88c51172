"""Step: Keras's training step of a parallel model."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import keras
import torch
from keras.src.trainers.data_adapters import data_adapter_utils

from tp_planner.job.process_group import device_type
from tp_planner.training.constants import constants_without_waiting
from tp_planner.training.replayed import StepPieces
from tp_planner.training.weights import TrainedWeights
from tp_planner.training.whole_steps import WholeSteps

# Of the source of Keras's step, of the versions in which it is what `_run` does.
_KNOWN = frozenset(
    {
        "a638d4455d8fced660adaffa6b4240ed0c28f8bd1832684b245466ba7f1694d0",  # Keras 3.15.1
        "5a70c2e70526d53a0b29bbf487867753220ef5b64144102f1f9d437d4f0e63e0",  # the 3.16 nightly of 27 October 2026
    }
)


def training_step(model: keras.Model, pieces: StepPieces) -> Callable[..., Any]:
    """Return Keras's training step, with gradients where they take least memory and are averaged, waiting for no GPU.

    Keras lets go of the gradients of the step before only when activations are there. And of a model that is compiled
    with jit_compile=True Keras 3.16 asks autograd for gradients by name, of which hooks on parameters do not hear.

    Args:
        model: a parallel model, whose step is Keras's.
        pieces: what of the step is replayed.
    """
    plain = type(model).train_step
    weights = TrainedWeights(model)
    step = functools.partial(plain, model)
    if _is_known(plain):
        by_pieces, whole = functools.partial(_run, model, weights, pieces), WholeSteps(model, weights, pieces)
        step = functools.partial(whole.run, step=by_pieces)

    @functools.wraps(plain)
    def train_step(data: Any) -> Any:
        weights.forget_gradients()
        jit_compile, model.jit_compile = model.jit_compile, False
        try:
            with constants_without_waiting() if device_type() == "cuda" else contextlib.nullcontext():
                return step(data)
        finally:
            model.jit_compile = jit_compile

    return train_step


def _is_known(step: Callable[..., Any]) -> bool:
    try:
        source = inspect.getsource(step)
    except OSError:
        return False
    return hashlib.sha256(source.encode()).hexdigest() in _KNOWN


def _run(model: keras.Model, weights: TrainedWeights, pieces: StepPieces, data: Any) -> Any:
    """Do what Keras's ``train_step`` does, in its order."""
    x, y, sample_weight = data_adapter_utils.unpack_x_y_sample_weight(data)
    y_pred = model(x, training=True) if model._call_has_training_arg else model(x)
    weights.forget_gradients_again()  # those of calls in the call
    loss = model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
    pieces.track_loss(loss, next(each for each in keras.tree.flatten(x) if each is not None).shape[0])
    if model.optimizer is not None:
        loss = model.optimizer.scale_loss(loss)
    trained = weights.trained()
    if trained:
        loss.backward()
        gradients = [each.value.grad for each in trained]
        with torch.no_grad():
            model.optimizer.apply(gradients, trained)
    else:
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
    return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
