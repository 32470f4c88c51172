"""Generation: what KerasHub's tasks need to generate text with a parallel model.

Of the keys and values that attention keeps, each rank keeps those of its own heads. The tasks make a cache of zeros for
all heads, (batch, 2, length, heads, head size) for each layer or keys and values apart, and give each layer what it
returned before. The zeros are cut where a layer takes them; from then on a cache has a rank's own heads only. Nothing
of it is communicated.

Every rank chooses the next token itself, from the same logits; so all of them have to draw alike.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import torch

from tp_planner.frontend.calling import without_distribution
from tp_planner.ir.errors import ParallelRuntimeError
from tp_planner.ir.placement import Shard
from tp_planner.ir.plan import Plan
from tp_planner.job.axes import Axes, Axis
from tp_planner.job.rendezvous import exchange
from tp_planner.regions.calls import running

CACHE = "cache"  # the argument of a layer's call
KEYS = ("key", "key_dense", "k_proj")  # what the sublayer is called that makes the keys
HEADS, OF_KEYS = -2, Shard(2)  # the dim of a cache, and of keys, (batch, length, heads, head size)


def generating_together(model: keras.Model, plan: Plan, axes: Axes) -> Callable[..., Any]:
    """Return what replaces the ``generate`` of a task of KerasHub.

    Raises:
        ParallelRuntimeError: on all ranks, if ranks of one replica were given different prompts, or if replicas that
            need each other for their weights may stop after different numbers of tokens.
    """
    plain = type(model).generate
    in_parts = any(isinstance(each.batch_placement, Shard) for each in plan.variables)

    @functools.wraps(plain)
    def generate(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        stops = inspect.signature(plain).bind(model, inputs, *args, **kwargs).arguments.get("stop_token_ids", "auto")
        if in_parts and stops is not None:
            raise ParallelRuntimeError(
                f"replicas of model {model.name!r} put their weights together for each token, and have to generate "
                f"equally many: give generate stop_token_ids=None"
            )
        _agree(model, inputs, axes)
        with without_distribution():  # under one, tasks of KerasHub make DTensors of prompts
            return plain(model, inputs, *args, **kwargs)

    return generate


def _agree(model: keras.Model, inputs: Any, axes: Axes) -> None:
    """Let ranks begin with rank 0's seeds; raise ParallelRuntimeError if prompts differ in a replica."""
    replica = 0 if axes.batch is None else axes.batch.rank
    variables = getattr(model.sampler, "variables", [])
    seeds = [keras.ops.convert_to_numpy(each).tolist() for each in variables]
    answers = [json.loads(each) for each in exchange("generate", json.dumps([replica, _digest(inputs), seeds]))]
    prompts: dict[int, tuple[int, str]] = {}
    for rank, (place, digest, _) in enumerate(answers):
        first, expected = prompts.setdefault(place, (rank, digest))
        if digest != expected:
            raise ParallelRuntimeError(
                f"ranks {first} and {rank} were given different prompts; give all ranks of a replica the same"
            )
    for variable, value in zip(variables, answers[0][2], strict=True):
        variable.assign(value)


def _digest(inputs: Any) -> str:
    """Return what differs where prompts do: texts or arrays; empty for data sets."""
    leaves = keras.tree.flatten(inputs)
    if not all(isinstance(leaf, str | int | np.ndarray | torch.Tensor) for leaf in leaves):
        return ""
    texts = [leaf if isinstance(leaf, str) else np.asarray(leaf).tolist() for leaf in leaves]
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=8).hexdigest()


def follow_caches(layer: keras.Layer, name: str, plan: Plan, axis: Axis, model: int) -> Callable[[], None] | None:
    """Let an attention layer keep a cache of this rank's heads; return what undoes it, None for any other layer.

    Args:
        layer: a layer to which ``plan`` is applied.
        name: its name in the plan.
        plan: the plan.
        axis: the model axis.
        model: identifies the parallel model, for its open scopes.
    """
    if CACHE not in inspect.signature(layer.call).parameters:
        return None
    named = {f"{name}/{each}" for each in KEYS}
    keys = next((each for each in plan.layers if each.layer in named and each.output_placement == OF_KEYS), None)
    if keys is None:  # keys of all heads: what their layout says is undone before attention reads them
        return None
    shapes = {each.key: each.shape for each in plan.variables}
    used = [(shapes[use.variable], use.boundary.forward.target) for use in keys.uses]
    heads = next((shape[placement.dim] for shape, placement in used if isinstance(placement, Shard)), 0)
    scope = None if keys.scope in ("", name) else (model, keys.scope)
    before = functools.partial(_with_own_heads, heads, axis, scope)
    return layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove  # type: ignore[no-any-return]


def _with_own_heads(
    heads: int, axis: Axis, scope: tuple[int, str] | None, layer: keras.Layer, args: Any, kwargs: Mapping[str, Any]
) -> tuple[Any, Any] | None:
    """Return a layer's arguments with a cache of all heads cut to this rank's, unless the call has all heads."""
    if kwargs.get(CACHE) is None or (scope is not None and not running.scopes[scope]):
        return None
    own = heads // axis.size

    def cut(held: torch.Tensor) -> torch.Tensor:
        return held.narrow(HEADS, axis.rank * own, own) if held.shape[HEADS] == heads else held

    return args, {**kwargs, CACHE: keras.tree.map_structure(cut, kwargs[CACHE])}
