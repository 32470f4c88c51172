"""Deferred initialization: models are built without values, and their variables remember how they begin."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import keras
import torch
from keras.src.random import seed_generator

from tp_planner.frontend.keras_internals import convert_to_tensor
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.frontend.valueless import without_values
from tp_planner.ir.errors import PlanError
from tp_planner.job.rendezvous import exchange
from tp_planner.patches import replaced, wrapped
from tp_planner.storage.sharding import Sharding
from tp_planner.storage.variables import BackendVariable

Values = Callable[[Any, Sharding], torch.Tensor]  # this rank's stored tensor: (variable, sharding) -> local tensor
ATTRIBUTE = "_tp_planner_initializer"
CONSTANTS = keras.initializers.Zeros, keras.initializers.Ones, keras.initializers.Constant


@contextlib.contextmanager
def deferred_init() -> Iterator[None]:
    """Inside, Keras models are built on the meta device, without values, and remember how each variable begins.

    ``parallelize`` then runs each initializer, and has each rank keep its shard: no rank holds the whole model. The
    values are those of a model that is built on the CPU from the same seed.

    >>> with tp_planner.deferred_init():  # doctest: +SKIP
    ...     model = build_model()
    >>> tp_planner.parallelize(model, layout_map)  # doctest: +SKIP
    """
    with wrapped(BackendVariable, "__init__", _remembering, "values are made later, in shards"), without_values():
        yield


def _remembering(plain: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(plain)
    def __init__(self: Any, initializer: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(initializer, str):  # Keras draws its seed now
            initializer = keras.initializers.get(initializer)
        plain(self, initializer, *args, **kwargs)
        self.__dict__[ATTRIBUTE] = initializer

    return __init__


def initial_values(model: keras.Model, scatter: Values, device: torch.device) -> Values:
    """Return what makes this rank's part of a variable's initial value; every rank has to ask for all, in one order.

    Where an initializer is Keras's, with a seed or constant, each rank runs it and keeps its part, with rank 0's seed.
    Of any other rank 0's value counts, which ``scatter`` sends part by part.
    One variable is whole at a time, on the host.

    Raises PlanError for variables whose initializer is not known, or draws from a generator that others draw from.
    """
    initializers = _initializers(model)
    seeds = {key: seed for key, each in initializers.items() if isinstance(seed := getattr(each, "seed", None), int)}
    agreed: dict[str, int] = json.loads(exchange("the seeds of initializers", json.dumps(seeds))[0])
    keys = {id(variable): key for key, variable in named_variables(model).items()}

    def part(variable: Any, sharding: Sharding) -> torch.Tensor:
        key, shape = keys[id(variable)], tuple(variable.shape)
        initializer = initializers[key]
        if isinstance(initializer, CONSTANTS):
            return _run(key, initializer, sharding.local_shape(shape), variable).to(device)
        if key in agreed:
            initializer = copy.copy(initializer)
            initializer.seed = agreed[key]
            whole = _run(key, initializer, shape, variable)
            own: torch.Tensor = sharding.own(whole).to(device, copy=True, memory_format=torch.contiguous_format)
            return own
        whole = _run(key, initializer, shape, variable)  # by all, so that all hear of what is wrong with it
        return scatter(SimpleNamespace(_value=whole, shape=shape), sharding)

    return part


def _initializers(model: keras.Model) -> dict[str, Any]:
    """Return the initializers of the model's variables, by key."""
    variables = named_variables(model)
    unknown = [key for key, variable in variables.items() if ATTRIBUTE not in variable.__dict__]
    if unknown:
        raise PlanError(
            f"model {model.name!r} was built on the meta device, so that {unknown[0]!r} and {len(unknown) - 1} other "
            f"variables hold no values; give parallelize weights=, or build the model under tp_planner.deferred_init() "
            f"to have initializers run"
        )
    found = {key: variable.__dict__[ATTRIBUTE] for key, variable in variables.items()}
    for key, initializer in found.items():
        if isinstance(getattr(initializer, "seed", None), keras.random.SeedGenerator):
            raise PlanError(
                f"the initializer of {key!r} draws from a SeedGenerator, so that its values depend on those that ran "
                f"before; give it an integer as seed"
            )
    return found


def _run(key: str, initializer: Any, shape: tuple[int, ...], variable: Any) -> torch.Tensor:
    def refuse() -> Any:
        raise PlanError(
            f"the initializer of {key!r} draws from Keras's global generator, so that its values depend on what ran "
            f"before; give it an integer as seed"
        )

    why = "initial values are the same on all ranks, in whatever order they are made"
    with keras.device("cpu"), replaced(seed_generator, "global_seed_generator", refuse, why), torch.no_grad():
        value = initializer(shape, dtype=variable.dtype) if callable(initializer) else initializer
        tensor: torch.Tensor = convert_to_tensor(value, dtype=variable.dtype)
    return tensor.detach()
