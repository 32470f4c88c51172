"""safetensors: one file, or a folder with an index of many (https://github.com/huggingface/safetensors)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tp_planner.checkpoints.formats.stored import (
    Buffer,
    Extent,
    RawFile,
    StoredTensor,
    Weights,
    path_in,
    require_apart,
    require_extent,
)
from tp_planner.ir.errors import PlanError

INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100 * 2**20  # bytes, as in the format's own reader
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_safetensors(path: Path) -> Weights:
    """Return the tensors of one file."""
    return _open(path, [path])


def open_safetensors_index(path: Path) -> Weights:
    """Return the tensors of all files that an index names."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in index.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(
            f"{path}: no index of safetensors files ({type(error).__name__}: {error}); copy it again"
        ) from None
    weights = _open(path, [path_in(path.parent, name) for name in names])
    if missing := sorted(set(index) - set(weights.tensors)):
        with weights:
            raise PlanError(f"{path}: {missing[0]!r} and {len(missing) - 1} other tensors are in none of its files")
    return weights


def _open(path: Path, parts: list[Path]) -> Weights:
    tensors: dict[str, StoredTensor] = {}
    files: list[RawFile] = []
    buffer = Buffer()
    try:
        for part in parts:
            files.append(RawFile(part, buffer))
            tensors |= _tensors(files[-1])
        require_apart(path, tensors)
    except BaseException:
        for file in files:
            file.close()
        raise
    return Weights(path, tensors, [file.close for file in files])


def _tensors(file: RawFile) -> dict[str, StoredTensor]:
    length = int.from_bytes(bytes(file.read(0, 8)), "little") if file.size >= 8 else -1
    if not 2 <= length <= min(LARGEST_HEADER, file.size - 8):
        raise PlanError(f"{file.path}: no safetensors file, or one that is cut off; copy it again")
    try:
        header = json.loads(bytes(file.read(8, length)))
        return {
            str(name): StoredTensor.of(_extent(file, str(name), entry, 8 + length))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"{file.path}: its header is damaged ({type(error).__name__}: {error})") from None


def _extent(file: RawFile, name: str, entry: Any, begin: int) -> Extent:
    start, stop = (int(each) for each in entry["data_offsets"])
    if entry["dtype"] not in DTYPES:
        raise PlanError(f"{file.path}: tensor {name!r} is of dtype {entry['dtype']}, which torch does not have")
    if start < 0:
        raise PlanError(f"{file.path}: tensor {name!r} begins before the file's data")
    extent = Extent(file, begin + start, tuple(int(size) for size in entry["shape"]), DTYPES[entry["dtype"]])
    require_extent(file.path, name, extent, stop - start)
    return extent
