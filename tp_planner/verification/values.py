"""Values: what a model is verified on, drawn from its shapes: weights, inputs, targets."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import torch

from tp_planner.frontend.inputs import CallArguments
from tp_planner.frontend.layer_tree import named_layers, named_variables

SPREAD = 0.1  # of what is drawn around a value, relative to it


def set_random_weights(model: keras.Model) -> None:
    """Give each floating variable random values around its own, the same in every process, on the CPU.

    No value is left as it was: a bias that is zero, or a scale that is one, hides that it is used twice, or not at all.
    Variables on the meta device have no values, so that theirs are drawn by shape.
    """
    for key, variable in named_variables(model).items():
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        value = variable._value
        shape, dtype = tuple(value.shape), value.dtype
        if value.is_meta:
            own = _like_a_new_one(variable.name, shape, rng) if dtype.is_floating_point else np.zeros(shape)
        else:
            own = value.detach().cpu().to(torch.float64 if dtype.is_floating_point else dtype).numpy()
        if dtype.is_floating_point:
            size = float(np.sqrt(np.mean(np.square(own)))) if own.size else 0.0
            own = own * (1 + SPREAD * rng.uniform(-1, 1, shape)) + SPREAD * (size or 1.0) * rng.uniform(0, 1, shape)
        new = torch.as_tensor(np.ascontiguousarray(own)).to(dtype)
        variable._value = _rebound(model, value, torch.nn.Parameter(new, requires_grad=value.requires_grad))


def _like_a_new_one(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if len(shape) < 2:
        return np.ones(shape) if any(word in name for word in ("gamma", "scale", "variance")) else np.zeros(shape)
    return rng.standard_normal(shape) / math.sqrt(max(math.prod(shape[:-1]), 1))


def _rebound(model: keras.Model, old: torch.nn.Parameter, new: torch.nn.Parameter) -> torch.nn.Parameter:
    """Return the parameter to use: the old one with the new one's data, or the new one wherever the old one was."""
    if old.device == new.device:
        old.data = new.data
        return old
    for layer in named_layers(model).values():
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is old:
                    module._parameters[name] = new
    return new


def without_dropout(model: keras.Model) -> None:
    """Let nothing be dropped: replicas draw masks of their own, which one device on all rows does not."""
    for layer in named_layers(model).values():
        if isinstance(layer, keras.layers.Dropout | keras.layers.GaussianDropout | keras.layers.AlphaDropout):
            layer.rate = 0.0


def random_inputs(specs: CallArguments, limits: Mapping[int, int], rng: np.random.Generator) -> CallArguments:
    """Return arrays for the specs: normal floats, integers below each one's limit (by position), masks mostly true."""
    numbers = iter(range(len(specs.tensors)))

    def draw(spec: Any) -> np.ndarray:
        shape, dtype = tuple(spec.shape), keras.backend.standardize_dtype(spec.dtype)
        limit = limits.get(next(numbers))
        if dtype == "bool":
            return rng.random(shape) < 0.9
        if "int" in dtype:
            return rng.integers(0, limit or 2, shape).astype(dtype)
        return rng.standard_normal(shape).astype("float32" if dtype == "bfloat16" else dtype)

    return specs.map(draw)


def integer_limits(model: keras.Model, specs: CallArguments) -> tuple[dict[int, int], Any]:
    """Call the model on zeros; return how many values an integer input may have, by position, and the outputs.

    An integer input may have as many values as the embedding that reads it has rows.
    """
    zeros = specs.map(lambda spec: torch.zeros(tuple(spec.shape), dtype=_torch_dtype(spec.dtype)))
    position = {leaf.untyped_storage()._cdata: number for number, leaf in enumerate(zeros.tensors)}
    limits: dict[int, int] = {}

    def see(layer: Any, args: tuple[Any, ...]) -> None:
        number = position.get(args[0].untyped_storage()._cdata) if args and isinstance(args[0], torch.Tensor) else None
        if number is not None:
            limits[number] = min(layer.input_dim, limits.get(number, layer.input_dim))

    embeddings = [layer for layer in named_layers(model).values() if isinstance(layer, keras.layers.Embedding)]
    handles = [layer.register_forward_pre_hook(see) for layer in embeddings]
    try:
        with torch.no_grad():
            outputs = zeros.call(model, training=False)
    finally:
        for handle in handles:
            handle.remove()
    return limits, outputs


def _torch_dtype(dtype: Any) -> torch.dtype:
    found: torch.dtype = getattr(torch, keras.backend.standardize_dtype(dtype))
    return found


def random_targets(
    shapes: Sequence[tuple[int, ...]], of_indices: Sequence[bool], rng: np.random.Generator
) -> list[Any]:
    """Return targets for outputs of these shapes: indices of the last dim (int32), or numbers above 0 that add up to 1.

    What adds up to 1 is in the domain of every loss of Keras: probabilities for some, numbers like others for the rest.
    """
    return [
        rng.integers(0, shape[-1], shape[:-1]).astype("int32") if indices else _distribution(shape, rng)
        for shape, indices in zip(shapes, of_indices, strict=True)
    ]


def _distribution(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    drawn = rng.uniform(0.1, 1, shape)
    return (drawn / drawn.sum(-1, keepdims=True) if shape and shape[-1] > 1 else drawn).astype("float32")
