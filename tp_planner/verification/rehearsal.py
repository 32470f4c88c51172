"""Rehearsal: what one process does: call the model, train it for some steps, and watch; alone or as a rank."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import torch
from torch._C._distributed_c10d import Store

from tp_planner.api import parallelize
from tp_planner.frontend.fingerprint import fingerprint
from tp_planner.frontend.inputs import CallArguments
from tp_planner.frontend.training_loss import TrainingLoss
from tp_planner.ir.errors import in_one_line
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.verdict import INFERENCE
from tp_planner.readable_plan import Plan
from tp_planner.verification.precision import StaysWide, compute_in_float64, widened
from tp_planner.verification.processes import join_job
from tp_planner.verification.values import integer_limits, set_random_weights, without_dropout
from tp_planner.verification.watching import Seen, Watch, note_gradients, note_values


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What is done on all processes. ``inputs`` and ``targets`` are the whole batch; replicas take their rows.

    The first process is the single device, the others are the ranks. ``wide`` is for float64.
    """

    model: keras.Model
    plan: Plan
    inputs: CallArguments
    targets: Any
    loss: Any
    loss_weights: Any
    metrics: Any
    optimizer: keras.optimizers.Optimizer
    steps: int
    wide: bool = False

    def __call__(self, number: int, store: Store) -> Seen:
        """Do it on the process of this number; return what was seen."""
        keras.utils.set_random_seed(0)
        set_random_weights(self.model)
        if self.plan.replicas > 1:
            without_dropout(self.model)
        if self.wide:
            compute_in_float64(self.model)
        with StaysWide() if self.wide else contextlib.nullcontext():
            if number == 0:
                return self._run(0, 1)
            rank, mesh = number - 1, self.plan.mesh
            join_job(rank, mesh.size, store)
            parallelize(self.model, widened(self.plan, fingerprint(self.model)) if self.wide else self.plan)
            return self._run(replica(rank, mesh), mesh.replicas, keep=rank == 0, in_job=True)

    def _fresh_optimizer(self) -> keras.optimizers.Optimizer:
        """Return the optimizer as it was before its first step."""
        return type(self.optimizer).from_config(self.optimizer.get_config())

    def _run(self, place: int, of: int, keep: bool = True, in_job: bool = False) -> Seen:
        """Call and train the model on the rows of one of ``of`` replicas; ``keep`` what all processes have whole."""
        model, watch = self.model, Watch(self.model)
        inputs, targets = (_rows(each, place, of) for each in (self.inputs.first, self.targets))
        model.compile(
            self._fresh_optimizer(),
            self.loss,
            loss_weights=self.loss_weights,
            metrics=self.metrics,
            jit_compile=False,
        )
        keras.utils.set_random_seed(1)
        try:
            self._call_and_train(watch, inputs, targets, keep)
        except Exception as error:  # of the model's code, or of what another rank has left
            if not in_job:
                raise
            watch.seen.failure = in_one_line(error)
        return watch.seen

    def _call_and_train(self, watch: Watch, inputs: Any, targets: Any, keep: bool) -> None:
        model = self.model
        with watch.phase(INFERENCE), torch.no_grad():
            CallArguments(keras.tree.map_structure(keras.ops.convert_to_tensor, inputs)).call(model, training=False)
        for step in range(1, self.steps + 1):
            with watch.phase(f"step {step}"):
                logs = model.train_on_batch(inputs, targets, return_dict=True)
            watch.seen.note_logs(f"step {step}", logs)
            note_gradients(watch.seen, f"step {step}", model, keep)
        note_values(watch.seen, f"step {self.steps}", model, keep)


def replica(rank: int, mesh: Mesh) -> int:
    """Return the number of the replica that a rank is of."""
    return 0 if mesh.batch_axis is None else mesh.coordinate(rank, mesh.batch_axis)


def _rows(tree: Any, place: int, of: int) -> Any:
    def own(array: np.ndarray) -> np.ndarray:
        rows = len(array) // of
        return array[place * rows : (place + 1) * rows]

    return keras.tree.map_structure(own, tree)


@dataclass(frozen=True, slots=True)
class Scouted:
    """What has to be known of a model to draw data for it. ``of_indices`` says of each output what its targets are."""

    limits: dict[int, int]
    outputs: Sequence[tuple[int, ...]]
    of_indices: Sequence[bool]
    structure: Any


@dataclass(frozen=True, slots=True)
class Scout:
    """Calls the model once on zeros, to learn what integers it takes and what it returns."""

    model: keras.Model
    specs: CallArguments
    loss: TrainingLoss | None

    def __call__(self, number: int, store: Store) -> Scouted:
        """Call it; ``number`` is 0."""
        set_random_weights(self.model)
        limits, outputs = integer_limits(self.model, self.specs)
        leaves = [leaf for leaf in keras.tree.flatten(outputs) if isinstance(leaf, torch.Tensor)]
        of_indices = [False] * len(leaves) if self.loss is None else self.loss.takes_indices(outputs)
        structure = keras.tree.map_structure(lambda leaf: None, outputs)
        return Scouted(limits, [tuple(leaf.shape) for leaf in leaves], of_indices, structure)


def in_float64(rehearsal: Rehearsal) -> Rehearsal:
    """Return the rehearsal in float64."""
    return replace(rehearsal, wide=True)
