"""Whether a layer computes the same on shards of its variables as on a single device, layout by layout.

The model of a case is built once. It computes by itself, then under each layout in turn, and is restored after each.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np
import torch
import torch.distributed as dist

import tp_planner
from tests.layer_zoo import CASES, NEIGHBOURS, LayerCase, weights
from tests.workers import layout_map
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.ir.plan import Plan

Axes = tuple[str | None, ...]
Rules = Mapping[str, Axes]
Arrays = dict[str, np.ndarray]
Verdict = Literal["equal", "refused", "different", "failed"]

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}  # what has another dtype is equal, or it is not
# What users may choose, and what sums of another order may differ by in it.
OF_USERS = {
    "float64": 1e-5,  # Keras promotes to float32 in products
    "float32": 1e-5,
    "float16": 2e-2,
    "bfloat16": 1e-1,
    "mixed_float16": 2e-2,
    "mixed_bfloat16": 1e-1,
}


@dataclass(frozen=True, slots=True)
class Sharding:
    """A layout of one model. One that shards one dim of one variable says of which ``variable``, by its path."""

    name: str
    rules: Rules
    variable: str = ""


@dataclass(frozen=True, slots=True)
class Use:
    """How a layer reads one of its sharded variables, in the words of the plan."""

    variable: str
    style: str
    on_shards: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one layout of one case. ``detail`` is the refusal, the differences or the error."""

    case: str
    width: int
    processes: int
    sharding: Sharding
    verdict: Verdict
    detail: str = ""
    uses: tuple[Use, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether it is equal, or refused with the message that is known of the case."""
        known = CASES[self.case].refusal
        refused_as_known = self.verdict == "refused" and known is not None and re.fullmatch(known, self.detail)
        return self.verdict == "equal" or bool(refused_as_known)

    def __str__(self) -> str:
        where = f"{self.case}, width {self.width}, {self.processes} processes, {self.sharding.name}"
        return f"{where}: {self.verdict}{': ' if self.detail else ''}{self.detail}"


# Layouts


def all_shardings(model: keras.Model) -> list[Sharding]:
    """Return each dim of each variable by itself, then the layouts that name all variables."""
    return [*single_shardings(model), *joint_shardings(model).values()]


def single_shardings(model: keras.Model) -> list[Sharding]:
    """Return a layout for each dim of each variable of the layer."""
    return [
        Sharding(f"{key} {tuple(variable.shape)} on dim {dim}", _rules([(key, variable, dim)]), key)
        for key, variable in weights(model).items()
        for dim in range(len(variable.shape))
    ]


def joint_shardings(model: keras.Model) -> dict[str, Sharding]:
    """Return the layouts that name all variables of the layer, or what is before and after it."""
    with_dims = [(key, variable) for key, variable in weights(model).items() if len(variable.shape)]
    first, last = (_rules([(key, variable, dim) for key, variable in with_dims]) for dim in (0, -1))
    neighbours = _neighbour_rules({variable.path for variable in model.variables})
    rules = {
        "all variables on their first dim": first,
        "all variables on their last dim": last,
        "all variables on their last dim, between sharded neighbours": {**neighbours, **last},
        "no variable, between sharded neighbours": neighbours,
    }
    return {name: Sharding(name, each) for name, each in rules.items() if each}


def sample(model: keras.Model, width: int) -> list[Sharding]:
    """Return the layout that says most about a layer: all of it sharded, in another way for each width."""
    joint = joint_shardings(model)
    dims = "last dim, between sharded neighbours" if width == 8 else "first dim"
    wanted = joint.get(f"all variables on their {dims}")
    return [] if wanted is None else [wanted]


def _rules(dims: Iterable[tuple[str, Any, int]]) -> Rules:
    rules: dict[str, Axes] = {}
    for key, variable, dim in dims:
        axes: list[str | None] = [None] * len(variable.shape)
        axes[dim] = "model"
        rules[re.escape(key)] = tuple(axes)
    return rules


def _neighbour_rules(paths: set[str]) -> Rules:
    """Return rules under which the layer's input arrives sharded, and its output may leave so."""
    rules: dict[str, Axes] = {
        "before/kernel": (None, "model"),
        "before/bias": ("model",),
        "before/embeddings": (None, "model"),
        "after/kernel": ("model", None),
    }
    return {path: axes for path, axes in rules.items() if path in paths}


# On the ranks


def compare_all(name: str, width: int) -> list[Outcome]:
    """Return what comes of every layout of one case; notes of plans are not logged."""
    logging.disable()
    return _compare_each(CASES[name], width, all_shardings(CASES[name].build(width)))


def compare_sample(names: Iterable[str], width: int, dtype: str = "") -> list[Outcome]:
    """Return what comes of the sample of each of the cases: in exact float64, or in a dtype as users choose it."""
    found = []
    for name in names:
        found += _compare_each(CASES[name], width, sample(CASES[name].build(width), width), dtype)
    return found


def _compare_each(case: LayerCase, width: int, shardings: Iterable[Sharding], dtype: str = "") -> list[Outcome]:
    """Return an outcome for each layout; a model that a layout has broken is built anew."""
    build = functools.partial(case.build, width, dtype, exact=False) if dtype else functools.partial(case.build, width)
    model = build()
    state = _state(model)
    expected = compute(model, case)
    outcomes = []
    for sharding in shardings:
        _set_state(model, state)
        verdict, detail, uses = _compare(model, case, sharding, expected, OF_USERS.get(dtype, 0.0))
        outcomes.append(Outcome(case.name, width, dist.get_world_size(), sharding, verdict, detail, uses))
        if verdict == "failed":
            model = build()
    return outcomes


def _compare(
    model: keras.Model, case: LayerCase, sharding: Sharding, expected: Arrays, tolerance: float
) -> tuple[Verdict, str, tuple[Use, ...]]:
    try:
        plan = tp_planner.plan(model, layout_map(sharding.rules))
        tp_planner.parallelize(model, plan)
        found = compute(model, case)
        sharded = _state(model)
        tp_planner.restore(model)
    except tp_planner.PlanError as refusal:
        return "refused", str(refusal), ()
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}", ()
    problems = [*differences(found, expected, plan.input_gradients, tolerance)]
    restored = _state(model)
    problems += [f"{key} is not restored" for key in restored if not np.array_equal(restored[key], sharded[key])]
    return "different" if problems else "equal", "; ".join(problems), tuple(_uses(plan))


def compute(model: keras.Model, case: LayerCase) -> Arrays:
    """Return outputs in training and in inference, the loss, all gradients, and the state after each of the calls."""
    keras.utils.set_random_seed(0)
    x = torch.from_numpy(case.batch())
    x.requires_grad_(x.is_floating_point())
    model.zero_grad()
    output = model(x, training=True)
    found = {"training output": _whole(output)}
    if case.trains:
        target = torch.from_numpy(np.random.default_rng(4).standard_normal(tuple(output.shape)))
        loss = ((output - target) ** 2).mean()
        loss.backward()
        found |= {"loss": _whole(loss), **_gradients(model)}
        if x.grad is not None:
            found["gradient of the input"] = _whole(x.grad)
    found |= {f"{key} after training": array for key, array in _state(model).items()}
    with torch.no_grad():
        found["inference output"] = _whole(model(x, training=False))
    return found | {f"{key} after inference": array for key, array in _state(model).items()}


def _gradients(model: keras.Model) -> Arrays:
    gradients = {key: variable.value.grad for key, variable in named_variables(model).items() if variable.trainable}
    return {f"gradient of {key}": _whole(gradient) for key, gradient in gradients.items() if gradient is not None}


def _state(model: keras.Model) -> Arrays:
    return {key: _whole(variable.value) for key, variable in named_variables(model).items()}


def _set_state(model: keras.Model, state: Arrays) -> None:
    for key, variable in named_variables(model).items():
        variable.assign(state[key])


def _whole(tensor: Any) -> np.ndarray:
    tensor = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # which NumPy does not have
    whole: np.ndarray = tensor.numpy().copy()
    return whole


def differences(found: Arrays, expected: Arrays, input_gradients: bool, tolerance: float = 0.0) -> Iterator[str]:
    """Yield what is not equal up to ``TOLERANCE``, or another ``tolerance`` if that is more.

    Differences are relative to a value's own size and a tenth of that of all gradients. The second is for gradients
    that are zero but for rounding, as that of a key's bias in attention.
    """
    gradients = [array for key, array in expected.items() if key.startswith("gradient")]
    scale_of_gradients = max(map(_size, gradients), default=0.0)
    for key in sorted(found.keys() | expected.keys()):
        if key == "gradient of the input" and not input_gradients:
            continue
        if key not in found or key not in expected:
            yield f"{key} is there only {'on shards' if key in found else 'on a single device'}"
            continue
        scale = _size(expected[key]) + scale_of_gradients / 10
        error = _size(found[key].astype("float64") - expected[key].astype("float64"))
        allowed = max(tolerance, TOLERANCE.get(expected[key].dtype.name, 0.0)) if expected[key].dtype.kind == "f" else 0
        if not error <= allowed * scale:
            yield f"{key} differs by {error / scale if scale else error:.1e}"


def _size(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0.0))


def _uses(plan: Plan) -> Iterator[Use]:
    """Yield how the layer reads its sharded variables."""
    for layer in plan.layers:
        if layer.layer in NEIGHBOURS:
            continue
        for use in layer.uses:
            gathered = use.boundary.forward.collective is not None
            yield Use(use.variable, layer.style, not gathered, layer.reason)
