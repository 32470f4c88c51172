"""Models under a distribution: the plan is made and applied when a model is first called on data.

By then all its variables exist, and the inputs are known. The model that is called is the one that is planned, with
all models inside it.
"""

from __future__ import annotations

import contextlib
import functools
import re
import weakref
from collections.abc import Callable, Set
from dataclasses import replace
from typing import Any

import keras
import torch
import torch.distributed as dist
from keras.src.models.model import Trainer
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from tp_planner.api import parallelize
from tp_planner.frontend.calling import in_layer_call, leaves_no_trace
from tp_planner.frontend.inputs import CallArguments
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.frontend.layout_map import read_device_mesh, read_layout_map, read_zero
from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.keras_distribution.births import UnplannedVariable, is_unplanned, not_sharding, paths_born_under
from tp_planner.patches import replaced
from tp_planner.storage.log import logger
from tp_planner.training.entries import PHASES, entered
from tp_planner.training.model import STEPS, applied_to, let_go
from tp_planner.training.totals import logs_of_all
from tp_planner.training.writing import METHODS, is_distributed, written_by_rank_zero

# What Keras has made for the loop that the first call may be in; none is compiled, or planning would have refused.
STEP_FUNCTIONS = ("train_function", "test_function", "predict_function")

# What models may have beside the trainer's methods and calls: KerasHub's tasks have these.
OTHER_ENTRIES = ("generate", "generate_step", "score", "call_with_cache", "call_decoder_with_cache")

_planned: weakref.WeakKeyDictionary[keras.Model, Any] = weakref.WeakKeyDictionary()  # and by which distribution


def under_its_distribution(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a model that runs under the model's own distribution where none is current.

    So a model that was built inside of ``distribution.scope()`` is fed and planned outside as it would be inside.
    """

    @functools.wraps(plain)
    def method(self: keras.Model, *args: Any, **kwargs: Any) -> Any:
        own = None if keras.distribution.distribution() is not None else distribution_of(self)
        with contextlib.nullcontext() if own is None else own.scope():
            begins = plain.__name__ in PHASES and applied_to(self) is None and is_distributed()
            with entered(f"model.{plain.__name__}") if begins else contextlib.nullcontext():
                return plain(self, *args, **kwargs)

    return method


def distribution_of(model: keras.Model) -> Any:
    """Return the distribution by which a model is planned, or under which its variables were born; None without."""
    if applied_to(model) is not None:
        return _planned.get(model)
    return next((variable._born_under for variable in model.variables if is_unplanned(variable)), None)


def planned_when_built(plain: Callable[..., None]) -> Callable[..., None]:
    """Return Keras's ``_maybe_build``, which comes before every call, with the planning of the model after it."""

    @functools.wraps(plain)
    def _maybe_build(self: keras.Model, call_spec: Any) -> None:
        plain(self, call_spec)
        if not (in_layer_call() or leaves_no_trace()) and needs_plan(self) and _is_data(call_spec.first_arg):
            plan_and_apply(self, _arguments_of(self, call_spec))

    return _maybe_build


def with_other_entries(wrap: Callable[..., None], plain: Callable[..., None]) -> Callable[..., None]:
    """Return the creation of Keras's trainer, of which all models are, after which their own entries plan them first.

    Args:
        wrap: puts a wrapper around an attribute, until tp_planner's library is taken out.
        plain: the trainer's ``__init__``.
    """

    @functools.wraps(plain)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        wrappers = (
            (OTHER_ENTRIES, planned_when_entered),
            (METHODS, written_by_rank_zero),
            (STEPS, reporting_all_when_planned),
        )
        for names, wrapper in wrappers:
            for name in names:
                owner = next((each for each in type(self).__mro__ if name in vars(each)), None)
                if owner not in (None, Trainer) and not hasattr(vars(owner)[name], "by_tp_planner"):
                    wrap(owner, name, wrapper)
        plain(self, *args, **kwargs)

    return __init__


def planned_when_entered(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that works with the layers inside a model; the model is planned before, for its own inputs."""

    @functools.wraps(plain)
    def entry(self: keras.Model, *args: Any, **kwargs: Any) -> Any:
        if self.built and not (in_layer_call() or leaves_no_trace()) and needs_plan(self):
            plan_and_apply(self, None)
            return getattr(self, plain.__name__)(*args, **kwargs)  # the one that the plan put there
        return plain(self, *args, **kwargs)

    entry.by_tp_planner = True  # type: ignore[attr-defined]
    return entry


def reporting_all_when_planned(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a user's training or test step: one in which the model was planned reports on the whole batch, too."""

    @functools.wraps(plain)
    def step(self: keras.Model, data: Any) -> Any:
        begins = applied_to(self) is None
        logs = plain(self, data)
        applied = applied_to(self)
        return logs_of_all(self, logs) if begins and applied is not None and applied.replicas is not None else logs

    step.by_tp_planner = True  # type: ignore[attr-defined]
    return step


def checked_before_training(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return Keras's ``_symbolic_build``, which comes before training, refusing what a plan cannot carry out."""

    @functools.wraps(plain)
    def _symbolic_build(self: keras.Model, *args: Any, **kwargs: Any) -> Any:
        if needs_plan(self):
            _refuse_jit(self)
        return plain(self, *args, **kwargs)

    return _symbolic_build


def _refuse_jit(model: keras.Model) -> None:
    if model.compiled and model.jit_compile:  # torch.compile would run the call that plans the model
        raise PlanError(
            f"model {model.name!r} is compiled with jit_compile={model.jit_compile!r} before it is planned; "
            f"call it once and compile it then, or call model.compile(..., jit_compile=False)"
        )


def asking_for_its_step(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a trainer's ``make_train_function``, say, whose function asks a model for its step, called ``name``.

    Planning, which the function begins, puts another there. Keras 3.16 asks once, as it makes the function.
    """

    @functools.wraps(plain)
    def make(self: keras.Model, *args: Any, **kwargs: Any) -> Any:
        if not needs_plan(self):
            return plain(self, *args, **kwargs)
        with replaced(self, name, lambda data: getattr(self, name)(data), "planning will put another step here"):
            return plain(self, *args, **kwargs)

    return make


def not_replicated_by_keras(plain: Callable[..., None]) -> Callable[..., None]:
    """Return the trainer's ``_initialize_ddp``, which Keras 3.16 has, for models that no plan will replicate."""

    @functools.wraps(plain)
    def _initialize_ddp(self: keras.Model) -> None:
        if not needs_plan(self):
            plain(self)

    return _initialize_ddp


def needs_plan(model: keras.Model) -> bool:
    """Whether there is a distribution over several devices by which the model is not planned.

    A model inside a planned one runs as that one's plan says.
    """
    if applied_to(model) is not None:
        return False
    distribution = keras.distribution.distribution() or distribution_of(model)
    if distribution is None or distribution.device_mesh.devices.size == 1:
        return False
    return not any(model in planned._flatten_layers() for planned in _planned if applied_to(planned) is not None)


# The first call may be one of user code under torch.compile.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def plan_and_apply(model: keras.Model, inputs: CallArguments | None) -> None:
    """Plan the model for the current distribution, or its own, and shard it.

    Models that share variables with it are planned anew when they are called next.

    Args:
        model: a built model.
        inputs: what it is called with; None for the inputs that it declares.

    Raises PlanError with all problems; the model is then as before.
    """
    distribution = keras.distribution.distribution() or distribution_of(model)
    layout = _layout_of(distribution)
    with not_sharding():
        _build_rest(model, inputs)
        own = {id(variable) for variable in named_variables(model).values()}
        for other in list(_planned):
            if applied_to(other) is not None and own & {id(each) for each in named_variables(other).values()}:
                _take_back(other)
        running = {name: getattr(model, name, None) for name in STEP_FUNCTIONS}
        layout = _without_rules_for_others(layout, model, paths_born_under(distribution))
        parallelize(model, layout, inputs, batch_axis=distribution.batch_dim_name)
        model.__dict__.update(running)
    _planned[model] = distribution


def _layout_of(distribution: Any) -> Layout:
    if isinstance(distribution, keras.distribution.DataParallel):
        zero = read_zero(getattr(distribution, "zero", 0))  # which users set, as of a LayoutMap
        return Layout(read_device_mesh(distribution.device_mesh), (), zero=zero)
    layout_map = getattr(distribution, "_layout_map", None)
    if layout_map is None:
        raise PlanError(
            f"{type(distribution).__name__} has no layout map to plan by; "
            f"use keras.distribution.ModelParallel(layout_map=..., batch_dim_name=...)"
        )
    return read_layout_map(layout_map)


def _without_rules_for_others(layout: Layout, model: keras.Model, born: Set[str]) -> Layout:
    """Return the layout without the rules that match nothing in this model, and something in another.

    Args:
        layout: of the model's distribution.
        model: the one that is planned.
        born: paths of all variables that were created under the distribution.
    """
    own = {variable.path for variable in model.variables}
    there = [rule for rule in layout.rules if not _matches(rule, own) and _matches(rule, born - own)]
    if there and len(there) == len(layout.rules) and dist.get_rank() == 0:
        logger.warning(
            "[ModelParallel] the layout's rules name variables of other models and none of model %r: "
            "every rank computes all of it",
            model.name,
        )
    return replace(layout, rules=tuple(rule for rule in layout.rules if rule not in there))


def _matches(rule: LayoutRule, paths: Set[str]) -> bool:
    """Whether a rule names a variable of one of these paths, or what may be the output of its layer."""
    try:
        named = {*paths, *(f"{path.rpartition('/')[0]}/output" for path in paths)}
        return any(map(rule.matches, named))
    except re.error:
        return False  # which is said when the rules are read


def _build_rest(model: keras.Model, inputs: CallArguments | None) -> None:
    """Build what a model would only build in its first call."""
    if inputs is not None and not all(layer.built for layer in model._flatten_layers()):
        specs = inputs.map(
            lambda leaf: keras.KerasTensor(tuple(leaf.shape), keras.backend.standardize_dtype(leaf.dtype))
        )
        keras.src.backend.compute_output_spec(model, specs.first, **specs.others)


def _take_back(model: keras.Model) -> None:
    """Undo the plan of a model; its variables stay in shards."""
    applied = applied_to(model)
    assert applied is not None
    let_go(model, applied)
    placed = list(applied.placed.values())
    applied.revert(model, lambda key, each: each.variable._value)
    for each in placed:
        if isinstance(each.variable._value, DTensor):
            each.variable.__class__ = UnplannedVariable
            each.variable._born_under = _planned[model]


def _is_data(inputs: Any) -> bool:
    """Whether a model is called on values, and not traced."""
    leaves = [leaf for leaf in keras.tree.flatten(inputs) if leaf is not None]
    traced = (keras.KerasTensor, FakeTensor)
    return bool(leaves) and not any(isinstance(leaf, traced) or getattr(leaf, "is_meta", False) for leaf in leaves)


def _arguments_of(model: keras.Model, call_spec: Any) -> CallArguments | None:
    """Return what a model is called with; None, for the inputs it declares, if not all of the first have shapes.

    Whether it is a call in training is not part of it: both are planned.
    """
    first, given = call_spec.first_arg, call_spec.user_arguments_dict
    leaves = keras.tree.flatten(first)
    if not all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves):
        return None
    others: dict[str, Any] = {}
    for parameter in list(model._call_signature.parameters.values())[1:]:
        if parameter.name in given and parameter.name not in model._call_context_args:
            named = parameter.kind is not parameter.VAR_KEYWORD
            others |= {parameter.name: given[parameter.name]} if named else given[parameter.name]
    return CallArguments(first, others)
