"""Keras optimizers on sharded variables.

An adopted optimizer is the user's own object with a class that mixes in what sharding needs. Its slots are born
with their variable's placement, or that of the part which this replica updates, see ``shares.py``. Elementwise updates
(all of Adam's family, SGD, ...) run on plain local shards, see ``updates.py``; any other update runs on the whole value
of one variable at a time.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope
from torch.distributed.tensor import DTensor

from tp_planner.ir.errors import PlanError
from tp_planner.ir.placement import Partial, Replicate
from tp_planner.ir.plan import Transition
from tp_planner.job.axes import Axes, Axis
from tp_planner.patches import wrap_for_good
from tp_planner.regions.boundaries import change
from tp_planner.regions.calls import Site, reading_local_values, running, standing_at
from tp_planner.storage.sharding import Sharding, part_of_shards
from tp_planner.storage.variables import (
    is_sharded,
    local_tensor,
    make_parallel,
    make_plain,
    sharded_parameter,
    whole_tensor,
)
from tp_planner.training.accumulation import (
    ACCUMULATOR,
    add_up,
    count_on,
    is_last,
    is_put_off,
    micro_steps_of,
    sharding_of_sums,
)
from tp_planner.training.averaging import averaged
from tp_planner.training.replayed import update
from tp_planner.training.shares import being_shares, share_of, slot_sharding
from tp_planner.training.updates import update_elementwise

SUM_OVER_RANKS = Transition(Partial(), Replicate())
CLIPPING, LOSS_SCALE = Site("", "gradient clipping"), Site("", "loss scaling")
ELEMENTWISE = tuple(
    getattr(keras.optimizers, name)
    for name in ("SGD", "RMSprop", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax", "Nadam", "Ftrl", "Lion")
)


_adopted: weakref.WeakSet[Any] = weakref.WeakSet()


class ParallelOptimizer:
    """Mixed into the class of an adopted optimizer, before the Keras class."""

    _slots: list[tuple[Any, Any]]  # (variable, slot) of slots in shards
    _updated: Sequence[Any]  # the variables of the update that is running
    _axes: Axes
    puts_averaging_off: bool  # whether replicas add up gradients of several micro-steps on their own

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: Any = "zeros"
    ) -> Any:
        """Add a slot; one that is to be in shards is created as this rank's shard only."""
        create = functools.partial(
            super().add_variable_from_reference,  # type: ignore[misc]
            reference_variable,
            name=name,
            initializer=initializer,
        )
        sharding = self._sharding_of_slot(reference_variable, name == ACCUMULATOR)
        if sharding is None:
            return create()
        if share_of(reference_variable) is not None:
            require_elementwise(self)
        with keras.device("meta"):
            slot = create()
        local = _initial_shard(keras.initializers.get(initializer), slot, sharding)
        local = local.to(local_tensor(reference_variable).device)
        bind_slot(self, reference_variable, slot, local, sharding)
        return slot

    def _sharding_of_slot(self, variable: Any, accumulates: bool) -> Sharding | None:
        """Return how a slot of a variable is stored; None for whole on each rank."""
        if accumulates and self.puts_averaging_off and is_put_off(variable):
            return sharding_of_sums(variable, self._axes)
        return slot_sharding(variable)

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Update the variables, on local shards."""
        with reading_local_values():
            local = [grad._local_tensor if isinstance(grad, DTensor) else grad for grad in grads]
            super().apply(local, trainable_variables)  # type: ignore[misc]
        count_on(self)

    def _backend_apply_gradients(self, grads: Sequence[torch.Tensor], trainable_variables: Sequence[Any]) -> None:
        self.__dict__["_updated"] = trainable_variables  # past Keras's tracking, which would make them slots
        try:
            if self.puts_averaging_off:
                grads = add_up(self, grads, trainable_variables, self._axes.batch)
            with being_shares(self._trainable_variables, changed=self._changes_variables):  # type: ignore[attr-defined]
                super()._backend_apply_gradients(grads, trainable_variables)  # type: ignore[misc]
        finally:
            self.__dict__["_updated"] = ()

    @property
    def _changes_variables(self) -> bool:
        """Whether variables change in the running step: in a micro-step before the last there may be no update."""
        overwritten: bool = self.use_ema and bool(self.ema_overwrite_frequency)  # type: ignore[attr-defined]
        return micro_steps_of(self) == 1 or overwritten or in_stateless_scope() or is_last(self)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Let variables be their moving averages, if there are any."""
        if not self.use_ema:  # type: ignore[attr-defined]
            return
        with reading_local_values(), being_shares(self._trainable_variables):  # type: ignore[attr-defined]
            super().finalize_variable_values(var_list)  # type: ignore[misc]

    def _backend_update_step(
        self, grads: Sequence[torch.Tensor], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        update = functools.partial(super()._backend_update_step, learning_rate=learning_rate)  # type: ignore[misc]
        if type(self).__mro__[2] in _elementwise_classes():
            if in_stateless_scope():
                update(grads, trainable_variables)
            else:
                update_elementwise(self, grads, trainable_variables, learning_rate, update)
            return
        for grad, variable in zip(grads, trainable_variables, strict=True):
            with self._whole_values(variable):
                update([_whole_gradient(grad, variable)], [variable])

    @contextlib.contextmanager
    def _whole_values(self, variable: Any) -> Iterator[None]:
        """Inside, a sharded variable and its slots are whole; afterwards every rank keeps its shards."""
        slots = [slot for owner, slot in self._slots if owner is variable and not slot._stored.sharding.is_summed]
        sharded = [variable, *slots] if is_sharded(variable) else []
        for each in sharded:
            each._stored.whole = whole_tensor(each, _update_of(variable))
        try:
            yield
            for each in sharded:
                local_tensor(each).copy_(each._stored.sharding.own(each._stored.whole))
        finally:
            for each in sharded:
                each._stored.whole = None

    def _clip_gradients(self, grads: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if self.clipnorm and self.clipnorm > 0:  # type: ignore[attr-defined]
            return self._clip_each(grads, float(self.clipnorm))  # type: ignore[attr-defined]
        if self.global_clipnorm and self.global_clipnorm > 0:  # type: ignore[attr-defined]
            return self._clip_together(grads, float(self.global_clipnorm))  # type: ignore[attr-defined]
        clipped: Sequence[torch.Tensor] = super()._clip_gradients(grads)  # type: ignore[misc]
        return clipped

    def _squared_norms(self, grads: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the squared norm of each whole gradient; one all-reduce over an axis for all of them."""
        squared = torch.stack([grad.square().sum() for grad in grads])
        for axis in self._axes_of(self._updated):
            sharded = [_is_updated_over(axis, variable) for variable in self._updated]
            mask = torch.as_tensor(sharded, device=squared.device)
            summed = change(torch.where(mask, squared, 0), SUM_OVER_RANKS, axis, CLIPPING)
            squared = torch.where(mask, summed, squared)
        return squared

    def _axes_of(self, variables: Sequence[Any]) -> Iterator[Axis]:
        """Yield the axes whose ranks have different gradients: the model axis, and the batch axis if it cuts any."""
        yield self._axes.model
        if self._axes.batch is not None and any(_is_updated_over(self._axes.batch, each) for each in variables):
            yield self._axes.batch

    def _clip_each(self, grads: Sequence[torch.Tensor], limit: float) -> Sequence[torch.Tensor]:
        norms = self._squared_norms(grads).sqrt()
        return [
            keras.ops.multiply(grad, limit) / keras.ops.maximum(norm, limit)
            for grad, norm in zip(grads, norms.unbind(), strict=True)
        ]

    def _clip_together(self, grads: Sequence[torch.Tensor], limit: float) -> Sequence[torch.Tensor]:
        norm = self._squared_norms(grads).sum().sqrt()
        scale = limit * keras.ops.minimum(1.0 / norm, 1.0 / limit) + (norm - norm)  # not finite if the norm is not
        return [grad * scale for grad in grads]

    def check_finite(self, grads: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return whether all gradients are finite on all ranks, so that all ranks scale the loss alike."""
        finite = super().check_finite(grads)  # type: ignore[misc]
        not_finite: torch.Tensor = (~finite).to(torch.float32).reshape(1)
        for axis in self._axes_of(self.inner_optimizer._trainable_variables):  # type: ignore[attr-defined]
            not_finite = change(not_finite, SUM_OVER_RANKS, axis, LOSS_SCALE)
        return not_finite.eq(0).reshape(())


@functools.cache
def _elementwise_classes() -> frozenset[type]:
    """Keras's own elementwise optimizers, with the torch versions that Keras puts in their place."""
    classes: set[type] = set()
    for base in ELEMENTWISE:
        classes.update(
            {base, *(sub for sub in base.__subclasses__() if sub.__module__.startswith("keras.src.backend"))}
        )
    return frozenset(classes)


def require_elementwise(optimizer: Any) -> None:
    """Raise PlanError for an optimizer of which an update of a part is no part of the update."""
    inner = getattr(optimizer, "inner_optimizer", None) or optimizer
    if not is_elementwise(inner):
        kind = _keras_class(inner)
        raise PlanError(
            f"{kind.__name__} cannot update weights in parts over the batch axis, as zero=1 has it: what it makes of "
            f"one element depends on others, or is not known; plan with zero=0, or train with one of "
            f"{', '.join(each.__name__ for each in ELEMENTWISE)}"
        )


def is_elementwise(optimizer: Any) -> bool:
    """Whether an optimizer updates each element of a variable by itself; of Keras's own those are known that do."""
    return _keras_class(optimizer) in _elementwise_classes()


def _keras_class(optimizer: Any) -> type:
    """Return the class that a user has made an optimizer of, or what Keras put in its place."""
    plain: type = type(optimizer).__mro__[2] if isinstance(optimizer, ParallelOptimizer) else type(optimizer)
    return plain


def _is_updated_over(axis: Axis, variable: Any) -> bool:
    """Whether each rank of the axis updates a part of a variable."""
    sharding = slot_sharding(variable)
    return sharding is not None and any(axis == cut for _, cut in sharding.cuts)


def updates_all_at_once(optimizer: Any) -> bool:
    """Whether an update is a few ops on the lists of all variables, and nothing else depends on their number.

    Lion has such a method, and loops in it.
    """
    kind = _keras_class(optimizer)
    extras = ("clipnorm", "global_clipnorm", "clipvalue", "use_ema", "gradient_accumulation_steps")
    return (
        is_elementwise(optimizer)
        and hasattr(kind, "_parallel_update_step")
        and not issubclass(kind, keras.optimizers.Lion)
        and not any(getattr(optimizer, extra, None) for extra in extras)
    )


@functools.cache
def _parallel_class(plain: type) -> type:
    """Return ``plain`` with ParallelOptimizer mixed in; its name stays, for what Keras writes to files."""
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (ParallelOptimizer, plain), names)


def adopt_optimizer(optimizer: Any, axes: Axes, puts_averaging_off: bool = False) -> None:
    """Let an optimizer update sharded variables; slots that exist already are sharded now.

    If it accumulates gradients, it may be one for which replicas put averaging off; see ``accumulation.py``.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer) or isinstance(optimizer, ParallelOptimizer):
        return
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        adopt_optimizer(inner, axes)
    optimizer.__dict__["_slots"], optimizer.__dict__["_axes"], optimizer.__dict__["_updated"] = [], axes, ()
    optimizer.__dict__["puts_averaging_off"] = (
        puts_averaging_off and axes.batch is not None and micro_steps_of(optimizer) > 1
    )
    plain: type = type(optimizer)
    optimizer.__class__ = _parallel_class(plain)
    _adopted.add(optimizer)
    if optimizer.built and inner is None:
        sums = {id(slot) for slot in getattr(optimizer, "_accumulated_gradients", ())}
        for variable, slot in slots_of(optimizer, optimizer._trainable_variables):
            sharding = optimizer._sharding_of_slot(variable, id(slot) in sums)
            if sharding is not None:
                local = _part_of_slot(slot._value.detach(), sharding)
                bind_slot(optimizer, variable, slot, local.to(local_tensor(variable).device), sharding)


def _part_of_slot(value: torch.Tensor, sharding: Sharding) -> torch.Tensor:
    """Return this rank's part of a slot, which may have been created in shards; of a sum the first replica has all."""
    part: torch.Tensor
    if isinstance(value, DTensor):
        part = part_of_shards(value, sharding)
        return part if sharding.is_first_summand else torch.zeros_like(part)
    part = sharding.own(value)
    return part.clone()


def adopt_at_first_use() -> None:
    """Let any Keras optimizer adopt itself when it is given sharded variables, as in a training loop of one's own.

    Wraps ``apply`` of Keras's optimizers, once; with plain variables they do what they did.
    """
    for base in (keras.src.optimizers.base_optimizer.BaseOptimizer, keras.optimizers.LossScaleOptimizer):
        wrap_for_good(base, "apply", _adopting, "sharded variables need an adopted optimizer")


def _adopting(plain: Any) -> Any:
    @functools.wraps(plain)
    def apply(self: Any, grads: Sequence[Any], trainable_variables: Any = None) -> Any:
        variables = None if trainable_variables is None else list(trainable_variables)
        known = variables or (self._trainable_variables if self.built else [])
        sharding = next((sharding for variable in known if (sharding := slot_sharding(variable))), None)
        if sharding is not None and not isinstance(self, ParallelOptimizer):
            adopt_optimizer(self, sharding.axes)
            return self.apply(grads, variables)
        if running.updating:  # an optimizer around this one has seen the gradients
            return update(self, plain, grads, variables)
        running.updating = True
        try:
            return update(self, plain, averaged(grads, known), variables)
        finally:
            running.updating = False

    return apply


def release_optimizers_of(homes: Mapping[int, torch.device]) -> None:
    """Release every optimizer that has slots of one of these variables; ``homes`` as for ``release_optimizer``."""
    for optimizer in list(_adopted):
        if isinstance(optimizer, ParallelOptimizer) and any(id(owner) in homes for owner, _ in optimizer._slots):
            release_optimizer(optimizer, homes)


def release_optimizer(optimizer: Any, homes: Mapping[int, torch.device]) -> None:
    """Undo ``adopt_optimizer``: slots are whole again, on the device that their variable goes back to.

    ``homes`` has these devices by the variables' ``id``.
    """
    if not isinstance(optimizer, ParallelOptimizer):
        return
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        release_optimizer(inner, homes)
    for _, slot in optimizer._slots:
        make_plain(slot, torch.nn.Parameter(whole_tensor(slot), requires_grad=False))
    optimizer.__class__ = type(optimizer).__mro__[2]
    del optimizer.__dict__["_slots"], optimizer.__dict__["_axes"], optimizer.__dict__["puts_averaging_off"]
    optimizer.__dict__.pop("_counted", None)
    optimizer.__dict__.pop("_updated", None)
    if inner is None:
        _move_slots(optimizer, homes)


def _move_slots(optimizer: Any, homes: Mapping[int, torch.device]) -> None:
    """Move all slots to the device that their variable goes back to, also of variables that every rank held whole."""
    going_back = [variable for variable in optimizer._trainable_variables if id(variable) in homes]
    for variable, slot in slots_of(optimizer, going_back):
        slot._value = torch.nn.Parameter(slot._value.detach().to(homes[id(variable)]), requires_grad=False)


def bind_slot(optimizer: Any, variable: Any, slot: Any, local: torch.Tensor, sharding: Sharding) -> None:
    """Make ``slot`` of ``variable`` a variable that is stored so, with ``local`` as what this rank has of it."""
    make_parallel(slot, sharded_parameter(local, tuple(slot.shape), sharding, requires_grad=False), sharding)
    optimizer._slots.append((variable, slot))


def slots_of(optimizer: Any, variables: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Return (variable, slot) for the slots of these variables in a built optimizer.

    Keras names a slot after its variable's path; the longest path that fits is the variable's.
    """
    by_prefix = sorted(((v.path.replace("/", "_") + "_", v) for v in variables), key=lambda item: -len(item[0]))
    found = []
    for slot in optimizer._variables:
        for prefix, variable in by_prefix:
            if slot.name.startswith(prefix) and tuple(slot.shape) == tuple(variable.shape):
                found.append((variable, slot))
                break
    return found


def _initial_shard(initializer: Any, slot: Any, sharding: Sharding) -> torch.Tensor:
    shape = tuple(slot.shape)
    constant = (keras.initializers.Zeros, keras.initializers.Ones, keras.initializers.Constant)
    with keras.device("cpu"):
        if isinstance(initializer, constant):
            value: torch.Tensor = initializer(sharding.local_shape(shape), dtype=slot._dtype)
            return value
        whole: torch.Tensor = sharding.own(initializer(shape, dtype=slot._dtype))
        return whole.clone()


def _whole_gradient(gradient: torch.Tensor, variable: Any) -> torch.Tensor:
    if not is_sharded(variable):
        return gradient
    with standing_at(_update_of(variable)):
        whole: torch.Tensor = variable._stored.sharding.whole(gradient, tuple(variable.shape))
        return whole


def _update_of(variable: Any) -> Site:
    return Site("", f"update of {variable.path}")
