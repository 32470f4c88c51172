"""Weights from one format to another, block by block: no tensor is in memory but what is read of it at the moment."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import h5py
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from tp_planner.checkpoints.formats import safetensors, stored
from tp_planner.checkpoints.formats.stored import StoredTensor
from tp_planner.files import written_aside
from tp_planner.ir.errors import PlanError

Tensors = Mapping[str, StoredTensor]


def convert(tensors: Tensors, destination: Path) -> None:
    """Write tensors to a ``.safetensors`` or ``.weights.h5`` file, or a folder of torch.distributed.checkpoint.

    The file is written aside and gets its name once it is whole.

    Raises PlanError if there is one already, or its name is that of no format that can be written.
    """
    if destination.exists():
        raise PlanError(f"{destination}: exists already; remove it first, or give another name")
    write = _writer(destination)
    with written_aside(destination) as aside:
        write(tensors, aside)


def _writer(destination: Path) -> Callable[[Tensors, Path], None]:
    if destination.name.endswith(".safetensors"):
        return _write_safetensors
    if destination.name.endswith(".weights.h5"):
        return _write_hdf5
    if destination.suffix:
        raise PlanError(
            f"{destination}: cannot be written; give a name that ends in .safetensors or .weights.h5, or a folder's"
        )
    return _write_dcp


def _blocks(tensor: StoredTensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield a tensor's rows in blocks: the first, the one after the last, and the block itself."""
    if not tensor.shape:
        yield 0, 1, _read(tensor, [])
        return
    row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    step = max(1, stored.LARGEST_READ // max(row, 1))
    for first in range(0, tensor.shape[0], step):
        last = min(first + step, tensor.shape[0])
        yield first, last, _read(tensor, [(first, last), *((0, size) for size in tensor.shape[1:])])


def _read(tensor: StoredTensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    block = torch.empty([stop - start for start, stop in spans], dtype=tensor.dtype)
    tensor.read(spans, block)
    return block


def _write_safetensors(tensors: Tensors, path: Path) -> None:
    names = {dtype: name for name, dtype in safetensors.DTYPES.items()}
    header, end = {}, 0
    for name, tensor in sorted(tensors.items()):
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in sorted(tensors.items()):
            for _, _, block in _blocks(tensor):
                file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write_hdf5(tensors: Tensors, path: Path) -> None:
    with h5py.File(path, "w") as file:
        for name, tensor in sorted(tensors.items()):
            half = tensor.dtype == torch.bfloat16
            kind = "V2" if half else str(torch.empty(0, dtype=tensor.dtype).numpy().dtype)
            dataset = file.create_dataset(name, tensor.shape, kind)
            if half:
                dataset.attrs["dtype"] = "bfloat16"  # as Keras does
            for first, last, block in _blocks(tensor):
                array = block.view(torch.int16).numpy().view("V2") if half else block.numpy()
                dataset[(slice(first, last) if tensor.shape else ())] = array


class _Reading(DefaultSavePlanner):
    """Reads a tensor when it is to be written; until then tensors without values stand for them."""

    tensors: Tensors

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """Return the tensor to write."""
        tensor = self.tensors[index.fqn]
        return _read(tensor, [(0, size) for size in tensor.shape])


def _write_dcp(tensors: Tensors, folder: Path) -> None:
    planner = _Reading(flatten_state_dict=False)
    planner.tensors = tensors
    shapes = {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in sorted(tensors.items())}
    save(shapes, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=True)
