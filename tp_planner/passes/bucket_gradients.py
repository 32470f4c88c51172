"""Bucket gradients: which gradients replicas average together, so that few collectives do and they start early."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tp_planner.ir.placement import Shard
from tp_planner.ir.plan import VariablePlan

BUCKET_BYTES = 25 * 2**20  # that of torch's DistributedDataParallel


def bucket_gradients(variables: Sequence[VariablePlan]) -> tuple[tuple[str, ...], ...]:
    """Return the keys of the variables whose gradients every replica has, in buckets of one dtype each.

    The last variables are first, because their gradients are. A bucket is full when one more gradient would make it
    larger than ``BUCKET_BYTES``.
    """
    buckets: list[list[str]] = []
    open_buckets: dict[str, tuple[list[str], int]] = {}  # by dtype: the bucket and its bytes
    for variable in reversed(variables):
        if not (variable.trainable and "float" in variable.dtype) or isinstance(variable.batch_placement, Shard):
            continue
        size = math.prod(variable.local_shape) * variable.itemsize
        bucket, filled = open_buckets.get(variable.dtype, ([], 0))
        if not bucket or filled + size > BUCKET_BYTES:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(variable.key)
        open_buckets[variable.dtype] = bucket, filled + size
    return tuple(tuple(bucket) for bucket in buckets)
