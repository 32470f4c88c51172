"""The manifest of a checkpoint: its files with their hashes. It is written last, so it says that all is there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tp_planner.files import write_new
from tp_planner.ir.errors import PlanError

NAME = "manifest.json"
FORMAT = 1
_READ = 2**20  # bytes

Files = Mapping[str, tuple[int, str]]  # size in bytes and SHA-256, by name


def hashed(paths: Iterable[Path]) -> dict[str, tuple[int, str]]:
    """Return size and hash of files, by name."""
    found = {}
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_READ):
                digest.update(block)
        found[path.name] = path.stat().st_size, digest.hexdigest()
    return found


def write_manifest(folder: Path, files: Files) -> None:
    """Write the manifest, to the disk itself."""
    body = {"format": FORMAT, "files": {name: list(files[name]) for name in sorted(files)}}
    write_new(folder / NAME, json.dumps({**body, "sha256": _hash_of(body)}, indent=1))


def read_manifest(folder: Path) -> Files:
    """Return the files of a checkpoint. Raises PlanError unless all are there, in the size that they had."""
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
        body = json.loads(text)
        claimed = body.pop("sha256")
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in body["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{folder}: is no complete checkpoint ({type(error).__name__}: {error})") from None
    if claimed != _hash_of(body) or body["format"] != FORMAT:
        raise PlanError(f"{folder}: its {NAME} is damaged, or of another format than {FORMAT}")
    for name, (size, _) in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file() or path.stat().st_size != size:
            raise PlanError(f"{folder}: {name} is missing or has not its {size} bytes")
    return files


def check_hashes(folder: Path, files: Files, own: Callable[[int], bool]) -> None:
    """Raise PlanError if a file is not what was written; only those whose number is one's ``own`` are read."""
    for number, (name, expected) in enumerate(sorted(files.items())):
        if own(number) and hashed([folder / name])[name] != expected:
            raise PlanError(f"{folder}: {name} is not what was written; it is damaged")


def _hash_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
