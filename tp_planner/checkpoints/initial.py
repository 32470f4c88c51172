"""Deferred initialization: models are built without values, and their variables remember how they begin."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import keras
import torch
from keras.src.random import seed_generator
from keras.src.saving import saving_lib

from tp_planner.checkpoints.waiting_loads import (
    INITIALIZER,
    forget_loads,
    let_converters_wait,
    let_loads_wait,
    read_waiting,
)
from tp_planner.frontend.keras_internals import convert_to_tensor
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.frontend.valueless import without_values
from tp_planner.ir.errors import PlanError
from tp_planner.job.rendezvous import exchange
from tp_planner.job.together import together
from tp_planner.patches import replaced, wrapped
from tp_planner.storage.sharding import Sharding
from tp_planner.storage.variables import BackendVariable, local_tensor

Values = Callable[[Any, Sharding], torch.Tensor]  # this rank's stored tensor: (variable, sharding) -> local tensor
READING = "reading weights in tp_planner.parallelize"
CONSTANTS = keras.initializers.Zeros, keras.initializers.Ones, keras.initializers.Constant


@contextlib.contextmanager
def deferred_init() -> Iterator[None]:
    """Inside, Keras models are built on the meta device, without values, and remember how each variable begins.

    ``parallelize`` then runs each initializer, and has each rank keep its shard: no rank holds the whole model. The
    values are those of a model that is built on the CPU from the same seed. What ``load_weights`` and KerasHub's
    ``from_preset`` read waits as well: ``parallelize`` has each rank read its shards, one variable after the other.

    >>> with tp_planner.deferred_init():  # doctest: +SKIP
    ...     model = keras_hub.models.CausalLM.from_preset("llama-3-8b", preprocessor=None)
    >>> tp_planner.parallelize(model, layout_map)  # doctest: +SKIP
    """
    let_loads_wait()
    why = "values are made later, in shards"
    with (
        wrapped(BackendVariable, "__init__", _remembering, why),
        wrapped(saving_lib, "load_model", _refusing_files_of_models, why),
        without_values(),
    ):
        yield


def _refusing_files_of_models(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def load_model(filepath: Any, *args: Any, **kwargs: Any) -> Any:
        raise PlanError(
            f"{filepath}: keras.saving.load_model reads all values inside of tp_planner.deferred_init(); call it under "
            f"keras.device('meta') with compile=False, and give parallelize weights={str(filepath)!r}"
        )

    return load_model


def _remembering(plain: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(plain)
    def __init__(self: Any, initializer: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(initializer, str):  # Keras draws its seed now
            initializer = keras.initializers.get(initializer)
        plain(self, initializer, *args, **kwargs)
        let_converters_wait()
        self.__dict__[INITIALIZER] = initializer

    return __init__


def initial_values(
    model: keras.Model, scatter: Values, device: torch.device, keys: Collection[str] | None = None
) -> Values:
    """Return what makes this rank's part of a variable's initial value; every rank has to ask for all, in one order.

    All are those of the ``keys``, if they are given.

    Where an initializer is Keras's, with a seed or constant, each rank runs it and keeps its part, with rank 0's seed.
    Of any other rank 0's value counts, which ``scatter`` sends part by part.
    One variable is whole at a time, on the host.

    Raises PlanError for variables whose initializer is not known, or draws from a generator that others draw from.
    """
    initializers = _initializers(model, keys)
    seeds = {key: seed for key, each in initializers.items() if isinstance(seed := getattr(each, "seed", None), int)}
    agreed: dict[str, int] = json.loads(exchange("the seeds of initializers", json.dumps(seeds))[0])
    names = {id(variable): key for key, variable in named_variables(model).items()}

    def part(variable: Any, sharding: Sharding) -> torch.Tensor:
        key, shape = names[id(variable)], tuple(variable.shape)
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


def read_and_initialize(
    model: keras.Model, shardings: Mapping[str, Sharding], scatter: Values, device: torch.device
) -> None:
    """Make the loads that wait for a model, whose variables are in place but hold nothing, and initialize the rest.

    Args:
        model: a model to which a plan was applied.
        shardings: how its variables are stored, by key.
        scatter: as for ``initial_values``.
        device: of this rank.

    Raises PlanError for what cannot be read, on all ranks, and as ``initial_values`` does.
    """
    variables = named_variables(model)
    filled = together(READING, lambda: read_waiting(variables.values()))
    rest = [key for key, variable in variables.items() if id(variable) not in filled]
    if len(set(exchange(READING, json.dumps(rest)))) > 1:
        raise PlanError("ranks have read different variables of the model; give all of them the same files")
    part = initial_values(model, scatter, device, rest)
    for key in rest:
        with torch.no_grad():
            local_tensor(variables[key]).copy_(part(variables[key], shardings[key]))
    forget_loads(variables.values())


def _initializers(model: keras.Model, keys: Collection[str] | None) -> dict[str, Any]:
    """Return the initializers of the model's variables, by key."""
    variables = {key: each for key, each in named_variables(model).items() if keys is None or key in keys}
    unknown = [key for key, variable in variables.items() if INITIALIZER not in variable.__dict__]
    if unknown:
        raise PlanError(
            f"model {model.name!r} was built on the meta device, so that {unknown[0]!r} and {len(unknown) - 1} other "
            f"variables hold no values; give parallelize weights=, or build the model under tp_planner.deferred_init() "
            f"to have initializers run"
        )
    found = {key: variable.__dict__[INITIALIZER] for key, variable in variables.items()}
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
