"""Slots: what an optimizer keeps for each variable, made and counted for a metered step."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import keras
import torch

from tp_planner.dryrun.metering import StepMeter
from tp_planner.storage.variables import local_tensor
from tp_planner.training.optimizer import is_elementwise
from tp_planner.training.shares import slot_sharding


class Slots:
    """The slots of an optimizer, as they are there from the second step on.

    Without values, slots of variables that are stored alike are alike. So where updates are elementwise, and nothing
    asks whose a slot is, one takes the place of each of these; memory counts all.

    Args:
        optimizer: one that has none yet.
        trainable: the variables.
        others: how many variables besides itself a variable stands for, by ``id``.
        meter: writes the log.
        without_values: whether tensors are fake.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        trainable: list[Any],
        others: Mapping[int, int],
        meter: StepMeter,
        without_values: bool,
    ) -> None:
        self._made: list[tuple[Any, Any]] = []  # (variable, slot)
        self._others, self._meter = others, meter
        self._shared: dict[Hashable, Any] | None = {} if without_values and is_elementwise(optimizer) else None
        adding = functools.partial(self._add, optimizer.add_variable_from_reference)
        optimizer.__dict__["add_variable_from_reference"] = adding
        optimizer.build(trainable)
        slots = {id(slot) for _, slot in self._made}
        self._count(each for each in optimizer.variables if id(each) not in slots)
        self._count(slot for _, slot in self._made)
        for variable, slot in self._made:
            if others[id(variable)]:
                meter.log.allocate(_stored_bytes(slot), "optimizer", others[id(variable)])

    def by_variable(self) -> dict[int, list[torch.Tensor]]:
        """Return what is stored of the slots of each variable, by its ``id``."""
        tensors: dict[int, list[torch.Tensor]] = {}
        for variable, slot in self._made:
            tensors.setdefault(id(variable), []).append(local_tensor(slot))
        return tensors

    def _add(self, add: Any, reference_variable: Any, *args: Any, **kwargs: Any) -> Any:
        kind = (args, tuple(kwargs.items()), _how_stored(reference_variable), self._others[id(reference_variable)])
        slot = None if self._shared is None else self._shared.get(kind)
        if slot is None:
            slot = add(reference_variable, *args, **kwargs)
        if self._shared is not None:
            self._shared[kind] = slot
        self._made.append((reference_variable, slot))
        return slot

    def _count(self, slots: Iterable[Any]) -> None:
        """Log each of them; one that takes the place of several is as many storages as it comes."""
        for slot in slots:
            if self._meter.knows(local_tensor(slot)):
                self._meter.log.allocate(_stored_bytes(slot), "optimizer")
            else:
                self._meter.hold([slot._value], "optimizer")


def _how_stored(variable: Any) -> Hashable:
    """Return what a slot of a variable depends on, but for values."""
    local = local_tensor(variable)
    return tuple(variable.shape), local.shape, local.dtype, slot_sharding(variable)


def _stored_bytes(variable: Any) -> int:
    return local_tensor(variable).untyped_storage().nbytes()
