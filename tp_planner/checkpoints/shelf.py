"""A folder of checkpoints: one job writes to it, each has its final name once it is complete, old ones are removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tp_planner.checkpoints.manifest import NAME, read_manifest
from tp_planner.files import name_folder
from tp_planner.ir.errors import PlanError

LOCK = ".lock"
ASIDE, REMOVED = ".writing-", ".removing-"  # what names of folders begin with that are not complete
_NAMED = re.compile(r"(\d{6,})-step-(\d+)")  # the first number says which is newer; steps may begin again
_held: dict[Path, int] = {}  # how often this process has a folder to itself


@contextlib.contextmanager
def alone(shelf: Path) -> Iterator[None]:
    """Have a folder to oneself. Raises PlanError if another process has it."""
    shelf.mkdir(parents=True, exist_ok=True)
    key = shelf.resolve()
    if key in _held:
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    with (shelf / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PlanError(f"{shelf}: another job writes checkpoints to this folder; give each its own") from None
        _held[key] = 1
        try:
            yield
        finally:
            del _held[key]


def checkpoints_in(shelf: Path) -> list[Path]:
    """Return what bears the name of a checkpoint, the newest first."""
    found = [(int(match[1]), path) for path in shelf.iterdir() if (match := _NAMED.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def candidates(folder: Path) -> list[Path]:
    """Return the checkpoints to try, the newest first: those in a folder, or the folder itself if it is one."""
    if (folder / NAME).exists() or not folder.is_dir():
        return [folder]
    return checkpoints_in(folder)


def is_complete(folder: Path) -> bool:
    """Whether all files of a checkpoint are there."""
    try:
        read_manifest(folder)
    except PlanError:
        return False
    return True


def begin(shelf: Path, step: int) -> str:
    """Remove what was cut off before, make room aside, and return the name that the checkpoint will have."""
    for left in [*shelf.glob(f"{ASIDE}*"), *shelf.glob(f"{REMOVED}*")]:
        shutil.rmtree(left)
    newest = next(iter(checkpoints_in(shelf)), None)
    number = 1 if newest is None else int(newest.name.partition("-")[0]) + 1
    name = f"{number:06d}-step-{step}"
    (shelf / (ASIDE + name)).mkdir()
    return name


def finish(shelf: Path, name: str) -> Path:
    """Give a checkpoint its final name."""
    name_folder(shelf / (ASIDE + name), shelf / name)
    return shelf / name


def remove_old(shelf: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` complete checkpoints, and what is not complete among those before them."""
    complete = 0
    for path in checkpoints_in(shelf):
        if complete >= max(keep, 1):
            aside = path.with_name(REMOVED + path.name)
            os.rename(path, aside)
            shutil.rmtree(aside)
        complete += path.exists() and is_complete(path)
