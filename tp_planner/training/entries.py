"""Entries: Keras's calls that set a parallel model to work; all ranks make them together, or hear who does not."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

import keras

from tp_planner.ir.errors import ParallelRuntimeError
from tp_planner.ir.placement import Shard
from tp_planner.job.rendezvous import exchange, meet
from tp_planner.layers.apply import Applied
from tp_planner.training.callbacks import working_together

PHASES = {"fit": "train", "evaluate": "test", "predict": "predict"}  # the methods, and what callbacks call them
_OF_ONE_THAT_ENDED = ("Connection closed by peer", "Connection reset by peer")  # what gloo says


@contextlib.contextmanager
def entered(what: str) -> Iterator[None]:
    """Inside, all ranks are in the same call, and callbacks act once for all of them.

    Raises ParallelRuntimeError if another rank ends before, or calls something else, or ends meanwhile.
    """
    meet(what)
    try:
        with working_together():
            yield
    except RuntimeError as error:
        if any(words in str(error) for words in _OF_ONE_THAT_ENDED):
            raise ParallelRuntimeError(f"{what}: the process of another rank has ended; see its error there") from error
        raise


def entering(model: keras.Model, name: str, applied: Applied) -> Callable[..., Any]:
    """Return what replaces a method of a parallel model, one of ``PHASES``."""
    plain = getattr(type(model), name)
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def entry(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(model, *args, **kwargs)
        given = call.arguments.get("callbacks")
        if _needs_equal_steps(name, applied) and not isinstance(given, keras.callbacks.CallbackList):
            others = [each for each in keras.tree.flatten(given) if each is not None]
            call.arguments["callbacks"] = [*others, EqualSteps(name)]
        with entered(f"model.{name}"):
            return plain(*call.args, **call.kwargs)

    return entry


def _needs_equal_steps(name: str, applied: Applied) -> bool:
    """Whether replicas meet in each step: for gradients, losses and metrics, or for weights that are in parts."""
    in_parts = any(isinstance(each.batch_placement, Shard) for each in applied.plan.variables)
    return applied.replicas is not None and (name != "predict" or in_parts)


class EqualSteps(keras.callbacks.Callback):
    """Raises ParallelRuntimeError on all ranks, before the first step, if they were given different numbers of batches.

    Args:
        name: the method that is called.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        setattr(self, f"on_{PHASES[name]}_begin", self._compare)

    def _compare(self, logs: Any = None) -> None:
        what = f"the number of batches of model.{self._name}"
        counts = [json.loads(text) for text in exchange(what, json.dumps(self.params.get("steps")))]
        for rank, count in enumerate(counts):
            if count != counts[0]:
                raise ParallelRuntimeError(
                    f"model.{self._name}: rank 0 was given {counts[0]} batches, rank {rank} {count}; replicas take "
                    f"each step together: give all the same number, of which the last may be shorter"
                )
