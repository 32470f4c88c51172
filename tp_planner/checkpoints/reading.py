"""Reading weights on all ranks of a job: each rank its own parts, or a share of what all need.

A part that is cut from rows whose runs are short (``formats/stored.py``) takes reading the rows whole: if each rank
did, all bytes would be read as often as there are ranks. Then each rank reads an equal share of the tensor, block by
block, and hands out what the others need of it, on the host. Which of the two it is depends on the tensor
(``_is_shared``). What goes wrong on one rank is an error on all: they meet before each tensor that may be shared, and
at the end.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tp_planner.checkpoints.formats import stored
from tp_planner.checkpoints.formats.stored import Block, Buffer, Chunk, StoredTensor, indices_in, overlap
from tp_planner.ir.errors import ParallelRuntimeError, PlanError
from tp_planner.ir.placement import Shape
from tp_planner.job.process_group import host_group
from tp_planner.job.waiting import finish, gather_values
from tp_planner.storage.sharding import Piece

# Measured (``benchmarks/README.md``): smaller tensors are read sooner than ranks have met.
SMALLEST_SHARED = 4 * 2**20  # bytes
MOST_IN_VAIN = 1.25  # times what all ranks need; reading is shared where apart they would read more

Parts = Sequence[Sequence[Piece]]  # what each rank stores of a tensor
Answer = tuple[str, str, Sequence[Piece]]  # what is wrong on a rank, what it asks for, and what it stores of that


@contextlib.contextmanager
def reading_together(what: str) -> Iterator[Reading]:
    """Yield what reads tensors on all ranks of the job, if there is one; all ask for the same ones in the same order.

    Inside ranks may not communicate otherwise. An error there, on any rank, is one on all.

    Args:
        what: what ranks do, for errors.

    Raises:
        PlanError: on all ranks, for what cannot be read on one; or if they ask for different tensors.
        ParallelRuntimeError: if another rank has ended.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield Reading()
        return
    reading = _SharedReading(what)
    try:
        yield reading
    except ParallelRuntimeError:  # there is nobody to tell
        raise
    except (PlanError, OSError) as error:
        reading.fail(error, str(error))
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"{what}: {error}") from error
    except Exception as error:
        reading.fail(error, f"{type(error).__name__}: {error}")
        raise
    reading.end()


class Reading:
    """Reads what a rank stores of tensors, each rank for itself."""

    def read(self, tensor: StoredTensor, pieces: Sequence[Piece], into: torch.Tensor) -> None:
        """Fill what this rank stores of a tensor, which is made of these pieces."""
        with torch.no_grad():
            for piece in pieces:
                tensor.read(piece.of_whole, into[indices_of(piece.of_part)])


class _SharedReading(Reading):
    """Reads with the other ranks of the job."""

    def __init__(self, what: str) -> None:
        self._what, self._group = what, host_group()
        self._ended_by: Exception | None = None
        self._number = 0  # of tensors that were shared
        self._sent, self._received = Buffer(), Buffer()  # kept, for memory that is given back in between scatters

    def read(self, tensor: StoredTensor, pieces: Sequence[Piece], into: torch.Tensor) -> None:
        """Fill what this rank stores of a tensor. After an error, which Keras may have kept, each call raises it."""
        if self._ended_by is not None:
            raise self._ended_by
        try:
            self._read(tensor, pieces, into)
        except ParallelRuntimeError as error:
            self._ended_by = error
            raise
        except (PlanError, OSError) as error:
            self.fail(error, str(error))
            raise

    def _read(self, tensor: StoredTensor, pieces: Sequence[Piece], into: torch.Tensor) -> None:
        if tensor.nbytes < SMALLEST_SHARED:
            super().read(tensor, pieces, into)
            return
        parts = self._meet(f"a tensor of {tensor.shape} and {tensor.dtype}", pieces)
        if not _is_shared(tensor, parts):
            super().read(tensor, pieces, into)
            return
        with torch.no_grad():
            sharing = _Sharing(self._what, tensor, parts, self._number, self._group)
            sharing.read(into, self._sent, self._received)
        self._number += 1

    def end(self) -> None:
        """Return once all ranks have read all. Raises PlanError if one cannot."""
        if self._ended_by is not None:
            raise self._ended_by
        self._meet("nothing more", ())

    def fail(self, error: Exception, problem: str) -> None:
        """Let the others know what is wrong here, where they meet next."""
        if self._ended_by is None:
            self._ended_by = error
            self._gather(problem, "", ())

    def _meet(self, asked: str, pieces: Sequence[Piece]) -> Parts:
        answers = self._gather("", asked, pieces)
        if problem := _problem_in(self._what, answers):
            self._ended_by = PlanError(problem)
            raise self._ended_by
        return [pieces for _, _, pieces in answers]

    def _gather(self, problem: str, asked: str, pieces: Sequence[Piece]) -> list[Answer]:
        return gather_values(self._what, (problem, asked, pieces), self._group)


def _problem_in(what: str, answers: Sequence[Answer]) -> str:
    """Return what is wrong with the first rank with which something is; empty if nothing is."""
    for rank, (problem, asked, _) in enumerate(answers):
        if problem:
            return f"rank {rank}: {problem}"
        if asked != answers[0][1]:
            return (
                f"{what}: ranks read different files or models: rank 0 asks for {answers[0][1]}, rank {rank} for "
                f"{asked}; give all of them the same"
            )
    return ""


def _is_shared(tensor: StoredTensor, parts: Parts) -> bool:
    """Whether ranks share the reading, because apart they would read much in vain. All ranks decide alike.

    What several need, replicas say, each reads for itself: that takes half the time of being sent it.
    """
    blocks = [piece.of_whole for pieces in parts for piece in pieces]
    needed = sum(map(_count, blocks)) * tensor.dtype.itemsize
    return sum(map(tensor.bytes_read, blocks)) > MOST_IN_VAIN * needed


@dataclass(frozen=True)
class _Run:
    """A block of a tensor that lies in the file in one piece."""

    chunk: Chunk
    of_chunk: Block

    @property
    def of_whole(self) -> Block:
        return [(begin + a, begin + b) for (a, b), begin in zip(self.of_chunk, self.chunk.offsets, strict=True)]

    def read(self) -> torch.Tensor:
        """Return the block, valid until the next read of the file."""
        shape, begin, row = self.chunk.stored.shape, 0, 1
        for (start, _), size in reversed([*zip(self.of_chunk, shape, strict=True)]):
            begin, row = begin + start * row, row * size
        sizes = [stop - start for start, stop in self.of_chunk]
        return self.chunk.stored.read(begin, begin + math.prod(sizes)).reshape(sizes)


class _Sharing:
    """One tensor that all ranks read together, in rounds: in each a rank reads one run, and all exchange.

    A round takes at most ``LARGEST_READ`` bytes: the run, what is sent of it, and what arrives.

    Args:
        what: what ranks do, for errors.
        tensor: what is read, by all ranks alike.
        parts: what each rank stores of it.
        first: the rank that has the first share, which takes turns, for a small tensor has fewer runs than ranks.
        group: of all ranks, for tensors on the host.
    """

    def __init__(self, what: str, tensor: StoredTensor, parts: Parts, first: int, group: Any) -> None:
        self._what, self._tensor, self._parts, self._first, self._group = what, tensor, parts, first, group
        self._size, self._rank = dist.get_world_size(), dist.get_rank()
        runs = _runs_of(tensor, self._size, _bytes_a_round(tensor, parts))
        self._rounds = -(-len(runs) // self._size)
        self._shares = [runs[at : at + self._rounds] for at in range(0, len(runs), self._rounds)]

    def read(self, into: torch.Tensor, leaving_by: Buffer, arriving_by: Buffer) -> None:
        """Fill this rank's part. What is wrong here is raised in the end, so that the others do not wait."""
        problem: Exception | None = None
        for number in range(self._rounds):
            leaving, arriving = self._exchanged(number)
            sent, received = self._room(leaving_by, leaving), self._room(arriving_by, arriving)
            problem = problem or _problem_of(self._pack, number, sent)
            self._exchange(sent, received, leaving, arriving)
            problem = problem or _problem_of(self._unpack, number, received, into)
        if problem is not None:
            raise problem

    def _room(self, buffer: Buffer, counts: list[list[int]]) -> torch.Tensor:
        size = sum(map(sum, counts)) * self._tensor.dtype.itemsize
        return torch.from_numpy(buffer.of(size)).view(self._tensor.dtype)

    def _run(self, rank: int, number: int) -> _Run | None:
        """Return what a rank reads in a round, if anything."""
        share = (rank - self._first) % self._size
        runs = self._shares[share] if share < len(self._shares) else []
        return runs[number] if number < len(runs) else None

    def _cuts(self, number: int, reader: int, receiver: int) -> Iterator[tuple[Piece, Block]]:
        """Yield what a rank hands to another in a round: the piece that it belongs to, and its block of the whole."""
        if (run := self._run(reader, number)) is not None:
            for piece in self._parts[receiver]:
                if (block := overlap(run.of_whole, piece.of_whole)) is not None:
                    yield piece, block

    def _exchanged(self, number: int) -> tuple[list[list[int]], list[list[int]]]:
        """Return how many elements this rank hands to each, and has from each, block by block."""

        def counts(reader: int, receiver: int) -> list[int]:
            return [_count(block) for _, block in self._cuts(number, reader, receiver)]

        ranks = range(self._size)
        return [counts(self._rank, rank) for rank in ranks], [counts(rank, self._rank) for rank in ranks]

    def _pack(self, number: int, sent: torch.Tensor) -> None:
        run = self._run(self._rank, number)
        if run is None or not sent.numel():
            return
        values, at = run.read(), 0
        for receiver in range(self._size):
            for _, block in self._cuts(number, self._rank, receiver):
                cut = values[indices_in(run.of_whole, block)]
                sent[at : at + cut.numel()].view(cut.shape).copy_(cut)
                at += cut.numel()

    def _exchange(
        self, sent: torch.Tensor, received: torch.Tensor, leaving: list[list[int]], arriving: list[list[int]]
    ) -> None:
        """Exchange bytes, whatever the dtype is."""
        leaves, arrives = ([sum(each) * self._tensor.dtype.itemsize for each in way] for way in (leaving, arriving))
        arriving_bytes, leaving_bytes = received.view(torch.uint8), sent.view(torch.uint8)
        finish(
            self._what,
            dist.all_to_all_single(arriving_bytes, leaving_bytes, arrives, leaves, group=self._group, async_op=True),
        )

    def _unpack(self, number: int, received: torch.Tensor, into: torch.Tensor) -> None:
        at = 0
        for reader in range(self._size):
            for piece, block in self._cuts(number, reader, self._rank):
                shape = [stop - start for start, stop in block]
                place = into[indices_of(piece.of_part)][indices_in(piece.of_whole, block)]
                place.copy_(received[at : at + _count(block)].view(shape))
                at += _count(block)


def _problem_of(function: Callable[..., None], *args: Any) -> Exception | None:
    try:
        function(*args)
    except Exception as error:
        return error
    return None


def _bytes_a_round(tensor: StoredTensor, parts: Parts) -> int:
    """Return how many bytes a rank may read in a round, so that with what it sends and has sent they fit a read."""
    owned = [sum(_count(piece.of_whole) for piece in pieces) for pieces in parts]
    whole = math.prod(tensor.shape)
    sends, receives = sum(owned) / whole, len(parts) * max(owned) / whole
    return int(stored.LARGEST_READ / (1 + sends + receives))


def _runs_of(tensor: StoredTensor, size: int, most: int) -> list[_Run]:
    """Return a tensor in runs of about one size, of at most so many bytes, so that all ranks have as many to read."""
    rounds = max(1, -(-tensor.nbytes // (size * most)))
    even = -(-math.prod(tensor.shape) // (size * rounds))
    largest = max(1, most // tensor.dtype.itemsize)
    return [_Run(chunk, run) for chunk in tensor.chunks for run in _contiguous(chunk.stored.shape, even, largest)]


def _contiguous(shape: Shape, even: int, largest: int) -> Iterator[Block]:
    """Yield blocks of about ``even`` elements, at most ``largest``, that lie in one piece, and are all together."""
    if not shape:
        yield []
        return
    row = math.prod(shape[1:])
    if row > largest:
        for index in range(shape[0]):
            for rest in _contiguous(shape[1:], even, largest):
                yield [(index, index + 1), *rest]
        return
    step = max(1, min(-(-even // row), largest // row))
    for first in range(0, shape[0], step):
        yield [(first, min(first + step, shape[0])), *((0, size) for size in shape[1:])]


def indices_of(block: Block) -> tuple[slice, ...]:
    """Return a block as indices."""
    return tuple(slice(start, stop) for start, stop in block)


def _count(block: Block) -> int:
    return math.prod(stop - start for start, stop in block)
