"""Inputs: what a model is called with, as it is given or as the model declares it, and the sizes that are left open.

A size is taken from where it is known: from what is given, else from a preprocessor of KerasHub that the model has.
What nobody knows is guessed, and said to be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import torch

from tp_planner.frontend.keras_internals import to_torch_dtype
from tp_planner.ir.errors import PlanError
from tp_planner.ir.plan import GuessedDim

GUESSED_BATCH = 2  # size given to an open batch dim
GUESSED_SIZE = 16  # size given to any other open dim

# Inputs whose length is not that of the sequence, and the attribute of a preprocessor that has it.
_OTHER_LENGTHS = {"mask_positions": "mask_selection_length"}


@dataclass(frozen=True, slots=True)
class CallArguments:
    """What a model is called with: the call's first argument, nested as the model takes it, and others by name.

    Arguments that are no tensors, and have no shape, are passed on as they are. ``are_declared`` says that the model
    declares them, and nobody gave them.
    """

    first: Any
    others: Mapping[str, Any] = field(default_factory=dict)
    are_declared: bool = False

    @classmethod
    def of(cls, inputs: Any) -> CallArguments:
        """Return the arguments where ``inputs`` are these, or the first of them."""
        return inputs if isinstance(inputs, CallArguments) else cls(inputs)

    def map(self, function: Callable[[Any], Any]) -> CallArguments:
        """Return the arguments with the function's results in place of all that have a shape."""
        first, others = keras.tree.map_structure(
            lambda leaf: function(leaf) if hasattr(leaf, "shape") else leaf, (self.first, dict(self.others))
        )
        return CallArguments(first, others, self.are_declared)

    @property
    def tensors(self) -> list[Any]:
        """All that have a shape, in order."""
        return [leaf for leaf in keras.tree.flatten((self.first, dict(self.others))) if hasattr(leaf, "shape")]

    def call(self, model: keras.Model, training: bool) -> Any:
        """Return what the model makes of the arguments."""
        options = {"training": training} if model._call_has_training_arg else {}
        return model(self.first, **self.others, **options)


def known_inputs(model: keras.Model, inputs: Any = None) -> tuple[CallArguments, tuple[GuessedDim, ...]]:
    """Return what a model is called with, of known sizes, and which of them are guesses.

    Args:
        model: the model.
        inputs: as for ``trace``: arrays, tensors or specs, nested as the model takes them, or ``CallArguments`` of
            these. By default those that the model declares.

    Raises:
        PlanError: if the inputs are not known.
    """
    declared = CallArguments(_declared_inputs(model), are_declared=True) if inputs is None else None
    named = _Named.of(declared or CallArguments.of(inputs))
    guessed: list[GuessedDim] = []

    def sized(name: str, spec: Any) -> Any:
        sizes = [_known_size(model, name, spec, dim) if size is None else size for dim, size in enumerate(spec.shape)]
        guesses = {dim: GUESSED_SIZE if dim else GUESSED_BATCH for dim, size in enumerate(sizes) if size is None}
        guessed.extend(GuessedDim(name, dim, guess) for dim, guess in guesses.items())
        sizes = [guesses.get(dim, size) for dim, size in enumerate(sizes)]
        return keras.InputSpec(shape=tuple(sizes), dtype=spec.dtype) if None in spec.shape else spec

    return named.map(sized), tuple(guessed)


def sized_inputs(model: keras.Model, batch: int | None = None, length: int | None = None) -> CallArguments:
    """Return the inputs that a model declares, with these sizes of open batch dims and open lengths.

    A length is dim 1 of an input that leaves no later dim open. What is not given stays open.

    Raises:
        PlanError: if a batch dim is of another size, no length is open or of this size, or the inputs are unknown.
    """
    named = _Named.of(CallArguments.of(_declared_inputs(model)))
    shapes = {name: tuple(spec.shape) for name, spec in named.leaves}
    if batch is not None:
        _require_batch(model, shapes, batch)
    if length is not None and not any(_has_length(name, shape, length) for name, shape in shapes.items()):
        listed = ", ".join(f"{name} {_shape_text(shape)}" for name, shape in shapes.items())
        raise PlanError(f"no input of model {model.name!r} has an open length, dim 1 ({listed}); build it with one")

    def sized(name: str, spec: Any) -> keras.InputSpec:
        shape = list(spec.shape)
        if batch is not None and shape:
            shape[0] = batch
        if length is not None and _has_length(name, tuple(spec.shape)):
            shape[1] = length
        return keras.InputSpec(shape=tuple(shape), dtype=spec.dtype)

    return named.map(sized)


def fake_inputs(model: keras.Model, inputs: Any) -> CallArguments:
    """Return fake tensors nested as the model takes its inputs."""
    return known_inputs(model, inputs)[0].map(_fake_tensor)


@dataclass(frozen=True, slots=True)
class _Named:
    """Arguments of a call, and those of them that have a shape by name, in order."""

    arguments: CallArguments
    leaves: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, arguments: CallArguments) -> _Named:
        found = keras.tree.flatten_with_path((arguments.first, dict(arguments.others)))
        shaped = [(path, leaf) for path, leaf in found if hasattr(leaf, "shape")]
        return cls(arguments, tuple((_name(path, leaf, place), leaf) for place, (path, leaf) in enumerate(shaped)))

    def map(self, function: Callable[[str, Any], Any]) -> CallArguments:
        names = iter([name for name, _ in self.leaves])
        return self.arguments.map(lambda leaf: function(next(names), leaf))


def _name(path: tuple[Any, ...], leaf: Any, place: int) -> str:
    """Return the key of an input in a dict, its own name, or its number."""
    keys = [key for key in path if isinstance(key, str)]
    own = getattr(leaf, "name", None)
    return keys[-1] if keys else own if isinstance(own, str) and own else f"input {place}"


def _known_size(model: keras.Model, name: str, spec: Any, dim: int) -> int | None:
    """Return the size of an open dim that a preprocessor of the model knows."""
    preprocessor = getattr(model, "preprocessor", None)
    if dim == 0 or preprocessor is None or not _is_length(tuple(spec.shape)):
        return None
    side = f"{name.partition('_')[0]}_sequence_length"  # encoder's or decoder's
    wanted = [_OTHER_LENGTHS[name]] if name in _OTHER_LENGTHS else [side, "sequence_length"]
    sizes = [getattr(preprocessor, attribute, None) for attribute in wanted]
    return next((size for size in sizes if isinstance(size, int)), None)


def _is_length(shape: tuple[int | None, ...]) -> bool:
    return len(shape) > 1 and shape[1] is None and None not in shape[2:]


def _has_length(name: str, shape: tuple[int | None, ...], length: int | None = None) -> bool:
    """Whether the input's dim 1 is a length of the sequence that is open, or this one."""
    if name in _OTHER_LENGTHS:
        return False
    return _is_length(shape) or (length is not None and len(shape) > 1 and shape[1] == length)


def _require_batch(model: keras.Model, shapes: Mapping[str, tuple[int | None, ...]], batch: int) -> None:
    for shape in shapes.values():
        if shape and shape[0] not in (None, batch):
            raise PlanError(
                f"an input of model {model.name!r} has batch size {shape[0]}, not {batch}; build it with an open one"
            )


def _shape_text(shape: tuple[int | None, ...]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape) or "scalar"


def _fake_tensor(spec: Any) -> torch.Tensor:
    dtype = keras.backend.standardize_dtype(spec.dtype or keras.config.floatx())
    return torch.empty(tuple(spec.shape), dtype=to_torch_dtype(dtype), device="cpu")


def _declared_inputs(model: keras.Model) -> Any:
    if isinstance(model, keras.Sequential) and model._functional is not None:
        return model._functional._inputs_struct
    if hasattr(model, "_inputs_struct"):
        return model._inputs_struct
    shapes = list((getattr(model, "_build_shapes_dict", None) or {}).values())
    if len(shapes) != 1:
        raise PlanError(
            f"the inputs of subclassed model {model.name!r} are not known; "
            f"pass plan(..., inputs=) with an example batch or keras.InputSpec"
        )
    shape = shapes[0]
    if isinstance(shape, dict):
        return {name: keras.InputSpec(shape=tuple(sizes)) for name, sizes in shape.items()}
    if shape and isinstance(shape[0], list | tuple):
        return [keras.InputSpec(shape=tuple(sizes)) for sizes in shape]
    return keras.InputSpec(shape=tuple(shape))


def describe_inputs(arguments: CallArguments) -> str:
    """Return shapes and dtypes of the inputs, for errors."""
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in arguments.tensors)
