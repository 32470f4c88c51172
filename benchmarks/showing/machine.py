"""What the numbers of a benchmark depend on: the machine, and the versions of what runs on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

PACKAGES = ("torch", "keras", "keras-hub", "tp-planner")


def facts() -> dict[str, str | int]:
    """Return processor, cores and versions by name; it imports none of the packages."""
    versions = {package: _version(package) for package in PACKAGES}
    return {"machine": processor(), "cores": os.cpu_count() or 1, "python": platform.python_version(), **versions}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # a checkout that runs as it is


def processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def short_name() -> str:
    """Return a name for a folder of results: processor and cores, ``amd-epyc-2core``."""
    return f"{in_short(processor())}-{os.cpu_count()}core"


def in_short(device: str) -> str:
    """Return a device's name for a folder: ``nvidia-h100-80gb-hbm3``."""
    return "-".join(re.findall("[a-z0-9]+", re.sub(r"\(\w+\)|@.*|\b(cpu|processor)\b", " ", device.lower())))
