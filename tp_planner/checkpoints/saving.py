"""Checkpoints in shards: each rank writes what it stores, and reads what it stores, whatever the layout was then.

They are folders of ``torch.distributed.checkpoint``, which plain torch reads, with what training needs to go on and a
manifest. One is written aside and gets its name once all ranks have written; a damaged one is passed over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import keras
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from tp_planner.checkpoints import shelf as shelves
from tp_planner.checkpoints.contents import (
    MODEL,
    OPTIMIZER,
    Part,
    PartPlanner,
    contents_of,
    lack,
    names_there,
    pieces_of,
    structure_of,
)
from tp_planner.checkpoints.formats.stored import StoredTensor
from tp_planner.checkpoints.formats.torch_dcp import INDEX, open_dcp
from tp_planner.checkpoints.manifest import check_hashes, hashed, read_manifest, write_manifest
from tp_planner.checkpoints.progress import (
    NAME,
    About,
    EpochSoFar,
    Progress,
    random_state,
    read_about,
    set_random_state,
    steps_made,
)
from tp_planner.checkpoints.reading import reading_together
from tp_planner.checkpoints.values import lacks_values, misfit
from tp_planner.ir.errors import PlanError
from tp_planner.job.process_group import this_device
from tp_planner.job.rendezvous import exchange
from tp_planner.job.together import Telling, together
from tp_planner.storage.variables import ParallelVariable, is_sharded, local_tensor
from tp_planner.training.counts import place_among_replicas
from tp_planner.training.model import applied_to

logger = logging.getLogger("tp_planner")
SAVING, LOADING = "tp_planner.save_checkpoint", "tp_planner.load_checkpoint"


def save_checkpoint(
    model: keras.Model, folder: str | Path, *, epoch: int = 0, batch: int = 0, keep: int | None = None
) -> Path:
    """Write a checkpoint of the model into a folder, each rank its shards, and return where it is.

    With the model go its optimizer, seeds, random state and where training stands. Every rank has to call it.

    Args:
        model: a model, parallelized or not.
        folder: where checkpoints lie, each in a folder of its own, which all ranks reach.
        epoch: whole epochs made.
        batch: batches made since then.
        keep: how many complete checkpoints stay, at least one; older ones are removed. By default all.

    Raises:
        PlanError: if another job writes to the folder, or a rank cannot write; the checkpoints before are as they were.
    """
    _require_values(model, SAVING)
    write = prepare(model, Path(folder), epoch, batch, keep, copied=False)
    return write(_tell, None)


def prepare(
    model: keras.Model,
    shelf: Path,
    epoch: int,
    batch: int,
    keep: int | None,
    copied: bool,
    so_far: EpochSoFar | None = None,
    data_epochs: int | None = None,
) -> Callable[[Telling, Any], Path]:
    """Return what writes a checkpoint of the model as it is now, given how ranks tell each other, and their group.

    If the shards are ``copied``, it may write while the model trains on. ``so_far`` is what to say of the epoch that
    runs, as this replica sees it; ``data_epochs`` is how many the data have had, if Keras counts them.
    """
    contents = contents_of(model)
    parts = {name: Part.of(variable, copied) for name, variable in contents.items()}
    about = dataclasses.replace(_about(model, contents, epoch, batch), data_epochs=data_epochs)
    if so_far is not None:
        about = dataclasses.replace(about, so_far=dataclasses.asdict(so_far))
    return functools.partial(_write, parts, about, place_among_replicas(model)[1], shelf, keep)


def _require_values(model: keras.Model, what: str) -> None:
    if lacks_values(model):
        raise PlanError(
            f"{what}: model {model.name!r} was built without values; "
            f"call tp_planner.parallelize first, which makes them"
        )


def _tell(what: str, text: str) -> list[str]:
    return exchange(what, text) if dist.is_initialized() else [text]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def own_device() -> torch.device:
    """Return the device of this process; the host outside of a job."""
    return this_device() if dist.is_initialized() else torch.device("cpu")


def _about(model: keras.Model, contents: dict[str, Any], epoch: int, batch: int) -> About:
    applied, optimizer = applied_to(model), getattr(model, "optimizer", None)
    layout = {}
    for name, variable in contents.items():
        if is_sharded(variable):
            sharding = variable._stored.sharding
            layout[name] = f"{sharding.placement}, {sharding.batch_placement}"
    return About(
        step=steps_made(model),
        epoch=epoch,
        batch=batch,
        model=str(model.name),
        dtype_policy=str(model.dtype_policy.name),
        optimizer=type(optimizer).__name__ if optimizer is not None else "",
        mesh=str(applied.plan.mesh) if applied is not None else "",
        layout=layout,
        random_state=random_state(own_device()),
        structure=structure_of(model),
    )


def _write(
    parts: dict[str, Part], about: About, replica: int, shelf: Path, keep: int | None, tell: Telling, group: Any
) -> Path:
    first = _rank() == 0

    def begin() -> str:
        opened.enter_context(shelves.alone(shelf))
        return shelves.begin(shelf, about.step)

    with contextlib.ExitStack() as opened:
        name = together(SAVING, lambda: begin() if first else "", tell)
        name = tell(SAVING, name)[0]
        aside = shelf / (shelves.ASIDE + name)
        try:
            _write_parts(parts, aside, group)
            own = together(SAVING, lambda: hashed(sorted(aside.glob(f"__{_rank()}_*"))), tell)
            files = {
                each: tuple(found) for text in tell(SAVING, json.dumps(own)) for each, found in json.loads(text).items()
            }
            if about.so_far:
                about = _of_all_replicas(about, replica, tell)
            together(SAVING, lambda: _seal(shelf, name, about, files, keep) if first else None, tell)
        except BaseException:
            if first:
                shutil.rmtree(aside, ignore_errors=True)
            raise
    return shelf / name


def _write_parts(parts: dict[str, Part], aside: Path, group: Any) -> None:
    writer = FileSystemWriter(aside, overwrite=True)
    planner = PartPlanner(flatten_state_dict=False)
    try:
        save(
            dict(parts), storage_writer=writer, planner=planner, process_group=group, no_dist=not dist.is_initialized()
        )
    except CheckpointException as error:
        rank, (problem, _) = next(iter(error.failures.items()))
        raise PlanError(f"rank {rank} cannot write to {aside.parent}: {problem}") from error


def _of_all_replicas(about: About, replica: int, tell: Telling) -> About:
    """Return it with what the metrics of each replica have counted, where it had that of this one."""
    answers = [json.loads(text) for text in tell(SAVING, json.dumps([replica, about.so_far["counts"]]))]
    counts = {place: each for place, (each,) in answers}
    return dataclasses.replace(about, so_far={**about.so_far, "counts": [counts[place] for place in sorted(counts)]})


def _seal(shelf: Path, name: str, about: About, files: dict[str, tuple[int, str]], keep: int | None) -> None:
    """Write what rank 0 alone writes, the manifest last, and give the checkpoint its name."""
    aside = shelf / (shelves.ASIDE + name)
    about.write(aside)
    write_manifest(aside, files | hashed([aside / INDEX, aside / NAME]))
    shelves.finish(shelf, name)
    if keep is not None:
        shelves.remove_old(shelf, keep)


def load_checkpoint(model: keras.Model, folder: str | Path) -> Progress:
    """Load the newest complete checkpoint into the model, each rank its shards, and return where training stands.

    The mesh and the layout may be others than when it was written. Every rank has to call it.

    Args:
        model: a model as the one that was saved, parallelized or not; compiled, if its optimizer is to go on.
        folder: where checkpoints lie, or that of one of them.

    Raises:
        PlanError: if there is no complete checkpoint, or it is one of another model; with all that does not fit.
    """
    _require_values(model, LOADING)
    path, problems = _newest_whole(Path(folder))
    for problem in problems:
        logger.warning("[ModelParallel] passed over a checkpoint: %s", problem)
    about = together(LOADING, lambda: read_about(path), _tell)
    with contextlib.ExitStack() as opened:
        tensors = together(LOADING, lambda: opened.enter_context(open_dcp(path)).tensors, _tell)
        _build_optimizer(model, tensors)
        found = together(LOADING, lambda: _match(model, tensors, path, about), _tell)
        with reading_together(LOADING) as reading:
            for variable, tensor in found:
                reading.read(tensor, pieces_of(variable), local_tensor(variable))
        _leave_sums_to_one(found)
    set_random_state(about.random_state, own_device())
    return Progress(about.step, about.epoch, about.batch, path)


def _newest_whole(folder: Path) -> tuple[Path, list[str]]:
    """Return the newest checkpoint of which each byte is as it was written, and what is wrong with newer ones."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    names = json.loads(_tell(LOADING, json.dumps([str(each) for each in shelves.candidates(folder)]))[0])
    problems = []
    for path in map(Path, names):
        try:
            together(LOADING, lambda path=path: _check(path, _rank(), size), _tell)  # type: ignore[misc]
        except PlanError as problem:
            problems.append(str(problem))
        else:
            return path, problems
    raise PlanError([f"{folder}: holds no complete checkpoint", *problems])


def _check(path: Path, rank: int, size: int) -> None:
    files = read_manifest(path)
    check_hashes(path, files, lambda number: number % size == rank)


def _build_optimizer(model: keras.Model, tensors: Collection[str]) -> None:
    """Let the slots exist that a checkpoint has values for; one that was written before the first step has none."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and not optimizer.built and _slots(set(tensors) - set(contents_of(model))):
        optimizer.build(model.trainable_variables)


def _slots(names: Collection[str]) -> bool:
    """Whether some of the names are those of an optimizer's variables."""
    return any(name.startswith(OPTIMIZER) for name in names)


def _match(
    model: keras.Model, tensors: Mapping[str, StoredTensor], path: Path, about: About
) -> list[tuple[Any, StoredTensor]]:
    """Return the model's variables with what the checkpoint has of them; raise PlanError with all that does not fit.

    What is at the same place in the structure of both models belongs together, whatever its name is.
    """
    contents, problems, found = contents_of(model), [], []
    there = names_there(about.structure, tensors, model)
    trained = any(name.startswith(OPTIMIZER) for name in tensors)
    lacking, left = set(contents) - set(there), set(tensors) - set(there.values())
    if about.step == 0 and trained and _slots(lacking) and not _slots(left):
        raise PlanError(
            f"{path} was written before the optimizer's first step, and the model's optimizer has state of steps; "
            f"compile the model again, and load it then"
        )
    for name, variable in contents.items():
        if name in lacking:
            if name.startswith(MODEL) or trained:
                problems.append(lack(path, name, about.structure, model))
        elif problem := misfit(tensors[there[name]], variable):
            problems.append(f"{path}: {there[name]!r} {problem} of the model")
        else:
            found.append((variable, tensors[there[name]]))
    has_optimizer = any(name.startswith(OPTIMIZER) for name in contents)
    for name in sorted(left - lacking):
        if has_optimizer or not name.startswith(OPTIMIZER):
            problems.append(f"{path} has {name!r}, which the model has not")
    if problems:
        raise PlanError(problems)
    return found


def _leave_sums_to_one(found: list[tuple[Any, StoredTensor]]) -> None:
    """Of sums whose summands replicas have, and all have just read, let the first replica have it all."""
    with torch.no_grad():
        for variable, _ in found:
            if isinstance(variable, ParallelVariable) and not variable._stored.sharding.is_first_summand:
                local_tensor(variable).zero_()
