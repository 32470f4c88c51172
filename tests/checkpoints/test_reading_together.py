"""Reading on all ranks: parts are those of the whole, nothing is read in vain, and nobody waits for one that cannot."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import tp_planner
from tests.checkpoints.files import save_dcp, save_safetensors_in_two
from tests.checkpoints.test_formats import save_hdf5, sharding, tensors
from tests.workers import Pools, WorkerPool
from tp_planner.checkpoints import reading
from tp_planner.checkpoints.formats import stored
from tp_planner.checkpoints.formats.opening import open_weights
from tp_planner.checkpoints.reading import reading_together
from tp_planner.ir.placement import PackedShard, Replicate, Shard

PLACEMENTS = Replicate(), Shard(0), Shard(1), PackedShard(1, (4, 2)), PackedShard(0, (8, 4))
# The files, and with what largest read and shortest run in bytes each is read.
FILES = {"w.weights.h5": (64, 8), "safe": (64, 1000), "dcp": (2**26, 2**18)}


# On the ranks


def meshes() -> tuple[tuple[int, int], ...]:
    size = dist.get_world_size()
    return ((size, 1), (size // 2, 2))


def places(sizes: tuple[int, int]) -> tuple[int, int]:
    return dist.get_rank() % sizes[0], dist.get_rank() // sizes[0]


def shardings(shape: tuple[int, ...]) -> Iterator[Any]:
    """Yield how a tensor may lie on the ranks: cut in any dim, over replicas too, unevenly, packed, or whole."""
    for sizes, placement, batch in itertools.product(meshes(), PLACEMENTS, (Replicate(), Shard(0))):
        if isinstance(placement, PackedShard) and any(part % sizes[0] for part in placement.parts):
            continue
        cuts = [each for each in (placement, batch) if isinstance(each, Shard)]
        fits = all(each.dim < len(shape) for each in cuts)
        if fits and all(sum(each.parts) == shape[each.dim] for each in cuts if isinstance(each, PackedShard)):
            yield sharding(placement, batch, sizes, places(sizes))


def read_all(folder: str) -> int:
    """Read every part of every tensor; return how many."""
    count = 0
    for name, (largest, shortest) in FILES.items():
        with (
            mock.patch.object(stored, "LARGEST_READ", largest),
            mock.patch.object(stored, "SHORTEST_RUN", shortest),
            mock.patch.object(reading, "SMALLEST_SHARED", 1),
            mock.patch.object(reading, "_is_shared", return_value=True),
            open_weights(Path(folder, name)) as weights,
            reading_together("reading") as together,
        ):
            for key, value in tensors().items():
                for own in shardings(tuple(value.shape)):
                    part = torch.full(own.local_shape(tuple(value.shape)), -7, dtype=torch.float64)
                    together.read(weights.tensors[key], own.pieces(tuple(value.shape)), part)
                    torch.testing.assert_close(part, own.own(value).double(), rtol=0, atol=0)
                    count += 1
    return count


def bytes_read(path: str) -> dict[str, int]:
    """Return how many bytes this rank reads of a matrix, by how it is cut."""
    found = {}
    plain = stored.Extent.read
    for label, placement in {"columns": Shard(1), "rows": Shard(0), "whole": Replicate()}.items():
        own, read = sharding(placement, Replicate(), meshes()[0], places(meshes()[0])), []

        def noting(self: Any, start: int, stop: int, read: list[int] = read) -> torch.Tensor:
            read.append((stop - start) * self.dtype.itemsize)
            return plain(self, start, stop)

        with (
            mock.patch.object(stored.Extent, "read", noting),
            open_weights(Path(path)) as weights,
            reading_together("reading") as together,
        ):
            (tensor,) = weights.tensors.values()
            together.read(tensor, own.pieces(tensor.shape), torch.empty(own.local_shape(tensor.shape)))
        found[label] = sum(read)
    return found


def refusals(path: str) -> list[str]:
    """Return what is said where rank 1 cannot read its share, has an error before it, or asks for something else."""
    own, messages = sharding(Shard(1), Replicate(), meshes()[0], places(meshes()[0])), []
    is_odd = dist.get_rank() == 1

    def read(together: Any, tensor: stored.StoredTensor) -> None:
        together.read(tensor, own.pieces(tensor.shape), torch.empty(own.local_shape(tensor.shape)))

    def cannot_read(together: Any, tensor: stored.StoredTensor) -> None:
        with mock.patch.object(stored.Extent, "read", side_effect=OSError(5, "Input/output error")):
            read(together, tensor)

    def fails(together: Any, tensor: stored.StoredTensor) -> None:
        raise ValueError("not here")

    def asks_for_another(together: Any, tensor: stored.StoredTensor) -> None:
        read(together, stored.StoredTensor((2048, 512), tensor.dtype, tensor.chunks))

    def ends(together: Any, tensor: stored.StoredTensor) -> None:
        pass

    def read_two(second: Any) -> None:
        with open_weights(Path(path)) as weights, reading_together("reading") as together:
            (tensor,) = weights.tensors.values()
            read(together, tensor)
            second(together, tensor)

    for odd in (cannot_read, fails, asks_for_another, ends):
        with pytest.raises((tp_planner.PlanError, ValueError)) as refusal:
            read_two(odd if is_odd else read)
        messages.append(f"{type(refusal.value).__name__}: {refusal.value}")
    return messages


# In the test's process


def test_parts_are_those_of_the_whole(workers: WorkerPool, tmp_path: Path) -> None:
    """Whatever the format, the limits, the cuts and the dtypes are."""
    save_hdf5(tensors(), tmp_path / "w.weights.h5")
    save_safetensors_in_two(tensors(), tmp_path / "safe")
    save_dcp(tensors(), tmp_path / "dcp")
    assert min(workers.run(read_all, str(tmp_path))) > 150


def test_nothing_is_read_in_vain(workers: WorkerPool, tmp_path: Path) -> None:
    """Of columns, whose runs are short, each rank reads an equal share; of rows its own; what all need each reads."""
    save_file({"w": torch.zeros(1024, 1024)}, tmp_path / "w.safetensors")
    share = 1024 * 1024 * 4 // workers.size
    for found in workers.run(bytes_read, str(tmp_path / "w.safetensors")):
        assert found == {"columns": share, "rows": share, "whole": share * workers.size}


def test_an_error_on_one_rank_is_one_on_all(pools: Pools, tmp_path: Path) -> None:
    """Nobody waits for one that cannot read, whatever is wrong there; the rank itself raises its own error."""
    save_file({"w": torch.zeros(1024, 1024)}, tmp_path / "w.safetensors")
    first, second = pools(2).run(refusals, str(tmp_path / "w.safetensors"))
    here, there = "(1024, 1024) and torch.float32", "(2048, 512) and torch.float32"
    differ = (
        "PlanError: reading: ranks read different files or models: rank 0 asks for a tensor of {}, rank 1 for {}; "
        "give all of them the same"
    )
    differs = [differ.format(here, f"a tensor of {there}"), differ.format(here, "nothing more")]
    cannot_read = "[Errno 5] Input/output error"
    assert first == [f"PlanError: rank 1: {cannot_read}", "PlanError: rank 1: ValueError: not here", *differs]
    assert second == [f"PlanError: reading: {cannot_read}", "ValueError: not here", *differs]
