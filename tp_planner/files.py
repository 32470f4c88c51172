"""Files: written aside and put in place when they are whole, so that the last good file survives whatever happens.

Until then what is written lies in a hidden folder beside its place, under its own name; a process that is killed leaves
that folder and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield where to write the file ``path``; afterwards it is in place, and files that were written beside it too.

    These are in place before it. A folder that is not there yet may be written, too. If writing fails, all that was
    there before is as it was.
    """
    final = Path(os.path.realpath(path))  # what a link points to is replaced, and not the link
    if final.exists() and not (final.is_file() or final.is_dir()):  # a pipe, a terminal
        yield final
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield aside / final.name
        _put_in_place(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with opened_aside(path) as file:
        file.write(text)


@contextlib.contextmanager
def opened_aside(path: str | os.PathLike[str]) -> Iterator[IO[str]]:
    """Open a text file to write it, whole or not at all."""
    with written_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
        yield file


def write_new(path: Path, text: str) -> None:
    """Write a text file that is not there yet, to the disk itself; in a folder that gets its name when it is whole."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    _sync(path)


def name_folder(aside: Path, final: Path) -> None:
    """Give a folder that is whole its final name, once all in it has reached the disk."""
    for each in aside.rglob("*"):
        _sync(each)
    _sync(aside)
    os.rename(aside, final)
    _sync(final.parent)


def _put_in_place(aside: Path, final: Path) -> None:
    if (aside / final.name).is_dir():
        name_folder(aside / final.name, final)
        return
    written = [each for each in aside.rglob("*") if each.is_file()]
    for each in written:
        _sync(each)
    for each in sorted(written, key=lambda each: (each.stem == final.stem, each)):  # the file itself last
        place = final.parent / each.relative_to(aside)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            shutil.copymode(place, each)
        os.replace(each, place)
    _sync(final.parent)


def _sync(path: Path) -> None:
    """Let what was written, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
