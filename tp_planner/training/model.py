"""A parallel Keras model: the calls of the user's own model object that have to know that it is sharded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras.src.models.model import Trainer  # that of the backend

from tp_planner.frontend.layer_tree import named_layers, named_variables
from tp_planner.ir.placement import Shard
from tp_planner.layers.apply import Applied
from tp_planner.layers.generation import generating_together
from tp_planner.patches import wrap_for_good
from tp_planner.regions.calls import Site, in_a_step_of
from tp_planner.regions.replicas import Replicas
from tp_planner.regions.summands import site_of
from tp_planner.replay.compilers import written_by
from tp_planner.replay.replay import REPLAYED, replaying
from tp_planner.storage.casts import casts_weights
from tp_planner.storage.log import logger
from tp_planner.training.accumulation import why_in_each
from tp_planner.training.added_losses import clearing_losses
from tp_planner.training.averaging import Averaging
from tp_planner.training.buckets import Bucket, SharedBucket
from tp_planner.training.changing import refuse_changes
from tp_planner.training.compiling import is_left_open, note_how_models_are_compiled
from tp_planner.training.draws import OwnDraws, follow_seeds
from tp_planner.training.entries import PHASES, entering
from tp_planner.training.exporting import refuse_export
from tp_planner.training.losses import loss_of_share
from tp_planner.training.optimizer import (
    adopt_at_first_use,
    adopt_optimizer,
    release_optimizer,
    release_optimizers_of,
    require_elementwise,
)
from tp_planner.training.replayed import StepPieces
from tp_planner.training.same_data import SameData, has_to_be_fed_alike
from tp_planner.training.shares import Shares, share_of, shares_in
from tp_planner.training.step import training_step
from tp_planner.training.torch_helpers import help_with_parameters_of
from tp_planner.training.torch_optimizers import follow_parameters
from tp_planner.training.totals import logs_of_all, results_of_all
from tp_planner.training.vocabulary import follow_logits, measuring
from tp_planner.training.writing import write_together

ATTRIBUTE = "_tp_planner"
STEPS = ("train_step", "test_step")  # which users write, too
_ASKS_FOR_TORCH_COMPILE = ("_should_torch_compile", "_use_torch_compile")  # of a trainer, in Keras 3.15 and 3.16


def applied_to(model: keras.Model) -> Applied | None:
    """Return the plan applied to the model, with what undoes it; None for a plain model."""
    applied: Applied | None = model.__dict__.get(ATTRIBUTE)
    return applied


def take_over(model: keras.Model, applied: Applied) -> None:
    """Mark the model as parallel, and let its saving, training and compiling calls know; all of it can be undone."""
    note_how_models_are_compiled()  # before this one's own compile is made of it
    model.__dict__[ATTRIBUTE] = applied
    applied.undo.append(lambda: model.__dict__.pop(ATTRIBUTE))
    _forget_compiled_functions(model)
    write_together(model, applied.undo)
    refuse_export(model, applied.undo)
    refuse_changes(model, applied.undo)
    for name in PHASES:
        _override(model, name, entering(model, name, applied), applied)
    layers = named_layers(model)
    pieces = StepPieces(model, layers)
    applied.undo.append(pieces.end)
    _override(model, "_clear_losses", clearing_losses(model, layers), applied)
    _override(model, "compile", _compiling(model, applied, pieces), applied)
    if type(model).train_step is Trainer.train_step:
        _override(model, "train_step", training_step(model, pieces), applied)
    if any(layer.into_loss for layer in applied.plan.layers):
        _keep_logits_in_shards(model, applied)
    _let_pieces_be_replayed(model, applied, pieces)
    _replay_if_asked(model, applied, pieces)
    _keep_from_distributing(model, applied)
    if hasattr(model, "generate_step"):
        _override(model, "generate", generating_together(model, applied.plan, applied.axes), applied)
    _add_summands(model, applied)
    generators = (each for layer in named_layers(model).values() for each in layer._seed_generators)
    follow_seeds(generators, 0 if applied.replicas is None else applied.replicas.axis.rank, applied.undo)
    if applied.replicas is not None:
        _take_replicas_into_account(model, applied, applied.replicas, pieces)
    if has_to_be_fed_alike(applied):
        _compare_what_it_is_fed(model, applied)
    adopt_at_first_use()
    follow_parameters()
    help_with_parameters_of(applied.axes)


def adopt_its_optimizer(model: keras.Model, applied: Applied) -> None:
    """Let the optimizer that a parallel model is compiled with update its shards.

    Raises PlanError for one that cannot update the parts that the plan leaves each replica.
    """
    if getattr(model, "optimizer", None) is not None:
        if applied.plan.shares_updates:
            require_elementwise(model.optimizer)
        adopt_optimizer(model.optimizer, applied.axes, puts_averaging_off=not why_in_each(model, model.optimizer))


def _keep_logits_in_shards(model: keras.Model, applied: Applied) -> None:
    """In Keras's steps and in those that a user wrote, let the model's losses and metrics read logits in shards."""
    follow_logits()
    for name in STEPS:
        _override(model, name, _in_a_step(model, getattr(model, name)), applied)
    _override(model, "compute_metrics", measuring(model), applied)


def _in_a_step(model: keras.Model, plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def step(*args: Any, **kwargs: Any) -> Any:
        with in_a_step_of(model):
            return plain(*args, **kwargs)

    return step


def _keep_from_distributing(model: keras.Model, applied: Applied) -> None:
    """Let Keras's trainer work as in one process; in a process group, that of Keras 3.16 distributes on its own.

    It puts models into DistributedDataParallel, and adds up what the metrics of all ranks have counted. The latter is
    in a method that users override and call, so it is wrapped for all models, once; for plain ones it does what it did.
    """
    if not hasattr(Trainer, "_initialize_ddp"):
        return
    model.__dict__["ddp_model"] = None
    _override(model, "_initialize_ddp", lambda: None, applied)
    why = "totals of parallel models are added up here, if they have to be"
    wrap_for_good(Trainer, "get_metrics_result", _of_its_rank, why)


def _of_its_rank(plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(plain)
    def get_metrics_result(self: Any) -> Any:
        return super(Trainer, self).get_metrics_result() if applied_to(self) is not None else plain(self)

    return get_metrics_result


def _take_replicas_into_account(model: keras.Model, applied: Applied, replicas: Replicas, pieces: StepPieces) -> None:
    """Average gradients, let losses and metrics be those of the whole batch, and random numbers this replica's."""
    Shares(replicas.axis, shares_in(applied.plan, applied.axes, named_variables(model))).watch(applied.undo)
    averaging = Averaging(replicas, _buckets(model, applied))
    averaging.watch(applied.undo)
    applied.summands.before_sum, applied.summands.at_sum = averaging.expect, averaging.arrive
    if type(model).train_step is Trainer.train_step:
        _override(model, "train_step", _in_micro_steps(model, averaging), applied)
    _override(model, "get_metrics_result", results_of_all(model, replicas), applied)
    for name in STEPS:
        if getattr(type(model), name) is not getattr(Trainer, name):
            _override(model, name, _reporting_all(model, getattr(model, name)), applied)
    replay = pieces.replay_loss if vars(model).get("compute_loss") == pieces.compute_loss else None
    _override(model, "compute_loss", loss_of_share(model, replicas, replay), applied)
    draws = OwnDraws(replicas.axis.rank)
    applied.undo.append(model.register_forward_pre_hook(draws.begin, prepend=True).remove)
    applied.undo.append(model.register_forward_hook(draws.end, always_call=True).remove)


def _reporting_all(model: keras.Model, plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return functools.wraps(plain)(lambda data: logs_of_all(model, plain(data)))


def _in_micro_steps(model: keras.Model, averaging: Averaging) -> Callable[..., Any]:
    """Return the training step, in which averaging knows which optimizer gets the gradients, and nothing else does."""
    plain = model.train_step

    @functools.wraps(plain)
    def train_step(data: Any) -> Any:
        with averaging.micro_step_of(model.optimizer):
            return plain(data)

    return train_step


def _compare_what_it_is_fed(model: keras.Model, applied: Applied) -> None:
    """Let the ranks of a replica hear of it if they are fed different data."""
    same = SameData(model, applied)
    hook = model.register_forward_pre_hook(same.before_call, with_kwargs=True, prepend=True)
    applied.undo.append(hook.remove)
    _override(model, "compute_loss", same.of_losses(model, model.compute_loss), applied)


def _add_summands(model: keras.Model, applied: Applied) -> None:
    """Let the backward pass add up the gradients of what is used on shards of the residual stream."""
    variables = named_variables(model)
    planned = [(site_of(number), [variables[key] for key in keys]) for number, keys in enumerate(applied.plan.sums)]
    others = [(Site("", f"summand of {key}"), [variables[key]]) for key in _used_on_stream(applied) - _summed(applied)]
    applied.summands.wait([*planned, *sorted(others, key=lambda each: each[0].place)])


def _summed(applied: Applied) -> set[str]:
    return {key for keys in applied.plan.sums for key in keys}


def _used_on_stream(applied: Applied) -> set[str]:
    """Return the keys of the variables whose gradients are summands, or would be if they were trained."""
    return {use.variable for layer in applied.plan.layers for use in layer.uses if use.boundary.is_on_stream}


def _buckets(model: keras.Model, applied: Applied) -> list[Bucket]:
    """Return the plan's buckets, and behind them one for each other variable, which may be trained later."""
    variables, late = named_variables(model), _used_on_stream(applied)
    planned = [
        _bucket([variables[key] for key in keys], Site("", f"gradients {number}"), late=keys[0] in late)
        for number, keys in enumerate(applied.plan.buckets)
    ]
    known = {key for keys in applied.plan.buckets for key in keys}
    known |= {each.key for each in applied.plan.variables if isinstance(each.batch_placement, Shard)}
    others = [
        Bucket([variable], Site("", f"gradient {key}"), always=False, late=key in late)
        for key, variable in variables.items()
        if key not in known and variable._value.is_floating_point()
    ]
    return planned + others


def _bucket(variables: Sequence[Any], site: Site, late: bool) -> Bucket:
    shares = [share for variable in variables if (share := share_of(variable)) is not None]
    if shares:
        assert len(shares) == len(variables)
        return SharedBucket(shares, site, always=True, late=late)
    return Bucket(variables, site, always=True, late=late)


def let_go(model: keras.Model, applied: Applied) -> None:
    """Release the optimizers; the rest is undone with the plan."""
    homes = {id(placed.variable): placed.device for placed in applied.placed.values()}
    if getattr(model, "optimizer", None) is not None:
        release_optimizer(model.optimizer, homes)
    release_optimizers_of(homes)
    _forget_compiled_functions(model)


def _override(model: keras.Model, name: str, function: Callable[..., Any], applied: Applied) -> None:
    model.__dict__[name] = function
    applied.undo.append(lambda: model.__dict__.pop(name, None))


def _compiling(model: keras.Model, applied: Applied, pieces: StepPieces) -> Callable[..., Any]:
    plain = type(model).compile

    @functools.wraps(plain)
    def compiling(*args: Any, **kwargs: Any) -> Any:
        result = plain(model, *args, **kwargs)
        _replay_if_asked(model, applied, pieces)
        adopt_its_optimizer(model, applied)
        return result

    return compiling


def _let_pieces_be_replayed(model: keras.Model, applied: Applied, pieces: StepPieces) -> None:
    """Let the loss and the metrics be replayed with the model, where they are Keras's own."""
    for names in (("compute_loss", "losses"), ("compute_metrics", "metrics", "get_metrics_result")):
        if names[0] not in vars(model) and all(
            getattr(type(model), each) is getattr(keras.Model, each) for each in names
        ):
            _override(model, names[0], getattr(pieces, names[0]), applied)


def _replay_if_asked(model: keras.Model, applied: Applied, pieces: StepPieces) -> None:
    """Let calls be replayed if the model is compiled with jit_compile=True, or by a compiler that it names.

    So they are by Keras's default where nothing else can be told from it.

    Raises PlanError for one that it is not replayed by.
    """
    for name in (*REPLAYED, *_ASKS_FOR_TORCH_COMPILE):
        if hasattr(model.__dict__.get(name), "belongs_to_jit_compile"):  # and is none that a user has put there
            del model.__dict__[name]
    pieces.end()
    automatic = is_left_open(model)
    if not (model.compiled and (model.jit_compile or automatic)):
        return
    asked = True if automatic else model.jit_compile
    write = written_by(asked, model)
    for name in _ASKS_FOR_TORCH_COMPILE:
        _override_for_jit_compile(model, name, lambda: False, applied)
    in_parts = any(isinstance(each.batch_placement, Shard) for each in applied.plan.variables)
    if in_parts and asked is not True:
        logger.warning(
            "[ModelParallel] jit_compile=%r does nothing for model %r: variables are in parts; make it True",
            asked,
            model.name,
        )
        return
    layers = named_layers(model)
    again = applied.plan.keeps_less or any(map(casts_weights, layers.values()))
    for name in (each for each in REPLAYED if hasattr(model, each)):
        replayed = replaying(model, name, layers, again, in_parts, write, automatic)
        _override_for_jit_compile(model, name, replayed, applied)
    pieces.begin(asked=not automatic)


def _override_for_jit_compile(model: keras.Model, name: str, function: Callable[..., Any], applied: Applied) -> None:
    function.belongs_to_jit_compile = True  # type: ignore[attr-defined]
    _override(model, name, function, applied)


def _forget_compiled_functions(model: keras.Model) -> None:
    model.train_function = model.test_function = model.predict_function = None
