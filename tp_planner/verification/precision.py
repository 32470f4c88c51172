"""Precision: a model, all of it, and its plan in float64, for the rest of this process."""

from __future__ import annotations

import json
from typing import Any

import keras
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tp_planner.frontend.keras_internals import narrower_dtypes
from tp_planner.frontend.layer_tree import named_layers, named_variables
from tp_planner.ir.verdict import EPSILON
from tp_planner.readable_plan import Plan

NARROW = (torch.float32, torch.bfloat16, torch.float16)


class StaysWide(TorchDispatchMode):
    """Inside, what is cast from float64 to a narrower dtype stays float64.

    Models cast in places: norms to float32, losses to floatx. Rounding there would hide what a comparison in float64 is
    there to find. Keras promotes float64 to float32, too, which ``compute_in_float64`` ends.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        is_wide = isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64 if args else False
        if is_wide and func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in NARROW:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def compute_in_float64(model: keras.Model) -> None:
    """Give the model's layers and variables float64; what Keras makes from now on in this process has it, too."""
    narrower_dtypes["float64"] = "float64"
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    for layer in named_layers(model).values():
        layer._dtype_policy = keras.DTypePolicy("float64")
    for variable in named_variables(model).values():
        value = variable._value
        if value.is_floating_point():
            variable._dtype = "float64"
            value.data = value.data.double()


def widened(plan: Plan, fingerprint: str) -> Plan:
    """Return the plan for the same model in float64, which has another fingerprint: the same decisions."""
    data = _in_float64(json.loads(plan.to_json()))
    return Plan.from_json(json.dumps(data | {"fingerprint": fingerprint}))


def _in_float64(data: Any) -> Any:
    if isinstance(data, list):
        return [_in_float64(each) for each in data]
    if not isinstance(data, dict):
        return data
    found = {key: _in_float64(value) for key, value in data.items()}
    if found.get("dtype") in ("float32", "bfloat16", "float16"):
        found["dtype"] = "float64"
        if "itemsize" in found:
            found["itemsize"] = 8
    return found


def narrowest(model: keras.Model) -> str:
    """Return the dtype in which most is rounded of those that the model's layers compute in."""
    dtypes: set[str] = {layer.compute_dtype for layer in named_layers(model).values()} & EPSILON.keys()
    return max(dtypes, key=EPSILON.__getitem__)
