"""Training step: one step of a parallel model under a meter, as Keras trains, on fake or on real shards."""

from __future__ import annotations

import functools
import gc
from collections.abc import Mapping, Sequence, Set
from contextlib import nullcontext
from typing import Any

import keras
import torch
from torch.utils._pytree import tree_flatten

from tp_planner.dryrun.metering import StepMeter
from tp_planner.dryrun.sharing import SimulatedShares
from tp_planner.dryrun.slots import Slots
from tp_planner.frontend.inputs import CallArguments
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.frontend.trace import conditions_need_values
from tp_planner.frontend.training_loss import TrainingLoss
from tp_planner.ir.errors import in_one_line
from tp_planner.regions.calls import in_a_step_of
from tp_planner.regions.replicas import Replicas
from tp_planner.storage.variables import local_tensor
from tp_planner.training.accumulation import be_before_last, micro_steps_of
from tp_planner.training.vocabulary import follow_logits


class TrainingStep:
    """One training step of a parallel model under a meter.

    Args:
        model: the model.
        meter: writes the log.
        optimizer: makes the update; None for no update.
        loss: the loss, in a step as Keras trains: it has the outputs until its metrics have seen them. None for the
            sum of the outputs, which are let go.
        left_out: variables that take no part, by key.
        replicas: the replicas, which meet when the backward pass begins; None for one. They do not average gradients.
        sharing: the updates that they share, if they do.
        without_values: whether the model runs on fake tensors.
    """

    def __init__(
        self,
        model: keras.Model,
        meter: StepMeter,
        optimizer: keras.optimizers.Optimizer | None,
        loss: TrainingLoss | None,
        left_out: Set[str] = frozenset(),
        replicas: Replicas | None = None,
        sharing: SimulatedShares | None = None,
        without_values: bool = False,
    ) -> None:
        self.model, self.meter, self.optimizer, self.left_out = model, meter, optimizer, left_out
        self._loss, self._replicas, self._sharing = loss, replicas, sharing
        self._without_values = without_values
        self.loss_name = "" if loss is None else loss.name
        self.whole_update = True
        self.notes: list[str] = []
        self.trained: set[str] = set()  # variables that have got a gradient, by key

    def run(self, arguments: CallArguments, others: Mapping[str, int], equal: Mapping[str, str] | None = None) -> None:
        """Run the step.

        Args:
            arguments: what the model is called with.
            others: how many variables besides itself a variable stands for, by key.
            equal: variables whose gradient is that of another one when the backward pass has ended, by key.
        """
        meter, model = self.meter, self.model
        follow_logits()
        keys = {id(variable): key for key, variable in named_variables(model).items()}
        here = [variable for key, variable in named_variables(model).items() if key not in self.left_out]
        ids = {id(variable) for variable in here}
        trainable = [variable for variable in model.trainable_variables if id(variable) in ids]
        meter.hold((variable._value for variable in here), "parameters")
        meter.hold(arguments.tensors, "activations")
        slots = None
        if self.optimizer is not None and trainable:
            numbers = {id(each): others.get(keys[id(each)], 0) for each in trainable}
            slots = Slots(self.optimizer, trainable, numbers, meter, self._without_values)
        with meter:
            with nullcontext() if self._loss is None else in_a_step_of(model):
                outputs = arguments.call(model, training=True)
            loss = self._loss_of(outputs)
            if not self.loss_name:
                del outputs
            gc.collect(0)
            meter.end_forward()
            if loss is None or not loss.requires_grad:
                return
            if self._replicas is not None:
                loss.register_hook(self._meet)
            loss.backward()
            del loss
            gc.collect(0)
            _give_gradients(named_variables(model), equal or {})
            trained = [variable for variable in trainable if variable._value.grad is not None]
            self.trained = {keys[id(variable)] for variable in trained}
            meter.hold((variable._value.grad for variable in trained), "gradients")
            if self._sharing is not None:
                self._sharing.leave_parts(trained)
            kept = {} if slots is None else slots.by_variable()
            for variable in trained:
                self._stand_for(variable, kept.get(id(variable), ()), 1 + others.get(keys[id(variable)], 0))
            if self.optimizer is not None and trained:
                self._update(self.optimizer, trained)
            elif self._sharing is not None:  # whatever makes the update
                self._sharing.put_together({})

    def _meet(self, gradient: torch.Tensor) -> None:
        assert self._replicas is not None
        self._replicas.meet(gradient.device)

    def _update(self, optimizer: keras.optimizers.Optimizer, trained: list[Any]) -> None:
        if micro_steps_of(optimizer) > 1:
            be_before_last(optimizer, trained)
        try:
            with torch.no_grad(), conditions_need_values():
                optimizer.apply([variable._value.grad for variable in trained], trained)
        except Exception as error:  # an optimizer may look at values, which fake tensors do not have
            self.whole_update = False
            self.notes.append(
                f"the update by {type(optimizer).__name__} depends on values ({in_one_line(error)[:160]}): what it "
                f"communicates and needs for a moment is counted up to there only"
            )

    def _loss_of(self, outputs: Any) -> torch.Tensor | None:
        """Return the loss with the losses that layers add; None if there are no numbers to train with."""
        terms = [*self.model.losses]
        try:
            terms += [] if self._loss is None else [self._loss(outputs)]
        except Exception as error:  # a loss may take targets of other shapes than those made for it, or be anyone's
            self.notes.append(
                f"loss {self.loss_name} cannot be simulated ({in_one_line(error)[:160]}): the sum of the outputs "
                f"stands for it"
            )
            self.loss_name = ""
        if not self.loss_name:
            terms += tree_flatten(outputs)[0]
        self.model._clear_losses()
        sums = [each.sum() for each in terms if isinstance(each, torch.Tensor) and each.is_floating_point()]
        return functools.reduce(torch.add, sums) if sums else None

    def _stand_for(self, variable: Any, slots: Sequence[torch.Tensor], number: int) -> None:
        """Let a variable, its gradient and its slots count for ``number`` equal ones in the update."""
        gradient = variable._value.grad
        tensors = [local_tensor(variable), getattr(gradient, "_local_tensor", gradient), *slots]
        self.meter.stands_for.update({self.meter.storage(tensor): number for tensor in tensors})


def _give_gradients(variables: Mapping[str, Any], equal: Mapping[str, str]) -> None:
    """Give variables of blocks that did not run the gradients of the equal ones that did: they differ in values alone.

    The log of all blocks has the storages that they would be in.
    """
    for key, runs in equal.items():
        variables[key]._value.grad = variables[runs]._value.grad
