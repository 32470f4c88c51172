"""Checking: training steps of a parallel model compared with its plan while they run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import keras

from tp_planner.ir.contract import Recording
from tp_planner.ir.errors import ContractError
from tp_planner.ir.placement import Shape
from tp_planner.job.rendezvous import exchange
from tp_planner.layers.apply import Applied
from tp_planner.regions.recording import CollectiveRecorder
from tp_planner.training.accumulation import count_of, micro_steps_of


class Recorder:
    """Sees a training step; ``recording`` is what it saw so far."""

    def __init__(self, collectives: CollectiveRecorder, optimizer: Any) -> None:
        self._collectives, self._optimizer = collectives, optimizer
        self._before = self._made
        self._inputs: tuple[tuple[Shape, str], ...] = ()

    def see_inputs(self, model: keras.Model, args: Any, kwargs: Any) -> None:
        """Note the inputs of the model's first call."""
        if not self._inputs:
            arrays = [leaf for leaf in keras.tree.flatten((args, kwargs)) if hasattr(leaf, "shape")]
            self._inputs = tuple((tuple(array.shape), keras.backend.standardize_dtype(array.dtype)) for array in arrays)

    @property
    def recording(self) -> Recording:
        made, micro_steps = self._made, micro_steps_of(self._optimizer)
        updates = made == self._before or made // micro_steps > self._before // micro_steps
        return Recording(self._inputs, tuple(self._collectives.collectives), updates)

    @property
    def _made(self) -> int:
        """How many micro-steps the model's optimizer has made, if it makes any."""
        return count_of(self._optimizer) if micro_steps_of(self._optimizer) > 1 else 0


@contextlib.contextmanager
def recording(model: keras.Model, applied: Applied) -> Iterator[Recorder]:
    """Record what the parallel ``model`` communicates inside."""
    collectives = CollectiveRecorder(applied.axes)
    recorder = Recorder(collectives, getattr(model, "optimizer", None))
    hook = model.register_forward_pre_hook(recorder.see_inputs, with_kwargs=True)
    try:
        with collectives.naming_layers(model), collectives:
            yield recorder
    finally:
        hook.remove()


def check_first_step(model: keras.Model, applied: Applied) -> None:
    """Compare the next training step by Keras with the plan; the steps after it run as ever."""
    train_step, own = model.train_step, model.__dict__.get("train_step")

    def remove() -> None:
        model.__dict__.pop("train_step", None)
        if own is not None:
            model.__dict__["train_step"] = own

    @functools.wraps(train_step)
    def checked(data: Any) -> Any:
        remove()
        with recording(model, applied) as recorder:
            result = train_step(data)
        check_on_all_ranks(applied, recorder.recording)
        return result

    model.__dict__["train_step"] = checked
    applied.undo.append(remove)


def check_on_all_ranks(applied: Applied, seen: Recording) -> None:
    """Raise ContractError on every rank if the step was not as planned on any."""
    problem = ""
    try:
        applied.plan.check(seen)
    except ContractError as error:
        problem = str(error)
    answers = exchange("checking the first training step", problem)
    for rank, answer in enumerate(answers):
        if answer:
            raise ContractError(f"the first training step was not as planned: on rank {rank}, {answer}")
