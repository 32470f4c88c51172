"""Losses and metrics of Keras on logits whose vocabulary is sharded: those that can read shards, and do.

``follow_logits`` lets Keras's wrappers of loss and metric functions know them. All other code gets whole logits.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras
import torch
import torch.distributed as dist
from keras.src.backend.common.masking import set_keras_mask
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.metrics.reduction_metrics import MeanMetricWrapper

from tp_planner.ir.placement import Shard
from tp_planner.patches import replaced, wrap_for_good, wrapped
from tp_planner.regions.boundaries import gather
from tp_planner.regions.calls import METRICS, for_metrics, standing_at
from tp_planner.regions.collectives import all_reduce
from tp_planner.regions.logits import Logits
from tp_planner.storage.log import logger
from tp_planner.training.cross_entropy import cross_entropy, cross_entropy_of_distributions

ops = keras.ops
Reader = Callable[..., Any]


def follow_logits() -> None:
    """Let losses and metrics of Keras read shards of logits, from now on; with other tensors they do what they did."""
    why = "losses and metrics of parallel models read logits in shards"
    wrap_for_good(LossFunctionWrapper, "call", _loss_of_shards, why)
    wrap_for_good(MeanMetricWrapper, "update_state", _metric_of_shards, why)


def measuring(model: keras.Model) -> Callable[..., Any]:
    """Return Keras's ``compute_metrics``, in which what is communicated is for metrics.

    In its first call on metrics that are built, it is said which of them read logits whole.
    """
    plain = type(model).compute_metrics
    watched: set[int] = set()  # the metrics of which that was said, as often as the model is compiled

    @functools.wraps(plain)
    def compute_metrics(*args: Any, **kwargs: Any) -> Any:
        metrics = getattr(getattr(model, "_compile_metrics", None), "metrics", [])
        if all(id(metric) in watched for metric in metrics):
            with for_metrics():
                return plain(model, *args, **kwargs)
        watched.update(map(id, metrics))
        found: dict[str, int] = {}
        with contextlib.ExitStack() as stack:
            for metric in metrics:
                stack.enter_context(wrapped(metric, "update_state", functools.partial(_watched, metric, found), _WHY))
            result = plain(model, *args, **kwargs)
        for name, size in found.items():
            _warn_of_whole_logits(model, name, size)
        return result

    return compute_metrics


_WHY = "metrics that read logits whole are named"


def _watched(metric: keras.Metric, found: dict[str, int], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a metric's ``update_state`` that notes in ``found`` how many bytes the metric reads whole."""

    def note(size: int) -> None:
        found[metric.name] = found.get(metric.name, 0) + size

    @functools.wraps(plain)
    def update_state(*args: Any, **kwargs: Any) -> Any:
        with for_metrics(note):
            return plain(*args, **kwargs)

    return update_state


def _warn_of_whole_logits(model: keras.Model, metric: str, size: int) -> None:
    if dist.get_rank() == 0:
        logger.warning(
            "[ModelParallel] metric %r of model %r reads whole logits: every rank gathers %s MiB for it in each step",
            metric,
            model.name,
            f"{size / 2**20:,.1f}",
        )


def _loss_of_shards(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def call(self: Any, y_true: Any, y_pred: Any) -> Any:
        if isinstance(y_pred, Logits):
            read = _reader(_LOSSES, self.fn, self._fn_kwargs)
            values = None if read is None or y_pred.was_gathered else read(y_true, y_pred, **self._fn_kwargs)
            if values is not None:
                return values
        return plain(self, y_true, y_pred)

    return call


def _metric_of_shards(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def update_state(self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        read = _reader(_METRICS, self._fn, self._fn_kwargs)
        if not isinstance(y_pred, Logits) or read is None:
            return plain(self, y_true, y_pred, sample_weight)
        fn = self._fn

        def read_or_gather(y_true: Any, y_pred: Any, **options: Any) -> Any:
            values = read(y_true, y_pred, **options)
            return fn(y_true, y_pred, **options) if values is None else values

        with replaced(self, "_fn", read_or_gather, "this metric is given logits in shards"):
            return plain(self, y_true, y_pred, sample_weight)

    return update_state


def _reader(readers: Mapping[Any, Reader], function: Any, options: Mapping[str, Any]) -> Reader | None:
    """Return what reads logits as a function of Keras's does; None if that has options which no reader knows."""
    read = readers.get(function)
    return read if read is not None and options.keys() <= inspect.signature(read).parameters.keys() else None


# Each returns one number for each token, as Keras's function of the name does of whole logits; None if it cannot.


def _sparse_categorical_crossentropy(
    y_true: Any,
    logits: Logits,
    from_logits: bool = False,
    ignore_class: int | None = None,
    axis: int = -1,
    label_smoothing: float = 0.0,  # from Keras 3.16 on
) -> Any:
    targets = _indices(y_true, logits)
    if targets is None or not from_logits or axis not in (-1, logits.ndim - 1) or not 0 <= label_smoothing <= 1:
        return None
    if ignore_class is None:
        return cross_entropy(logits, targets, label_smoothing)
    valid = ops.not_equal(targets, ops.cast(ignore_class, logits.dtype))
    values = ops.where(valid, cross_entropy(logits, ops.where(valid, targets, 0), label_smoothing), 0.0)
    set_keras_mask(values, valid)
    return values


def _categorical_crossentropy(
    y_true: Any, logits: Logits, from_logits: bool = False, label_smoothing: float = 0.0, axis: int = -1
) -> Any:
    targets = ops.cast(y_true, keras.backend.standardize_dtype(logits.dtype))
    fits = targets.shape == logits.shape and not targets.requires_grad
    if not from_logits or not fits or axis not in (-1, logits.ndim - 1) or not 0 <= label_smoothing <= 1:
        return None
    return cross_entropy_of_distributions(logits, targets, label_smoothing)


def _sparse_categorical_accuracy(y_true: Any, logits: Logits) -> Any:
    targets = _indices(y_true, logits)
    return None if targets is None else _matches(targets, logits)


def _categorical_accuracy(y_true: Any, logits: Logits) -> Any:
    y_true = ops.convert_to_tensor(y_true)
    return _matches(ops.argmax(y_true, axis=-1), logits) if y_true.shape == logits.shape else None


def _sparse_top_k_categorical_accuracy(y_true: Any, logits: Logits, k: int = 5, from_sorted_ids: bool = False) -> Any:
    targets = _indices(y_true, logits)
    return None if targets is None or from_sorted_ids else _in_top_k(targets, logits, k)


def _top_k_categorical_accuracy(y_true: Any, logits: Logits, k: int = 5) -> Any:
    y_true = ops.convert_to_tensor(y_true)
    return _in_top_k(ops.argmax(y_true, axis=-1), logits, k) if y_true.shape == logits.shape else None


def _indices(y_true: Any, logits: Logits) -> torch.Tensor | None:
    """Return the targets, one index for each token; None if they are anything else."""
    targets: torch.Tensor = ops.convert_to_tensor(y_true)
    if targets.ndim == logits.ndim and targets.shape[-1] == 1:
        targets = targets[..., 0]
    return targets if targets.shape == logits.shape[:-1] else None


@torch.no_grad()
def _in_top_k(targets: torch.Tensor, logits: Logits, k: int) -> Any:
    """Return 1 for each token of whose logits fewer than ``k`` are larger than that of the target."""
    shard, axis = logits.shard.detach(), logits.axis
    local = targets.to(torch.long) - logits.start
    elsewhere = (local < 0) | (local >= shard.shape[-1])
    own = shard.gather(-1, local.masked_fill(elsewhere, 0)[..., None])[..., 0].masked_fill(elsewhere, -torch.inf)
    with standing_at(METRICS):
        of_target = all_reduce(own, axis, "max")
        larger = all_reduce((shard > of_target[..., None]).sum(-1), axis)
    return ops.cast(larger < k, keras.config.floatx())


def _matches(targets: torch.Tensor, logits: Logits) -> torch.Tensor:
    found = _largest(logits)
    matches: torch.Tensor = ops.cast(ops.equal(targets.to(found.dtype), found), keras.config.floatx())
    return matches


@torch.no_grad()
def _largest(logits: Logits) -> torch.Tensor:
    """Return the index of each token's largest logit, the first where several are."""
    shard, axis = logits.shard.detach(), logits.axis
    values, places = shard.max(-1)
    own = torch.stack([values.to(torch.float64), (places + logits.start).to(torch.float64)])
    with standing_at(METRICS):
        values, places = gather(own[None], Shard(0), axis.size, axis).unbind(1)
    best = values.argmax(0, keepdim=True)
    return places.gather(0, best)[0].to(torch.long)


_LOSSES: dict[Any, Reader] = {
    keras.losses.sparse_categorical_crossentropy: _sparse_categorical_crossentropy,
    keras.losses.categorical_crossentropy: _categorical_crossentropy,
}
_METRICS: dict[Any, Reader] = _LOSSES | {
    keras.metrics.sparse_categorical_accuracy: _sparse_categorical_accuracy,
    keras.metrics.categorical_accuracy: _categorical_accuracy,
    keras.metrics.sparse_top_k_categorical_accuracy: _sparse_top_k_categorical_accuracy,
    keras.metrics.top_k_categorical_accuracy: _top_k_categorical_accuracy,
}
