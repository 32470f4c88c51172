"""The work of a loss, forward and backward, measured on fake logits: whole ones, or a rank's shard of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tp_planner.dryrun.metering import StepMeter
from tp_planner.frontend.trace import fake_tensors
from tp_planner.frontend.training_loss import TrainingLoss
from tp_planner.ir.placement import local_shape
from tp_planner.ir.plan import Boundary
from tp_planner.ir.step import Collective, Work
from tp_planner.ir.step_log import collectives_of, work_of
from tp_planner.job.axes import Axes
from tp_planner.regions.calls import Site
from tp_planner.regions.logits import logits_of
from tp_planner.training.vocabulary import follow_logits


@dataclass(frozen=True, slots=True)
class LossWork:
    """What a rank computes for a loss, and what it sends."""

    work: tuple[Work, ...]
    collectives: tuple[Collective, ...]


def measure_loss(loss: TrainingLoss, head: Boundary, axes: Axes, in_shards: bool) -> LossWork:
    """Return what a loss takes of the logits that ``head`` gathers, or of their shards instead.

    Args:
        loss: a loss that reads shards.
        head: the boundary at which a model's last layer gathers its output.
        axes: those of a mesh of the planned size, fake or real.
        in_shards: whether the logits stay in shards.
    """
    follow_logits()
    meter = StepMeter(axes)
    shape = local_shape(head.shape, head.forward.source, axes.model.size) if in_shards else head.shape
    with fake_tensors():
        product = torch.empty(shape, dtype=getattr(torch, head.dtype), requires_grad=True).flatten(0, -2)
        meter.hold([product], "activations")
        with meter:
            made = product.view(shape)
            outputs = logits_of(made, head, axes.model, Site("", "")) if in_shards else made
            (gradient,) = torch.autograd.grad(loss(outputs).sum(), made)
            gradient.reshape(product.shape)  # as the product's own gradients need it: some losses leave it transposed
        meter.forget()
    return LossWork(work_of(meter.log), collectives_of(meter.log))
