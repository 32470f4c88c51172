"""Data under a distribution: each process is fed its share of every global batch.

Every process reads the same global batches, in rank 0's order, and keeps the rows of its model replica. So the ranks
of one replica see the same rows, replicas see different ones, and an epoch has the steps it has in one process. What
a model predicts for the shares is put together again.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import torch
import torch.distributed as dist
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from tp_planner.frontend.calling import without_distribution
from tp_planner.ir.errors import ParallelRuntimeError
from tp_planner.ir.placement import chunk_sizes
from tp_planner.job.process_group import host_group, this_device
from tp_planner.job.random_state import share_random_state
from tp_planner.job.rendezvous import exchange, meet

BATCH_ARGUMENTS = ("x", "y", "sample_weight")


@dataclass(frozen=True, slots=True)
class Share:
    """Which of how many data shards this process is fed, and the processes that are fed the others."""

    shard: int
    shards: int
    group: dist.ProcessGroup


def own_share() -> Share | None:
    """Return this process's share of global batches; None where Keras is given what the process is to work on.

    The shard is the process's place along the batch axis, wherever the mesh has that axis.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.num_processes == 1 or not distribution.auto_shard_dataset:
        return None
    if distribution.device_mesh.devices.size == 1:
        return None
    mesh, axis = distribution.device_mesh.backend_mesh, distribution.batch_dim_name
    return Share(mesh.get_local_rank(axis), mesh.get_group(axis).size(), mesh.get_group(axis))


def share_of(rows: int, shard: int, shards: int) -> slice:
    """Return the rows of a global batch that data shard ``shard`` of ``shards`` is fed: a run of them.

    Shares are cut as ``torch.chunk`` does, so that the last ones may be shorter or empty; those of all shards are the
    batch, in order.
    """
    sizes = chunk_sizes(rows, shards)
    start = sum(sizes[:shard])
    return slice(start, start + sizes[shard])


def share_batch(batch: Any, shard: int, shards: int) -> Any:
    """Return the share of each array of a batch, nested as the batch is; leaves without rows are kept."""
    return keras.tree.map_structure(
        lambda leaf: leaf[share_of(leaf.shape[0], shard, shards)] if getattr(leaf, "ndim", 0) else leaf, batch
    )


@dataclass(frozen=True, slots=True)
class Length:
    """How long an epoch is, as far as it is known before. ``rows`` are those of the last batch.

    Where all batches but the last have the same rows, this says it all, and batches need not be compared one by one.
    """

    batches: int | None
    rows: int | None
    is_all: bool

    @classmethod
    def of(cls, adapter: DataAdapter) -> Length:
        is_all = isinstance(adapter, ArrayDataAdapter)
        return cls(adapter.num_batches, adapter.partial_batch_size if is_all else None, is_all)


class SharedBatches:
    """The batches of one process: iterating begins an epoch, with rank 0's random state on all ranks.

    Args:
        batches: the global batches.
        shard, shards: which of how many data shards this process is fed.
        length: what is known of them.
    """

    def __init__(self, batches: Any, shard: int, shards: int, length: Length) -> None:
        self._batches, self._shard, self._shards, self._length = batches, shard, shards, length

    def __iter__(self) -> Iterator[Any]:
        _begin_to_read()
        return self._shares(iter(self._batches))  # made here, for it draws random numbers, as in one process

    def _shares(self, batches: Iterator[Any]) -> Iterator[Any]:
        number = 0
        for number, batch in enumerate(batches, 1):
            if number == 1:
                require_equal(batch, self._length)
            elif not self._length.is_all:
                _require_equal_rows(number, _rows(batch))
            yield batch if self._shards == 1 else share_batch(batch, self._shard, self._shards)
        if number and not self._length.is_all:
            _require_equal_rows(number + 1, ENDED)


def _begin_to_read() -> None:
    meet("beginning to read data under a distribution")
    share_random_state()


ENDED = -1  # what a rank that has no more batches says instead of their rows


def _rows(batch: Any) -> int:
    return next((int(leaf.shape[0]) for leaf in keras.tree.flatten(batch) if getattr(leaf, "ndim", 0)), 0)


def _require_equal_rows(number: int, rows: int) -> None:
    """Raise ParallelRuntimeError on every rank if another has no such batch, or one of other length.

    Shares are cut from batches that are equal on all ranks. What differs would fail in the middle of communication.
    """
    own = torch.tensor([rows])
    all_rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(all_rows, own, group=host_group())
    for rank, each in enumerate(map(int, all_rows)):
        if each != int(all_rows[0]):
            raise ParallelRuntimeError(
                f"batch {number} of an epoch has {_length(int(all_rows[0]))} on rank 0 and {_length(each)} on rank "
                f"{rank}: the ranks' data are not the same; {_GIVE_THE_SAME}"
            )


def _length(rows: int) -> str:
    return "ended" if rows == ENDED else f"{rows} rows"


_GIVE_THE_SAME = (
    "seed what shuffles or draws the data alike on every rank (keras.utils.set_random_seed), or set "
    "distribution.auto_shard_dataset = False and give each process its own share"
)


def require_equal(batch: Any, length: Length | None = None) -> None:
    """Raise ParallelRuntimeError on every rank if they have read different global batches, or will read more or less.

    Args:
        batch: the first batch.
        length: what is known of the others.
    """
    digest = hashlib.sha256()
    for leaf in keras.tree.flatten(batch):
        if leaf is not None:
            digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(leaf)).tobytes())
    known = None if length is None else [length.batches, length.rows]
    mine = json.dumps([digest.hexdigest(), _rows(batch), known])
    answers = [json.loads(text) for text in exchange("comparing the first batch of an epoch", mine)]
    for rank, (digest_there, rows, known) in enumerate(answers):
        first_digest, first_rows, first_known = answers[0]
        if [rows, known] != [first_rows, first_known]:
            raise ParallelRuntimeError(
                f"rank {rank} reads other data than rank 0: {_amount(rows, known)} on rank {rank}, "
                f"{_amount(first_rows, first_known)} on rank 0; {_GIVE_THE_SAME}"
            )
        if digest_there != first_digest:
            raise ParallelRuntimeError(
                f"rank {rank} read another first batch than rank 0, so that ranks would train on different data; "
                f"{_GIVE_THE_SAME}"
            )


def _amount(rows: int, known: list[int | None] | None) -> str:
    batches, last = known or (None, None)
    counted = f"{batches} batches, the first of " if batches is not None else "a first batch of "
    return f"{counted}{rows} rows" + (f" and the last of {last}" if last else "")


class SharedDataAdapter(DataAdapter):
    """A data adapter of Keras whose batches are shared out to the processes."""

    def __init__(self, adapter: DataAdapter, shard: int, shards: int) -> None:
        self._adapter, self._shard, self._shards = adapter, shard, shards

    def get_torch_dataloader(self) -> SharedBatches:
        batches = self._adapter.get_torch_dataloader()
        return SharedBatches(batches, self._shard, self._shards, Length.of(self._adapter))

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
        share = own_share()
        if share is None:
            return plain(*args, **kwargs)
        with without_distribution():  # under one, Keras 3.15 takes nothing but tf.data, and Keras 3.16 shares it out
            adapter = plain(*args, **kwargs)
        return SharedDataAdapter(adapter, share.shard, share.shards)

    return get_data_adapter


# Single batches, and rows that come out

_fed: weakref.WeakSet[keras.Model] = weakref.WeakSet()  # models that were given a batch which is equal on all ranks


def sharing_its_batch(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a model, such as ``train_on_batch``, that is given a global batch and works on its share.

    The first batch that a model is given is compared across ranks.
    """
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def method(*args: Any, **kwargs: Any) -> Any:
        share = own_share()
        if share is None:
            return plain(*args, **kwargs)
        call = signature.bind(*args, **kwargs)
        batch = {name: call.arguments[name] for name in BATCH_ARGUMENTS if name in call.arguments}
        if call.arguments["self"] not in _fed:
            require_equal(batch)
            _fed.add(call.arguments["self"])
        call.arguments.update(share_batch(batch, share.shard, share.shards))
        return plain(*call.args, **call.kwargs)

    return method


def predicting_all_rows(plain: Callable[..., None]) -> Callable[..., None]:
    """Return Keras's ``make_predict_function``, whose function returns the rows of all shares of a batch, in order."""

    @functools.wraps(plain)
    def make_predict_function(self: keras.Model, *args: Any, **kwargs: Any) -> None:
        before = self.predict_function
        plain(self, *args, **kwargs)
        own_rows = self.predict_function
        if own_rows is before:
            return

        @functools.wraps(own_rows)
        def all_rows(data: Any) -> Any:
            share = own_share()
            if share is None or share.shards == 1:
                return own_rows(data)
            batches = [
                keras.tree.map_structure(lambda leaf: rows_of_all(leaf, share), own_rows([batch])) for batch in data
            ]
            return keras.tree.map_structure(lambda *leaves: torch.cat(leaves), *batches)

        self.predict_function = all_rows

    return make_predict_function


def rows_of_all(own: Any, share: Share) -> Any:
    """Return the rows that all shares have of a tensor, in order; what has no rows as it is.

    They travel as bytes, for not every backend knows every dtype.
    """
    if not isinstance(own, torch.Tensor) or not own.ndim:
        return own
    lengths = torch.zeros(share.shards, dtype=torch.int64, device=this_device())
    lengths[share.shard] = len(own)
    dist.all_reduce(lengths, group=share.group)
    rows: list[int] = lengths.tolist()
    width = own.shape[1:].numel() * own.element_size()
    sent = torch.zeros(max(rows) * width, dtype=torch.uint8, device=this_device())
    sent[: len(own) * width] = own.detach().contiguous().reshape(-1).view(torch.uint8)
    received = [torch.empty_like(sent) for _ in rows]
    dist.all_gather(received, sent, share.group)
    whole = torch.cat([part[: count * width] for part, count in zip(received, rows, strict=True)])
    return whole.view(own.dtype).reshape(sum(rows), *own.shape[1:])
