"""Bucket gradients: which gradients travel together, so that few collectives do and they start early.

Replicas average the gradients that each of them has; of those whose update they share, each is left its part. Ranks of
the model axis add up those of variables which they hold whole and use on shards of the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import replace

from tp_planner.ir.placement import WHOLE, SequencePartial
from tp_planner.ir.plan import LayerPlan, Transition, VariablePlan, VariableUse

BUCKET_BYTES = 25 * 2**20  # that of torch's DistributedDataParallel
Buckets = tuple[tuple[str, ...], ...]


def bucket_gradients(variables: Sequence[VariablePlan], late: Set[str] = frozenset()) -> Buckets:
    """Return the keys of the variables whose gradients every replica has, in buckets of one dtype each.

    Those whose updates are shared are in buckets of their own.

    Those of ``late`` come behind the others, for they are there when the backward pass ends.
    """

    def averaged(variable: VariablePlan) -> bool:
        return _has_gradient(variable) and variable.batch_placement == WHOLE

    early = _buckets(variables, lambda variable: averaged(variable) and variable.key not in late)
    return early + _buckets(variables, lambda variable: averaged(variable) and variable.key in late)


def bucket_summands(variables: Sequence[VariablePlan], layers: Sequence[LayerPlan]) -> Buckets:
    """Return the keys of the variables stored whole whose gradients are summands, for they are used on the stream."""
    used = {use.variable for layer in layers for use in layer.uses if _is_summand(use.boundary.backward)}
    return _buckets(variables, lambda each: _has_gradient(each) and each.key in used and _is_whole(each))


def sum_where_used(layers: Sequence[LayerPlan], variables: Sequence[VariablePlan]) -> tuple[LayerPlan, ...]:
    """Return the layers with summands of variables that replicas store in parts added where they are used.

    Those of whole variables wait for the end of the backward pass; these would be cut before it.
    """
    in_parts = {each.key for each in variables if each.batch_placement != WHOLE}

    def summed(use: VariableUse) -> VariableUse:
        backward = use.boundary.backward
        if use.variable not in in_parts or not isinstance(backward.target, SequencePartial):
            return use
        return replace(use, boundary=replace(use.boundary, backward=Transition(backward.source, WHOLE)))

    return tuple(replace(layer, uses=tuple(map(summed, layer.uses))) for layer in layers)


def _is_summand(backward: Transition) -> bool:
    return isinstance(backward.source, SequencePartial) or isinstance(backward.target, SequencePartial)


def _has_gradient(variable: VariablePlan) -> bool:
    return variable.trainable and "float" in variable.dtype


def _is_whole(variable: VariablePlan) -> bool:
    return variable.placement == variable.batch_placement == WHOLE


def _buckets(variables: Sequence[VariablePlan], takes: Callable[[VariablePlan], bool]) -> Buckets:
    """Return the keys of the variables that are taken, in buckets of one dtype each, their updates shared or not.

    The last variables are first, because their gradients are. A bucket is full when one more gradient would make it
    larger than ``BUCKET_BYTES``.
    """
    buckets: list[list[str]] = []
    open_buckets: dict[tuple[str, bool], tuple[list[str], int]] = {}  # by kind: the bucket and its bytes
    for variable in filter(takes, reversed(variables)):
        size = math.prod(variable.local_shape) * variable.itemsize
        kind = variable.dtype, variable.slot_placement == WHOLE
        bucket, filled = open_buckets.get(kind, ([], 0))
        if not bucket or filled + size > BUCKET_BYTES:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(variable.key)
        open_buckets[kind] = bucket, filled + size
    return tuple(tuple(bucket) for bucket in buckets)
