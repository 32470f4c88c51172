"""``tf.data`` under a distribution: each process gets its share of every global batch; needs TensorFlow."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch.distributed as dist
from keras.src.trainers import data_adapters

import tp_planner
from tests.keras_distribution.test_distributed_replicas import compiled, distributed, rows
from tests.workers import Pools

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

ROWS, BATCH, EPOCHS = 14, 4, 2


# On the ranks


def dataset(kind: str) -> Any:
    """Return rows 0 to 13 in batches of 4, the targets being their negatives."""
    numbers = np.arange(ROWS, dtype="float32")
    match kind:
        case "plain":
            return tf.data.Dataset.from_tensor_slices((numbers, -numbers)).batch(BATCH)
        case "shuffled":
            return tf.data.Dataset.from_tensor_slices((numbers, -numbers)).shuffle(ROWS, seed=1).batch(BATCH)
        case "without the rest":
            return tf.data.Dataset.from_tensor_slices((numbers, -numbers)).batch(BATCH, drop_remainder=True)
        case "dictionary":
            return tf.data.Dataset.from_tensor_slices(({"a": numbers}, -numbers)).batch(BATCH).prefetch(1)
        case "generator":
            spec = tf.TensorSpec((), "float32")
            pairs = tf.data.Dataset.from_generator(lambda: ((n, -n) for n in numbers), output_signature=(spec, spec))
            return pairs.batch(BATCH)
    raise AssertionError(kind)


KINDS = ("plain", "shuffled", "without the rest", "dictionary", "generator")


def read(kind: str) -> list[Any]:
    """Return how many batches an epoch has, and the targets of every batch of two epochs, as Keras reads them."""
    adapter = data_adapters.get_data_adapter(dataset(kind))
    epochs = []
    for _ in range(EPOCHS):
        adapter.on_epoch_begin()
        batches = []
        for x, y in adapter.get_torch_dataloader():
            assert np.array_equal(keras.tree.flatten(x)[0], -y)
            batches.append(y.tolist())
        adapter.on_epoch_end()
        epochs.append(batches)
    return [adapter.num_batches, *epochs]


def read_alone_and_distributed(kind: str, distribution: str) -> tuple[Any, Any]:
    keras.utils.set_random_seed(0)  # tf.data takes its seeds from it
    alone = read(kind)
    with distributed(distribution):
        return alone, read(kind)


def batched(*arrays: np.ndarray) -> Any:
    return tf.data.Dataset.from_tensor_slices(arrays if len(arrays) > 1 else arrays[0])


def fit() -> dict[str, Any]:
    """Three epochs of shuffled batches with weights, the last of each uneven, with validation; then all else."""
    model, (x, y) = compiled(), rows(15)
    data = batched(x, y, np.linspace(0.5, 1.5, len(x))).shuffle(15, seed=1).batch(7)
    history = model.fit(data, epochs=3, validation_data=batched(*rows(9, seed=4)).batch(7), verbose=0).history
    endless = batched(x, y).batch(7).repeat()
    more = model.fit(endless, epochs=2, steps_per_epoch=2, verbose=0).history
    return {
        **history,
        "loss of an endless dataset": more["loss"],
        "evaluate": model.evaluate(batched(x, y).batch(7), verbose=0),
        "predict": model.predict(batched(x).batch(7), verbose=0),
        **{variable.path: np.array(variable) for variable in model.weights},
    }


def fit_alone_and_distributed(distribution: str) -> tuple[dict[str, Any], dict[str, Any]]:
    keras.utils.set_random_seed(0)
    alone = fit()
    keras.utils.set_random_seed(0)
    with distributed(distribution):
        return alone, fit()


def read_differently() -> str:
    keras.utils.set_random_seed(dist.get_rank())
    with distributed("data"), pytest.raises(tp_planner.ParallelRuntimeError) as error:
        read("shuffled")
    return str(error.value)


def shared_out_by_hand(distribution: str) -> list[list[float]]:
    """Return what this process is given by ``distribute_dataset``, and then reads as its own."""
    with distributed(distribution):
        current = keras.distribution.distribution()
        own = current.distribute_dataset(dataset("without the rest"))
        current.auto_shard_dataset = False
        return [y.tolist() for _, y in data_adapters.get_data_adapter(own).get_torch_dataloader()]


# In the parent


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "distribution"), [(2, "data"), (4, "mesh")])
def test_every_process_reads_its_share(pools: Pools, kind: str, ranks: int, distribution: str) -> None:
    """Replicas share each batch out, the ranks of one read the same, and an epoch has the batches of one process."""
    found = pools(ranks).run(read_alone_and_distributed, kind, distribution)
    alone, shares = found[0][0], [share for _, share in found]
    assert [share[0] for share in shares] == [alone[0]] * ranks
    first, last = shares[: ranks // 2], shares[ranks // 2 :]
    assert all(share == first[0] for share in first)
    assert all(share == last[0] for share in last)
    for epoch in range(1, EPOCHS + 1):
        parts = zip(first[0][epoch], last[0][epoch], strict=True)
        assert [one + other for one, other in parts] == alone[epoch]
    assert (alone[1] != alone[2]) == (kind == "shuffled")


@pytest.mark.parametrize(("ranks", "distribution"), [(2, "data"), (4, "mesh")])
def test_keras_trains_as_in_one_process(pools: Pools, ranks: int, distribution: str) -> None:
    """Histories, metrics, rows and weights are those of one process, on every rank."""
    for alone, found in pools(ranks).run(fit_alone_and_distributed, distribution):
        assert found.keys() == alone.keys()
        for key, expected in alone.items():
            tolerance = 1e-6 if isinstance(expected, list) else 1e-11  # Keras keeps metrics in float32
            np.testing.assert_allclose(found[key], expected, rtol=tolerance, atol=tolerance, err_msg=key)


def test_ranks_that_shuffle_differently(pools: Pools) -> None:
    message = (
        "rank 1 read another first batch than rank 0, so that ranks would train on different data; seed what "
        "shuffles or draws the data alike on every rank (keras.utils.set_random_seed), or set "
        "distribution.auto_shard_dataset = False and give each process its own share"
    )
    assert pools(2).run(read_differently) == [message, message]


@pytest.mark.parametrize(("ranks", "distribution"), [(2, "data"), (4, "mesh")])
def test_a_dataset_that_is_shared_out_by_hand(pools: Pools, ranks: int, distribution: str) -> None:
    """Keras's ``distribute_dataset`` gives each replica every other run of rows, as on JAX."""
    found = pools(ranks).run(shared_out_by_hand, distribution)
    runs = [[-4.0 * batch - 2 * replica - row for row in range(2)] for replica in range(2) for batch in range(3)]
    expected = [runs[:3], runs[3:]]
    assert found == [expected[rank // (ranks // 2)] for rank in range(ranks)]
