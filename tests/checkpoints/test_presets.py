"""``from_preset`` of a folder, KerasHub's own or Hugging Face's: each rank reads its shards, and they are exact."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
import torch.distributed as dist

import tp_planner
from tests.checkpoints.hugging_face import FOLDERS, write_folder
from tests.families import FAMILIES
from tests.keras_distribution.test_model_parallel import model_parallel
from tests.memory_in_use import watching
from tests.workers import Pools
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.planner import make_plan
from tp_planner.storage.variables import is_in_shards, local_tensor

Arrays = dict[str, np.ndarray]
Folder = tuple[str, str, tp_planner.Plan]  # family, path, and how it is put on two ranks
WAYS = ("parallelize", "distribution")
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096, "num_hidden_layers": 4}


def loaded(name: str, folder: str) -> keras.Model:
    """Return what is in a folder; of language models the task, for which KerasHub reads the backbone."""
    keras.utils.set_random_seed(0)  # of the head that is in no folder
    if name == "bert":
        return keras_hub.models.TextClassifier.from_preset(folder, num_classes=4, preprocessor=None)
    return keras_hub.models.CausalLM.from_preset(folder, preprocessor=None)


@contextlib.contextmanager
def in_shards(way: str, name: str, folder: str, plan: tp_planner.Plan) -> Iterator[keras.Model]:
    keras.utils.clear_session(free_memory=False)  # names are counted anew
    if way == "distribution":
        with model_parallel(FAMILIES[name].case.rules):
            yield loaded(name, folder)
        return
    with tp_planner.deferred_init():
        model = loaded(name, folder)
    yield tp_planner.parallelize(model, plan)


# On the ranks


def read(folders: dict[str, Folder]) -> dict[tuple[str, str], tuple[Arrays, int]]:
    """Return of each way and folder the values, by the variables' keys, and how many variables are in shards."""
    found = {}
    for way in WAYS:
        for label, folder in folders.items():
            with in_shards(way, *folder) as model:
                values = {key: np.array(variable) for key, variable in named_variables(model).items()}
                found[way, label] = values, sum(is_in_shards(variable) for variable in model.variables)
    return found


def peaks(small: Folder, wide: Folder) -> list[tuple[int, int, int]]:
    """Return, of each way, the most memory in use while a folder was read, this rank's values, the largest weight."""
    found = []
    for way in WAYS:
        with in_shards(way, *small):
            pass  # what is imported and cached in the first use is there
        with watching() as most, in_shards(way, *wide) as model:
            own = sum(local_tensor(variable).nbytes for variable in model.variables)
            largest = max(4 * int(np.prod(variable.shape)) for variable in model.variables)
        found.append((most[0], own, largest))
        del model
        gc.collect()
    return found


def refusals(plan: tp_planner.Plan, folder: str, cut: str) -> list[str]:
    """Return what is said of files that are no longer there or cut off, and of values that cannot wait."""
    said = []
    for path in (f"{folder}{dist.get_rank()}", f"{cut}{dist.get_rank()}"):
        keras.utils.clear_session(free_memory=False)
        with tp_planner.deferred_init():
            model = loaded("gemma", path)
        if path.startswith(cut):
            Path(path, "model.safetensors").write_bytes(b"cut")
        else:
            Path(path, "model.safetensors").rename(Path(path, "gone"))
        with pytest.raises(tp_planner.PlanError) as refusal:
            tp_planner.parallelize(model, plan)
        said.append(str(refusal.value))
        assert all(variable._value.is_meta for variable in named_variables(model).values())
    return said


# In the test's process


def planned(name: str, folder: Path) -> Folder:
    family = FAMILIES[name]
    keras.utils.clear_session(free_memory=False)
    with tp_planner.deferred_init():
        model = loaded(name, str(folder))
    inputs, _ = family.batch(np.random.default_rng(0), 2)
    return name, str(folder), make_plan(model, family.layout(2), inputs)


def written(name: str, folder: Path) -> Folder:
    """Return a folder of Hugging Face, or of KerasHub: of a task, with the files that it has for it."""
    family, _, of_keras_hub = name.partition(" ")
    write_folder(family, folder / family)
    if not of_keras_hub:
        return planned(family, folder / family)
    keras.utils.clear_session(free_memory=False)
    own = folder / "of KerasHub"
    loaded(family, str(folder / family)).save_to_preset(str(own), max_shard_size=1e-4)
    return planned(family, own)


def compare(pools: Pools, names: tuple[str, ...], top: Path) -> None:
    """Compare the values that two ranks have, either way, with those of one device, exactly."""
    folders = {}
    for name in names:
        (top / name).mkdir()
        folders[name] = written(name, top / name)
    answers = pools(2).run(read, folders)
    for label, (name, folder, _) in folders.items():
        keras.utils.clear_session(free_memory=False)
        expected = {key: variable.numpy() for key, variable in named_variables(loaded(name, folder)).items()}
        for way in WAYS:
            for values, in_parts in (answer[way, label] for answer in answers):
                assert in_parts
                np.testing.assert_equal(values, expected, err_msg=f"{label}, {way}")


def test_values_are_those_of_one_device(pools: Pools, tmp_path: Path) -> None:
    """Under ``parallelize`` and under a distribution."""
    compare(pools, ("gpt2", "bert of KerasHub"), tmp_path)


@pytest.mark.slow
def test_values_of_every_folder(pools: Pools, tmp_path: Path) -> None:
    compare(pools, (*FOLDERS, *(f"{name} of KerasHub" for name in FOLDERS)), tmp_path)


@pytest.mark.slow
def test_no_rank_holds_the_whole_model(pools: Pools, tmp_path: Path) -> None:
    """While a folder is read a rank has its shards, and a few copies of one weight."""
    for name, sizes in (("small", {}), ("wide", WIDE)):
        write_folder("gemma", tmp_path / name, **sizes)
    small, wide = (planned("gemma", tmp_path / name) for name in ("small", "wide"))
    for answer in pools(2).run(peaks, small, wide):
        for most, own, largest in answer:
            assert own < 4 * largest
            assert most < own + 5 * largest


def test_files_that_have_gone_are_named(pools: Pools, tmp_path: Path) -> None:
    """A folder that cannot be read any more is an error on all ranks, and the model is as before."""
    for name in ("gone0", "gone1", "cut0", "cut1"):
        write_folder("gemma", tmp_path / name)
    _, _, plan = planned("gemma", tmp_path / "gone0")
    answers = pools(2).run(refusals, plan, str(tmp_path / "gone"), str(tmp_path / "cut"))
    for rank, (gone, cut) in enumerate(answers):
        missing = f"`model.safetensors` doesn't exist in preset directory `{tmp_path}/gone{rank}`."
        assert gone == f"{tmp_path}/gone{rank}: FileNotFoundError: {missing}"
        assert cut.startswith(f"{tmp_path}/cut{rank}: SafetensorError: ")
