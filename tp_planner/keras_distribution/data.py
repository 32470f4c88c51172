"""Data under a distribution: each process is fed its share of every global batch.

Every process reads the same global batches, in rank 0's order, and keeps the rows of its model replica. So the ranks
of one replica see the same rows, replicas see different ones, and an epoch has the steps it has in one process.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import keras
import numpy as np
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from tp_planner.ir.errors import ParallelRuntimeError
from tp_planner.ir.placement import chunk_sizes
from tp_planner.runtime.process_group import require_process_group
from tp_planner.runtime.random_state import share_random_state
from tp_planner.runtime.rendezvous import exchange, meet


def share_of(rows: int, shard: int, shards: int) -> slice:
    """Return the rows of a global batch that data shard ``shard`` of ``shards`` is fed: a run of them.

    Shares are as equal as they can be, the longer ones first; those of all shards are the batch, in order.
    """
    sizes = chunk_sizes(rows, shards)
    start = sum(sizes[:shard])
    return slice(start, start + sizes[shard])


def share_batch(batch: Any, shard: int, shards: int) -> Any:
    """Return the share of each array of a batch, nested as the batch is; leaves without rows are kept."""
    return keras.tree.map_structure(
        lambda leaf: leaf[share_of(leaf.shape[0], shard, shards)] if getattr(leaf, "ndim", 0) else leaf, batch
    )


class SharedBatches:
    """The batches of one process: iterating begins an epoch, with rank 0's random state on all ranks.

    Args:
        batches: the global batches.
        shard, shards: which of how many data shards this process is fed.
    """

    def __init__(self, batches: Any, shard: int, shards: int) -> None:
        self._batches, self._shard, self._shards = batches, shard, shards

    def __iter__(self) -> Iterator[Any]:
        _begin_to_read()
        return self._shares(iter(self._batches))  # made here, for it draws random numbers, as in one process

    def _shares(self, batches: Iterator[Any]) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            if not number:
                require_equal(batch)
            yield batch if self._shards == 1 else share_batch(batch, self._shard, self._shards)


def _begin_to_read() -> None:
    meet("beginning to read data under a distribution")
    share_random_state()


def require_equal(batch: Any) -> None:
    """Raise ParallelRuntimeError on every rank if they have read different global batches."""
    digest = hashlib.sha256()
    for leaf in keras.tree.flatten(batch):
        if leaf is not None:
            digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(leaf)).tobytes())
    answers = exchange("comparing the first batch of an epoch", digest.hexdigest())
    for rank, answer in enumerate(answers):
        if answer != answers[0]:
            raise ParallelRuntimeError(
                f"rank {rank} read another first batch than rank 0, so that ranks would train on different data; "
                f"seed what shuffles or draws the data alike on every rank (keras.utils.set_random_seed), or set "
                f"distribution.auto_shard_dataset = False and give each process its own share"
            )


class SharedDataAdapter(DataAdapter):
    """A data adapter of Keras whose batches are shared out to the processes."""

    def __init__(self, adapter: DataAdapter, shard: int, shards: int) -> None:
        self._adapter, self._shard, self._shards = adapter, shard, shards

    def get_torch_dataloader(self) -> SharedBatches:
        return SharedBatches(self._adapter.get_torch_dataloader(), self._shard, self._shards)

    def on_epoch_begin(self) -> None:
        _begin_to_read()  # workers of a PyDataset begin now
        self._adapter.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._adapter.on_epoch_end()

    @property
    def num_batches(self) -> int | None:
        count: int | None = self._adapter.num_batches
        return count

    @property
    def batch_size(self) -> int | None:
        size: int | None = self._adapter.batch_size
        return size

    @property
    def has_partial_batch(self) -> bool | None:
        partial: bool | None = self._adapter.has_partial_batch
        return partial

    @property
    def partial_batch_size(self) -> int | None:
        size: int | None = self._adapter.partial_batch_size
        return size


def shared_out(plain: Callable[..., DataAdapter]) -> Callable[..., DataAdapter]:
    """Return Keras's ``get_data_adapter``, its data shared out under a distribution over several processes."""

    @functools.wraps(plain)
    def get_data_adapter(*args: Any, **kwargs: Any) -> DataAdapter:
        distribution = keras.distribution.distribution()
        if distribution is None or distribution.num_processes == 1 or not distribution.auto_shard_dataset:
            return plain(*args, **kwargs)
        require_process_group(distribution.num_processes)
        with mock.patch.object(distribution, "_is_multi_process", False):  # Keras itself shares out tf.data alone
            adapter = plain(*args, **kwargs)
        return SharedDataAdapter(adapter, distribution.data_shard_id, distribution.num_model_replicas)

    return get_data_adapter
