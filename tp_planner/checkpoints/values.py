"""Values for a model from a file of weights.

Each rank makes its own shards, one variable after the other, and has nothing else in memory but what it reads at the
moment. What is missing, or does not fit, is found before anything is read.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import torch

from tp_planner.checkpoints.contents import MODEL, lack, names_there
from tp_planner.checkpoints.formats.opening import is_of_keras, open_weights
from tp_planner.checkpoints.formats.stored import StoredTensor, Weights
from tp_planner.checkpoints.progress import structure_in
from tp_planner.checkpoints.reading import Reading
from tp_planner.frontend.keras_files import places_in_files
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.ir.errors import PlanError
from tp_planner.storage.sharding import Sharding

# Returns this rank's stored tensor of a variable: (variable, sharding) -> local tensor
Values = Callable[[Any, Sharding], torch.Tensor]
Tensors = Mapping[int, StoredTensor]  # by the ``id`` of a variable
Names = Mapping[str, str]  # the key of a variable, and the name of its tensor in a file


def lacks_values(model: keras.Model) -> bool:
    """Whether some of the model's variables were built on the meta device."""
    return any(variable._value.is_meta for variable in named_variables(model).values())


@contextlib.contextmanager
def tensors_for(model: keras.Model, path: Path, names: Names | None) -> Iterator[Tensors]:
    """Yield the tensor of each variable in a file, by the ``id`` of the variable.

    Args:
        model: a built model, plain, on any device.
        path: a file or folder of weights.
        names: names in the file by the variables' keys, where they are others than those that the format gives: in
            Keras's files the place in the model, in others the key.

    Raises:
        PlanError: with every variable that the file has not, or has with another shape or kind of number.
    """
    with open_weights(path) as weights:
        found = _find(model, weights, _names_in(model, weights, dict(names or {})))
        yield {id(variable): found[key] for key, variable in named_variables(model).items()}


def values_of(tensors: Tensors, reading: Reading, device: torch.device) -> Values:
    """Return what reads this rank's part of each variable, to its device."""

    def read(variable: Any, sharding: Sharding) -> torch.Tensor:
        shape = tuple(variable.shape)
        part = torch.empty(sharding.local_shape(shape), dtype=variable._value.dtype, device=device)
        reading.read(tensors[id(variable)], sharding.pieces(shape), part)
        return part

    return read


def _names_in(model: keras.Model, weights: Weights, given: dict[str, str]) -> dict[str, str]:
    """Return the name of each variable's tensor in a file, by the variable's key."""
    variables = named_variables(model)
    if unknown := sorted(set(given) - set(variables)):
        close = difflib.get_close_matches(unknown[0], variables, 1)
        raise PlanError(
            f"names= has {unknown[0]!r}, which is no variable of model {model.name!r}"
            + (f"; closest: {close[0]!r}" if close else "")
        )
    if is_of_keras(weights.path):
        return _places(model, variables) | given
    if structure := structure_in(weights.path):
        there = names_there(structure, weights.tensors, model)
        if lacking := [MODEL + key for key in variables if MODEL + key not in there and key not in given]:
            raise PlanError([lack(weights.path, name, structure, model) for name in lacking])
        return {key: there.get(MODEL + key, key) for key in variables} | given
    apart = not any(key in weights.tensors for key in variables)
    return {key: MODEL + key if apart else key for key in variables} | given


def _places(model: keras.Model, variables: Mapping[str, Any]) -> dict[str, str]:
    keys = {id(variable): key for key, variable in variables.items()}
    keys |= {id(variable._value): key for key, variable in variables.items()}
    return {keys[id(value)]: place for place, value in places_in_files(model).items() if id(value) in keys}


def renamed(weights: Weights, model: keras.Model | None, of_keras: bool, to_keras: bool) -> dict[str, StoredTensor]:
    """Return tensors of a model by the names that another file has: Keras's places in the model, or the keys.

    Raises PlanError if names have to change and there is no model to tell how, or the model has others.
    """
    apart = any(name.startswith(MODEL) for name in weights.tensors)
    if of_keras == to_keras and not apart:
        return dict(weights.tensors)
    if not of_keras and not to_keras:
        kept = {name: tensor for name, tensor in weights.tensors.items() if name.startswith(MODEL)}
        return {name.removeprefix(MODEL): tensor for name, tensor in kept.items()}
    if model is None:
        raise PlanError(
            f"{weights.path}: names in Keras's files are places in a model, others are those of variables; "
            f"give --model, which tells which is which"
        )
    variables = named_variables(model)
    found, places = _find(model, weights, _names_in(model, weights, {})), _places(model, variables)
    return {places[key] if to_keras else key: tensor for key, tensor in found.items()}


def _find(model: keras.Model, weights: Weights, names: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Return each variable's tensor; raise PlanError with all that is wrong."""
    found, problems = {}, []
    for key, variable in named_variables(model).items():
        name = names.get(key, key)
        tensor = weights.tensors.get(name)
        if tensor is None:
            close = difflib.get_close_matches(name, weights.tensors, 1, 0.5)
            closest = f"; closest: {close[0]!r}, which names= can say" if close else ""
            problems.append(f"{weights.path} has no tensor {name!r} for variable {key!r}{closest}")
        elif problem := misfit(tensor, variable):
            problems.append(f"{weights.path}: tensor {name!r} {problem} of variable {key!r}")
        else:
            found[key] = tensor
    if problems:
        raise PlanError(problems)
    return found


def misfit(tensor: StoredTensor, variable: Any) -> str:
    """Return why a stored tensor cannot be the value of a variable, as the middle of a sentence; "" if it can."""
    wanted: torch.dtype = variable._value.dtype
    if tensor.shape != tuple(variable.shape):
        return f"has shape {tensor.shape}, not the {tuple(variable.shape)}"
    if tensor.dtype.is_floating_point != wanted.is_floating_point:
        return f"is of {tensor.dtype}, not the {wanted}"
    return ""
