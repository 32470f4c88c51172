"""Totals: metrics of replicas, the mean loss among them, as those of the whole batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import torch

from tp_planner.regions.calls import METRICS, running
from tp_planner.regions.replicas import Replicas, add_in_place, wait


def results_of_all(model: keras.Model, replicas: Replicas) -> Callable[[], Any]:
    """Return Keras's ``get_metrics_result``: what the replicas' metrics have counted is added up for it.

    A metric's variables are sums, unless they say otherwise; afterwards each replica goes on with its own.
    """
    plain = type(model).get_metrics_result

    @functools.wraps(plain)
    def get_metrics_result() -> Any:
        variables = [
            variable
            for metric in model.metrics
            for variable in metric.variables
            if variable.aggregation in ("sum", "mean")
        ]
        own = [variable.value.detach().clone() for variable in variables]
        if not own:
            return plain(model)
        _assign(variables, running.run(_added, own, tuple(each.aggregation for each in variables), replicas))
        try:
            return plain(model)
        finally:
            _assign(variables, own)

    return get_metrics_result


def logs_of_all(model: keras.Model, logs: Any) -> Any:
    """Return the logs of a training or test step that a user wrote: metrics' results in it are of the whole batch.

    Keras's own steps ask for them by ``get_metrics_result``; those of its guides ask each metric.
    """
    if not isinstance(logs, dict):
        return logs
    return _with_totals(logs, type(model).get_metrics_result(model), model.get_metrics_result())


def _with_totals(logs: Mapping[str, Any], own: Mapping[str, Any], totals: Mapping[str, Any]) -> dict[str, Any]:
    """Return the logs, in which compiled metrics are a mapping of their own, with totals for own results."""
    return {
        name: _with_totals(value, own, totals)
        if isinstance(value, dict)
        else (totals[name] if _is(value, own.get(name)) else value)
        for name, value in logs.items()
    }


def _is(value: Any, result: Any) -> bool:
    """Whether a value of the logs is the result of the metric of this name."""
    if not (isinstance(value, torch.Tensor) and isinstance(result, torch.Tensor)):
        return False
    alike = (value.shape, value.dtype, value.device) == (result.shape, result.dtype, result.device)
    return alike and torch.allclose(value, result, rtol=0, atol=0, equal_nan=True)


def _assign(variables: list[Any], values: list[torch.Tensor]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _added(own: list[torch.Tensor], aggregations: Sequence[str], replicas: Replicas) -> list[torch.Tensor]:
    """Return what each of these values is over all replicas: the sum, or the mean."""
    flat = torch.cat([value.to(torch.float64).reshape(-1) for value in own])
    add_in_place(flat, replicas.axis, METRICS)
    added = wait(flat).split([value.numel() for value in own])
    return [
        (total / (replicas.axis.size if aggregation == "mean" else 1)).reshape(value.shape).to(value.dtype)
        for total, value, aggregation in zip(added, own, aggregations, strict=True)
    ]
