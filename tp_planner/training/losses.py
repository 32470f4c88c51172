"""Losses of replicas: what each computes of its share adds up to the loss of the whole batch.

Gradients, and the losses that Keras reports, are means over the replicas, weighed by their samples. That is right for
a loss that is a mean over samples. Of one that is divided by something else, say by the number of tokens that are not
masked, or by nothing, each replica's is scaled so that the weighed mean is what the whole batch gives.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import torch
import torch.distributed as dist
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.losses import loss as keras_loss

from tp_planner.frontend.keras_internals import convert_to_tensor, get_device
from tp_planner.patches import replaced
from tp_planner.regions.calls import METRICS, running
from tp_planner.regions.replicas import Replicas, add_in_place, wait
from tp_planner.storage.log import logger

BATCH_ARGUMENTS = ("x", "y", "y_pred", "sample_weight")

_reduced_by_keras = keras_loss.reduce_weighted_values


def loss_of_share(
    model: keras.Model, replicas: Replicas, replay: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Return Keras's ``compute_loss`` for a replica's share of the batch; see the module's text.

    A share without samples has a loss of 0, and not the mean of nothing. Its replica takes part in all communication:
    Keras is given a row of zeros that counts for nothing. Losses that layers add are as on every replica.

    Args:
        model: a parallel model.
        replicas: its replicas.
        replay: calls a function of all of Keras's arguments but the inputs, where that makes nothing of these.
    """
    plain = type(model).compute_loss
    signature = inspect.signature(plain)
    warn = functools.cache(functools.partial(_warn_of_one_number, model))

    def of_share(samples: float, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(model, *args, **kwargs)
        batch = _batch_of(call)
        outputs = [leaf for leaf in keras.tree.flatten(batch.get("y_pred")) if isinstance(leaf, torch.Tensor)]
        of_all = _reduction(replicas, samples, warn)
        with replaced(keras_loss, "reduce_weighted_values", of_all, "a mean is over the samples of all replicas"):
            if not outputs or outputs[0].numel():
                return plain(*call.args, **call.kwargs)
            call.arguments.update(keras.tree.map_structure(_row_of_zeros, batch))
            with _metrics_kept(model):
                return sum(output.sum() for output in outputs) + plain(*call.args, **call.kwargs)

    @functools.wraps(plain)
    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(model, *args, **kwargs)
        batch = _batch_of(call)
        samples = replicas.samples if torch.is_grad_enabled() else _rows(batch)
        if replay is None:
            return of_share(samples, *args, **kwargs)
        given = (*map(batch.get, BATCH_ARGUMENTS[1:]), call.arguments.get("training", True))
        return replay(functools.partial(of_share, samples, None), *given, other=samples)

    return compute_loss


def _batch_of(call: inspect.BoundArguments) -> dict[str, Any]:
    return {name: call.arguments[name] for name in BATCH_ARGUMENTS if name in call.arguments}


def _rows(batch: Mapping[str, Any]) -> float:
    """Return the number of samples, as Keras counts them where it reports a loss."""
    leaves = keras.tree.flatten([batch.get(name) for name in BATCH_ARGUMENTS])
    return next((float(leaf.shape[0]) for leaf in leaves if getattr(leaf, "ndim", 0)), 1.0)


def _row_of_zeros(leaf: Any) -> Any:
    if not getattr(leaf, "ndim", 0):
        return leaf
    tensor, mask = convert_to_tensor(leaf), get_keras_mask(leaf)
    row = tensor.new_zeros((1, *tensor.shape[1:]))
    if mask is not None:
        set_keras_mask(row, _row_of_zeros(mask))
    return row


@contextlib.contextmanager
def _metrics_kept(model: keras.Model) -> Iterator[None]:
    """Afterwards, metrics have seen nothing of what they saw inside."""
    before = [(each, each.value.clone()) for metric in model.metrics for each in metric.variables]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


def _warn_of_one_number(model: keras.Model) -> None:
    if dist.get_rank() == 0:
        logger.warning(
            "[ModelParallel] a loss of model %r gives one number for a replica's share of the batch, taken for a mean "
            "over its samples; let it give one for each sample, and Keras reduces them over the whole batch",
            model.name,
        )


def _reduction(replicas: Replicas, samples: float, warn: Callable[[], None]) -> Callable[..., Any]:
    """Return Keras's reduction of a loss's values on a replica that has this many samples.

    ``warn`` is called where there is but one value.
    """

    @functools.wraps(_reduced_by_keras)
    def reduce_weighted_values(
        values: Any,
        sample_weight: Any = None,
        mask: Any = None,
        reduction: str | None = "sum_over_batch_size",
        dtype: Any = None,
    ) -> Any:
        own = _reduced_by_keras(values, sample_weight, mask, reduction, dtype)
        if str(get_device()) == "meta" or own.ndim:  # only shapes are inferred, or nothing is reduced
            return own
        if not values.ndim:
            warn()
        elif not _is_mean_over_samples(sample_weight, mask, reduction):
            divisor = _divisor(values, sample_weight, mask, reduction)
            scale = running.run(_scale, divisor, samples, replicas, own.device)
            own = own * scale.to(own.dtype)
        return own if samples else own * 0

    return reduce_weighted_values


def _is_mean_over_samples(sample_weight: Any, mask: Any, reduction: str | None) -> bool:
    if reduction == "mean_with_sample_weight":
        return sample_weight is None and mask is None
    return reduction != "sum" and mask is None


def _divisor(values: torch.Tensor, sample_weight: Any, mask: Any, reduction: str | None) -> torch.Tensor | None:
    """Return what Keras divides the sum of a share's values by, up to what shares have in common; None for nothing."""
    if reduction == "sum":
        return None
    if reduction == "mean_with_sample_weight":
        if sample_weight is not None:
            sample_weight = torch.clone(convert_to_tensor(sample_weight))  # Keras 3.16 masks it in its own memory
        mask = keras_loss.apply_mask(sample_weight, mask, keras.backend.standardize_dtype(values.dtype), reduction)
    divisor: torch.Tensor = convert_to_tensor(mask).detach().to(torch.float64).sum()
    return divisor


def _scale(divisor: torch.Tensor | None, samples: float, replicas: Replicas, device: torch.device) -> torch.Tensor:
    """Return by what a replica's loss is multiplied, so that the mean weighed by samples is that of the whole batch."""
    summed = torch.full((2,), samples, dtype=torch.float64, device=device)  # filled in, no host waits for it
    if divisor is not None:
        summed[1] = divisor
    add_in_place(summed, replicas.axis, METRICS)
    all_samples, whole = wait(summed).unbind()
    scale = all_samples / (samples or 1.0)
    return scale if divisor is None else scale * keras.ops.divide_no_nan(divisor, whole)
