"""Whole steps: training steps of which all is replayed, the model's call and every piece, as one.

Between programs there is Keras's Python: checks of what a call is given, of losses, metrics and weights. What it found
in a step it finds in each that has data of the same sort, as long as nothing is another that it looks at. So after such
a step the next runs the programs alone, and the backward pass between them.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import torch
from keras.src.backend.common.variables import AutocastScope
from keras.src.trainers.data_adapters import data_adapter_utils
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten

from tp_planner.layers import styles
from tp_planner.regions.calls import reading_local_values, stream_in_shards
from tp_planner.replay.automatic import OF_CALLS, hooks_of, hooks_of_all_modules
from tp_planner.replay.pieces import Piece
from tp_planner.replay.replay import Replayed
from tp_planner.replay.taped_calls import Given, Run, Sort, noting_runs
from tp_planner.training import same_data
from tp_planner.training.replayed import StepPieces
from tp_planner.training.weights import TrainedWeights

MOST_SORTS = 64  # of data, whose steps are known
_PROGRAMS = 5  # of a step: its call, its loss, the mean of that, its update and its metrics
# Of a model: what a user, or another compilation, may put in its place.
_OF_MODELS = (
    *OF_CALLS,
    *("call", "optimizer", "zero_grad", "_loss_tracker", "_call_has_training_arg"),
    *("compute_loss", "_compute_loss", "compute_metrics", "get_metrics_result"),
)
# Modules whose hooks do nothing around a program, but for what they change of what a call is given or returns.
_HOOKS_FOR_CODE = (styles.__name__, same_data.__name__)


class WholeSteps:
    """The whole steps of a model, by sort of data.

    Args:
        model: a parallel model, whose step is Keras's.
        weights: its weights, looked for when a step begins.
        pieces: what of its step is replayed.
    """

    def __init__(self, model: keras.Model, weights: TrainedWeights, pieces: StepPieces) -> None:
        self._model, self._weights, self._pieces = model, weights, pieces
        self._known: dict[Sort, _WholeStep] = {}

    def run(self, data: Any, step: Callable[[Any], Any]) -> Any:
        """Return what ``step`` returns of the data, and do what it does."""
        replayed: Replayed | None = getattr(vars(self._model).get("call"), "replayed", None)
        if replayed is None or self._model.run_eagerly:
            return step(data)
        given = Given(data_adapter_utils.unpack_x_y_sample_weight(data), {})
        whole = None if given.sort is None else self._known.get(given.sort)
        if whole is not None and not whole.state.is_another():
            return whole.run(given.tensors)
        if given.sort is None or (whole is None and len(self._known) == MOST_SORTS):
            return step(data)
        with noting_runs() as runs:
            logs = step(data)
        self._known.pop(given.sort, None)
        if len(runs) != _PROGRAMS:
            return logs
        state = _State(self._model, self._weights, self._pieces, replayed)
        if state.is_plain() and (found := _whole_step(state, given.tensors, runs, logs)):
            self._known[given.sort] = found
        return logs


class _State:
    """What a step of a model depends on beside its data, as it is now."""

    def __init__(self, model: keras.Model, weights: TrainedWeights, pieces: StepPieces, replayed: Replayed) -> None:
        self.model, self.replayed, self.of_step = model, replayed, pieces.of_a_step()
        self._weights, self._found, self._pieces = weights, weights.found, pieces
        self._kind, self._held = type(model), list(map(vars(model).get, _OF_MODELS))
        self._distribution = keras.distribution.distribution()
        self._hooks = [*hooks_of_all_modules(), *hooks_of(model)]
        self._numbers = list(map(len, self._hooks))

    def is_plain(self) -> bool:
        """Whether calls of the model and of its optimizer do nothing that is not in their programs."""
        hooks = [hook for hooks in self._hooks for hook in hooks.values()]
        return (
            self._kind.__call__ is keras.Layer.__call__
            and self.model.activity_regularizer is None
            and all(hook.__module__ in _HOOKS_FOR_CODE for hook in hooks)
            and (self._distribution is None or not self._distribution.get_tensor_layout(f"{self.model.name}/output"))
            and self._found is not None
            and self.model.optimizer is not None
            and self.model.optimizer.loss_scale_factor is None
        )

    @property
    def trained(self) -> Sequence[Any]:
        """The weights that are trained."""
        assert self._found is not None
        trained: Sequence[Any] = self._found.trained
        return trained

    def is_another(self) -> bool:
        """Whether something is another now, or programs may not run for the moment."""
        now = map(vars(self.model).get, _OF_MODELS)
        return (
            self._weights.found is not self._found
            or type(self.model) is not self._kind
            or any(map(operator.is_not, now, self._held))
            or keras.distribution.distribution() is not self._distribution
            or list(map(len, self._hooks)) != self._numbers
            or self._pieces.of_a_step() != self.of_step
            or not self.replayed.may_run()
            or not all(each.may_run() for each in self.of_step)
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """A program of a step: ``places`` are those of what it is given among what is known by then."""

    run: Callable[[Sort, Sequence[torch.Tensor]], Any]
    sort: Sort
    places: Sequence[int]

    def of(self, known: Sequence[torch.Tensor]) -> Any:
        return self.run(self.sort, [known[place] for place in self.places])


@dataclass(frozen=True, slots=True)
class _WholeStep:
    """A step's programs; known are the data's tensors, then those that the call has returned, then the loss.

    ``dtype`` is that in which the call reads variables, if it is another than theirs; ``stream_is_whole`` says how the
    call has the residual stream.
    """

    state: _State
    dtype: str | None
    stream_is_whole: bool
    call: _Part
    loss: _Part
    mean: _Part
    update: _Part
    metrics: _Part

    def run(self, data: Sequence[torch.Tensor]) -> Any:
        """Train on the tensors of a step's data, and return its logs."""
        known = list(data)
        with (
            contextlib.nullcontext() if self.dtype is None else AutocastScope(self.dtype),
            contextlib.nullcontext() if self.stream_is_whole else stream_in_shards(),
        ):
            known += _leaves(self.call.of(known))
        loss = self.loss.of(known)
        known.append(loss)
        self.mean.of(known)
        loss.backward()
        self._apply_gradients()
        return self.metrics.of(known)

    def _apply_gradients(self) -> None:
        trained, optimizer = self.state.trained, self.state.model.optimizer
        gradients = [each._value.grad for each in trained]
        with torch.no_grad():
            if any(each is None for each in gradients):
                optimizer.apply(gradients, list(trained))
                return
            with reading_local_values():
                self.update.of(list(map(_local, gradients)))


def _whole_step(state: _State, data: Sequence[torch.Tensor], runs: Sequence[Run], logs: Any) -> _WholeStep | None:
    """Return what a step is that had these data, has run these programs, and returned ``logs``; None if it was more."""
    owners: Sequence[Replayed | Piece] = (state.replayed, *state.of_step)
    if len(runs) != len(owners) or not all(map(_has_run, owners, runs)):
        return None
    call, loss, mean, update, metrics = runs
    known = [*data, *_leaves(call.output), loss.output]
    places = {id(each): place for place, each in enumerate(known)}
    gradients = {id(_local(each._value.grad)): place for place, each in enumerate(state.trained)}
    if metrics.output is not logs or list(map(id, update.given)) != list(gradients):
        return None
    if any(id(each) not in places for run in (call, loss, mean, metrics) for each in run.given):
        return None
    parts = [
        _Part(owner.run, run.sort, [(gradients if run is update else places)[id(each)] for each in run.given])
        for owner, run in zip(owners, runs, strict=True)
    ]
    return _WholeStep(state, call.autocast, call.stream_is_whole, *parts)


def _has_run(owner: Replayed | Piece, run: Run) -> bool:
    return owner.has_run(run)


def _leaves(output: Any) -> Sequence[Any]:
    return [output] if type(output) is torch.Tensor else tree_flatten(output)[0]


def _local(gradient: Any) -> Any:
    return gradient._local_tensor if isinstance(gradient, DTensor) else gradient
