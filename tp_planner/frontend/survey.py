"""Survey: the layers and variables of a built Keras model as plain facts, read off without running it."""

from __future__ import annotations

from typing import Any

import keras

from tp_planner.frontend.contractions import contractions_of, is_dropout
from tp_planner.frontend.layer_tree import named_layers, named_variables, own_variables
from tp_planner.frontend.penalties import penalty_kind
from tp_planner.frontend.stretches import Stretch
from tp_planner.frontend.torch_modules import keeps_parameters_elsewhere
from tp_planner.ir.graph import LayerInfo, VariableInfo

Surveyed = tuple[dict[str, LayerInfo], dict[str, VariableInfo]]  # by name, and by key


def survey(model: keras.Model) -> Surveyed:
    """Return the layers by name and the variables by key, each in a fixed order."""
    keys = {id(variable): key for key, variable in named_variables(model).items()}
    layers: dict[str, LayerInfo] = {}
    variables: dict[str, VariableInfo] = {}
    for name, layer in named_layers(model).items():
        own = [keys[id(variable)] for variable in own_variables(layer)]
        layers[name] = LayerInfo(
            name=name,
            path=layer.path or name,
            class_name=type(layer).__name__,
            variables=tuple(own),
            contractions=contractions_of(layer, keys),
            is_dropout=is_dropout(layer),
            is_stretch=isinstance(layer, Stretch),
        )
        for key, variable in zip(own, own_variables(layer), strict=True):
            if key not in variables:
                variables[key] = _variable_info(key, variable, name, layer)
    return layers, variables


def _why_kept_whole(variable: Any, layer: keras.Layer) -> str:
    is_state = len(variable.shape) < 2  # of a seed generator or a counter; larger ones are quantized weights
    if not variable._value.is_floating_point() and is_state:
        return f"{keras.backend.standardize_dtype(variable._dtype)} state is kept whole on every rank"
    if keeps_parameters_elsewhere(layer):
        return "parameters of torch's recurrent modules are kept whole on every rank: the modules hold them twice"
    return ""


def _variable_info(key: str, variable: Any, owner: str, layer: keras.Layer) -> VariableInfo:
    tensor = variable._value
    return VariableInfo(
        key=key,
        path=key.partition("#")[0],
        name=variable.name,
        shape=tuple(variable.shape),
        dtype=keras.backend.standardize_dtype(variable._dtype),
        itemsize=tensor.element_size(),
        trainable=bool(variable.trainable and tensor.requires_grad),
        owner=owner,
        kept_whole=_why_kept_whole(variable, layer),
        penalty=penalty_kind(variable.regularizer),
    )
