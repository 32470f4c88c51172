"""The residual stream of a parallel model: sharded over the sequence inside the model's calls, and only there.

Where the model is called on a length that does not divide, ranks keep the stream whole in that call, which is the
plan without sequence parallelism. So do calls of single layers from outside, as in generating text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import torch

from tp_planner.frontend.calling import is_symbolic
from tp_planner.frontend.layer_tree import named_layers
from tp_planner.regions.calls import running, stream_in_shards
from tp_planner.storage.log import logger
from tp_planner.storage.variables import local_tensor

MOST_SHAPES = 256  # of which is known whether they divide


def shard_stream(model: keras.Model, parts: int) -> Callable[[], None]:
    """Let calls of the model shard its residual stream in ``parts``; return what ends this."""
    plain = model._call_impl
    whole: dict[tuple[Any, ...], bool] = {}  # by the shapes of a call's inputs

    # As calls of parallel layers are.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_symbolic() or not running.stream_is_whole:
            return plain(*args, **kwargs)
        shapes = tuple(
            tuple(leaf.shape) for leaf in keras.tree.flatten((args, kwargs)) if isinstance(leaf, torch.Tensor)
        )
        if shapes not in whole:
            if len(whole) == MOST_SHAPES:
                whole.clear()
            give_back = _keeper_of_state(model)
            try:
                with stream_in_shards():
                    result = plain(*args, **kwargs)
                whole[shapes] = False
                return result
            except Exception:
                if not running.indivisible:
                    raise
            _say(model, running.indivisible, parts)
            running.indivisible, whole[shapes] = 0, True
            give_back()
        with contextlib.nullcontext() if whole[shapes] else stream_in_shards():
            return plain(*args, **kwargs)

    model.__dict__["_call_impl"] = call
    return lambda: model.__dict__.pop("_call_impl")


def _say(model: keras.Model, length: int, parts: int) -> None:
    logger.warning(
        "[ModelParallel] model %r was called on inputs that make its sequence %d long, which does not divide by %d: "
        "calls on such inputs keep the residual stream whole on every rank",
        model.name,
        length,
        parts,
    )


def _keeper_of_state(model: keras.Model) -> Callable[[], None]:
    """Return what gives the model the state that it has now: its seeds and statistics, and torch's random state."""
    layers = named_layers(model).values()
    generators = {id(each): each for layer in layers for each in layer._seed_generators}.values()
    variables = [generator.state for generator in generators]
    variables += [variable for layer in layers for variable in layer._non_trainable_variables]
    values = [local_tensor(variable).clone() for variable in variables]
    state = torch.get_rng_state()

    def give_back() -> None:
        with torch.no_grad():
            for variable, value in zip(variables, values, strict=True):
                local_tensor(variable).copy_(value)
        torch.set_rng_state(state)

    return give_back
