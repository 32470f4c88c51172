"""Replayed: the loss, the metrics and the update of a parallel model's steps, where all of them are Keras's own.

Each is a piece of its own, for the model's call and the backward pass lie between them. A model that is replayed, by
``jit_compile=True`` or by Keras's default, has its pieces replayed, too. What replicas ask each other in them, and what
they send of shared updates, are steps of the programs.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import keras
import torch
from keras.src.models.model import Trainer  # that of the backend

from tp_planner.regions.calls import running
from tp_planner.replay.objects import Held, foreign_code_of, objects_in
from tp_planner.replay.pieces import Piece

_OF_TRAINERS = ("_compile_loss", "_compile_metrics", "_loss_tracker", "_metrics", "_losses_override")

# By optimizer: its updates, and the model that is compiled with it.
_of_updates: weakref.WeakKeyDictionary[Any, tuple[Piece, Callable[[], Any]]] = weakref.WeakKeyDictionary()


class StepPieces:
    """What of a model's steps is replayed; nothing until it is asked for.

    Args:
        model: a parallel model.
        layers: the model and all layers below it, by name.
    """

    def __init__(self, model: keras.Model, layers: Mapping[str, keras.Layer]) -> None:
        self._model, self._layers = model, layers
        self._loss: Piece | None = None
        self._metrics: Piece | None = None
        self._tracker: tuple[Any, Piece] | None = None  # of the mean loss, and its updates

    def begin(self, asked: bool) -> None:
        """Replay what can be, of a model that was compiled."""
        name, optimizer = self._model.name, getattr(self._model, "optimizer", None)
        optimizer = getattr(optimizer, "inner_optimizer", None) or optimizer  # what scales a loss looks at gradients
        self._loss = Piece(f"the loss of model {name!r}", self._what_losses_read, asked)
        self._metrics = Piece(f"the metrics of model {name!r}", self._what_metrics_read, asked)
        tracker = getattr(self._model, "_loss_tracker", None)
        if tracker is not None:
            look = functools.partial(_what_objects_hold, tracker)
            self._tracker = tracker, Piece(f"the mean loss of model {name!r}", look, asked)
        if optimizer is not None:
            look = functools.partial(_what_updates_read, weakref.ref(optimizer))
            piece = Piece(f"the update of optimizer {optimizer.name!r}", look, asked)
            _of_updates[optimizer] = piece, weakref.ref(self._model)

    def end(self) -> None:
        """Replay nothing."""
        self._loss = self._metrics = self._tracker = None
        for optimizer in [each for each, (_, model) in _of_updates.items() if model() is self._model]:
            del _of_updates[optimizer]

    def of_a_step(self) -> tuple[Piece, ...]:
        """Return the pieces of a training step, in their order: the loss, its mean, the update and the metrics."""
        update, _ = _of_updates.get(getattr(self._model, "optimizer", None), (None, None))
        found = (self._loss, self._tracker and self._tracker[1], update, self._metrics)
        return tuple(each for each in found if each is not None)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Return what Keras's method of the name does, which makes nothing of ``x``."""
        plain = functools.partial(Trainer.compute_loss, self._model, None)
        return self.replay_loss(plain, y, y_pred, sample_weight, training)

    def replay_loss(self, plain: Callable[..., Any], *given: Any, other: Hashable = None) -> Any:
        """Return what ``plain`` computes of what is given; ``other`` is what else programs of it differ in."""
        if self._loss is None or self._model.run_eagerly:
            return plain(*given)
        return self._loss.call(plain, *given, other=other)

    def track_loss(self, loss: torch.Tensor, samples: int) -> None:
        """Let the mean loss that Keras reports know of a step's loss."""
        tracker, piece = self._tracker or (None, None)
        if piece is None or tracker is not self._model._loss_tracker or self._model.run_eagerly:
            self._model._loss_tracker.update_state(loss, sample_weight=samples)
        else:
            piece.call(tracker.update_state, loss, samples)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Return what Keras's method of the name does, which makes nothing of ``x``."""
        plain = functools.partial(Trainer.compute_metrics, self._model, None)
        if self._metrics is None or self._model.run_eagerly:
            return plain(y, y_pred, sample_weight)
        return self._metrics.call(plain, y, y_pred, sample_weight)

    def _what_losses_read(self) -> _Read | str:
        return self._read(self._model._compile_loss)

    def _what_metrics_read(self) -> _Read | str:
        return self._read(*self._model.metrics, *(layer._metrics for layer in self._layers.values()))

    def _read(self, *roots: Any) -> _Read | str:
        return foreign_code_of(objects_in(*roots)) or _Read(self._model, self._layers, roots)


class _Read(Held):
    """What a model's loss or its metrics read, as it is now."""

    def __init__(self, model: keras.Model, layers: Mapping[str, keras.Layer], roots: Sequence[Any]) -> None:
        super().__init__(*roots, *(layer._layers for layer in layers.values()))
        self._own, self._of_trainer = vars(model), [vars(model).get(name) for name in _OF_TRAINERS]
        self._losses = [layer._losses for layer in layers.values()]
        self._weights = list(map(vars, model.variables))

    def is_set_aside(self) -> bool:
        """Whether there are losses of layers or weights beside that of the outputs."""
        return any(self._losses) or any(map(operator.itemgetter("_regularizer"), self._weights))

    def is_another(self) -> bool:
        """Whether the model, or one of what it reads, has something in another's place."""
        now = map(self._own.get, _OF_TRAINERS)
        return any(map(operator.is_not, now, self._of_trainer)) or super().is_another()


def update(optimizer: Any, plain: Callable[..., Any], gradients: Sequence[Any], variables: Sequence[Any] | None) -> Any:
    """Return what ``plain``, Keras's ``apply``, does of these gradients, and update the variables as it does."""
    piece, model = _of_updates.get(optimizer, (None, None))
    known = optimizer._trainable_variables if variables is None and optimizer.built else variables
    eagerly = model is None or getattr(model(), "run_eagerly", True) or not optimizer.built or known is None
    if piece is None or known is None or eagerly or any(each is None for each in gradients):
        return plain(optimizer, gradients, variables)

    def apply(*gradients: torch.Tensor) -> Any:
        return plain(optimizer, gradients, variables)

    return piece.call(apply, *gradients, other=(*map(id, known), running.values))


def _what_objects_hold(*objects: Any) -> Held | str:
    return foreign_code_of(objects_in(*objects)) or Held(*objects)


def _what_updates_read(reference: Callable[[], Any]) -> Held | str:
    optimizer = reference()
    if optimizer.gradient_accumulation_steps:
        return "it is not the same in each step"
    variables = [*optimizer._trainable_variables, *optimizer.variables]
    if any(each.constraint is not None for each in variables):
        return "a variable has a constraint"
    return foreign_code_of(objects_in(optimizer)) or Held(optimizer, *variables)
