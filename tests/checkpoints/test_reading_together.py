"""Reading on all ranks: parts are those of the whole, nothing is read in vain, and nobody waits for one that cannot."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import tp_planner
from tests.checkpoints.files import save_dcp, save_safetensors_in_two
from tests.checkpoints.test_formats import save_hdf5, sharding, tensors
from tests.job.test_rendezvous import stop_pulse
from tests.keras_distribution.test_model_parallel import model_parallel
from tests.workers import Pools, WorkerPool, layout_map
from tp_planner.checkpoints import reading
from tp_planner.checkpoints.formats import stored
from tp_planner.checkpoints.formats.opening import open_weights
from tp_planner.checkpoints.reading import reading_together
from tp_planner.ir.placement import PackedShard, Replicate, Shard
from tp_planner.job import pulse
from tp_planner.job.process_group import host_group
from tp_planner.job.rendezvous import meet

WIDTH = 1024
FILES_OF_KERAS = "w.weights.h5", "w.keras", "w.weights.json"
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
        ):
            for key, value in tensors().items():
                for own in shardings(tuple(value.shape)):
                    part = torch.full(own.local_shape(tuple(value.shape)), -7, dtype=torch.float64)
                    with reading_together("reading") as together:  # each is the first, of those with no part, too
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


def waits_for_a_dead_rank(path: str) -> str:
    """Let rank 1 have no pulse any more; return what is said on the others."""
    own = sharding(Shard(1), Replicate(), meshes()[0], places(meshes()[0]))

    def read() -> None:
        with open_weights(Path(path)) as weights, reading_together("reading") as together:
            (tensor,) = weights.tensors.values()
            together.read(tensor, own.pieces(tensor.shape), torch.empty(own.local_shape(tensor.shape)))

    with mock.patch.object(pulse, "SILENCE_S", 1.0), mock.patch.object(pulse, "BEAT_S", 0.1):
        stop_pulse()
        meet("the beginning")
        if dist.get_rank() == 1:
            stop_pulse()
            time.sleep(2.5)  # longer than it is waited for
            begun = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
            dist.all_gather(begun, begun[0], group=host_group())  # as the others did when they waited
            return ""
        with pytest.raises(tp_planner.ParallelRuntimeError) as refusal:
            read()
        stop_pulse()
    return str(refusal.value)


def matrices() -> keras.Model:
    x = inputs = keras.Input((WIDTH,), name="x")
    for name in ("columns", "rows"):
        x = keras.layers.Dense(WIDTH, name=name)(x)
    return keras.Model(inputs, x, name="matrices")


def loads_of_keras(folder: str) -> dict[str, tuple[int, bool]]:
    """Return how many bytes this rank reads of matrices in Keras's own loads, and whether it has what was written."""
    rules, plain = {"columns/kernel": (None, "model"), "rows/kernel": ("model", None)}, stored.Extent.read
    with np.load(f"{folder}/values.npz") as values:
        wanted = dict(values)
    found = {}

    def load(model: keras.Model, name: str) -> tuple[int, bool]:
        read = []

        def noting(self: Any, start: int, stop: int) -> torch.Tensor:
            read.append((stop - start) * self.dtype.itemsize)
            return plain(self, start, stop)

        with mock.patch.object(stored.Extent, "read", noting):
            model.load_weights(f"{folder}/{name}")
        same = all(np.array_equal(each.numpy(), wanted[each.path.replace("/", "_")]) for each in model.variables)
        return sum(read), same

    parallel = tp_planner.parallelize(matrices(), layout_map(rules))
    for name in FILES_OF_KERAS:
        found[name] = load(parallel, name)
    with model_parallel(rules):
        found["under a distribution"] = load(matrices(), "w.weights.h5")
    return found


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


def test_a_rank_that_is_dead_is_not_waited_for(pools: Pools, tmp_path: Path) -> None:
    """The others say for whom they have waited, as in any meeting."""
    save_file({"w": torch.zeros(1024, 1024)}, tmp_path / "w.safetensors")
    pool = pools(2)
    assert pool.run(waits_for_a_dead_rank, str(tmp_path / "w.safetensors"))[0] == (
        "reading: rank 1 has given no sign of life for 1 s; its process has ended, or its machine is out of reach"
    )


def test_loads_of_keras_read_shards(pools: Pools, tmp_path: Path) -> None:
    """load_weights into a model in shards reads of each matrix a share, whatever the file is."""
    model = matrices()
    for variable in model.variables:
        variable.assign(np.random.default_rng(0).standard_normal(variable.shape))
    np.savez(tmp_path / "values.npz", **{each.path.replace("/", "_"): each.numpy() for each in model.variables})
    model.save_weights(tmp_path / "w.weights.h5")
    model.save(tmp_path / "w.keras")
    model.save_weights(tmp_path / "w.weights.json", max_shard_size=5e-3)
    share = 2 * WIDTH * WIDTH * 4 // 2
    for found in pools(2).run(loads_of_keras, str(tmp_path)):
        assert found == dict.fromkeys([*FILES_OF_KERAS, "under a distribution"], (share, True))
