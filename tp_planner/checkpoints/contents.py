"""What a sharded checkpoint holds of a model: variables, its optimizer's too, by name, and how each is stored here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tp_planner.frontend.layer_tree import named_variables
from tp_planner.frontend.structure import places_in_structure
from tp_planner.storage.sharding import Piece
from tp_planner.storage.variables import ParallelVariable, local_tensor
from tp_planner.training.optimizer import slots_of

MODEL, OPTIMIZER = "model/", "optimizer/"  # what names begin with


def contents_of(model: keras.Model) -> dict[str, Any]:
    """Return all variables that a checkpoint has of a model, by name; the optimizer's are those that exist.

    A slot is named for its variable, so that names are the same however Keras numbers optimizers.
    """
    return _contents(model, {key: key for key in named_variables(model)})


def structure_of(model: keras.Model) -> dict[str, str]:
    """Return where each of the contents is in the structure of the model, by its name.

    Names change with what else Keras has numbered, and from a built model to a loaded one; the structure does not.
    """
    return dict(zip(contents_of(model), _contents(model, places_in_structure(model)), strict=True))


def names_there(structure: Mapping[str, str], names: Collection[str], model: keras.Model) -> dict[str, str]:
    """Return by what name a checkpoint has each of the contents of a model, by its name here, but for what it lacks.

    Args:
        structure: of the model that was saved, by the checkpoint's names; empty if the checkpoint does not tell.
        names: of all tensors that the checkpoint has.
        model: the one to load into.
    """
    there = {place: name for name, place in structure.items() if name in names}
    if not structure:
        return {name: name for name in contents_of(model) if name in names}
    return {name: there[place] for name, place in structure_of(model).items() if place in there}


def lack(path: Path, name: str, structure: Mapping[str, str], model: keras.Model) -> str:
    """Return in words that a checkpoint lacks what the model has by this name."""
    if name not in structure:
        return f"{path} has no {name!r}, which the model has"
    there, here = (places[name].partition("/")[2] for places in (structure, structure_of(model)))
    return f"{path} has {name!r} at {there!r}, the model at {here!r}"


def _contents(model: keras.Model, called: Mapping[str, str]) -> dict[str, Any]:
    """Return the contents; how their variables are called is given by the variables' keys."""
    keys = {id(variable): called[key] for key, variable in named_variables(model).items()}
    found = {MODEL + keys[id(variable)]: variable for variable in named_variables(model).values()}
    optimizer = getattr(model, "optimizer", None)
    for name, variable in _optimizer_variables(optimizer, keys) if optimizer is not None else ():
        unique, count = name, 1
        while unique in found:
            count += 1
            unique = f"{name}#{count}"
        found[unique] = variable
    return found


def _optimizer_variables(optimizer: Any, keys: Mapping[int, str]) -> list[tuple[str, Any]]:
    """Return the optimizer's variables with the names that they should have."""
    inner = getattr(optimizer, "inner_optimizer", None)
    holders = [optimizer] if inner is None else [optimizer, inner]
    owners: dict[int, tuple[Any, Any]] = {}
    for holder in holders:
        trained = [each for each in getattr(holder, "_trainable_variables", ()) if id(each) in keys]
        owners |= {id(slot): (owner, slot) for owner, slot in slots_of(holder, trained)}
    named = []
    for variable in {id(each): each for holder in holders for each in holder.variables}.values():
        if id(variable) in owners:
            owner, _ = owners[id(variable)]
            suffix = variable.name.removeprefix(owner.path.replace("/", "_") + "_")
            named.append((f"{OPTIMIZER}{keys[id(owner)]}/{suffix}", variable))
        else:
            named.append((OPTIMIZER + str(variable.name), variable))
    return named


def pieces_of(variable: Any) -> tuple[Piece, ...]:
    """Return the blocks of a variable's whole value that this rank stores."""
    shape, value = tuple(variable.shape), variable._value
    if isinstance(variable, ParallelVariable):
        return variable._stored.sharding.pieces(shape)
    if isinstance(value, DTensor):
        sizes, offsets = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
        begins = [(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)]
        return (Piece(tuple(begins), tuple((0, size) for size in sizes)),) if all(sizes) else ()
    spans = tuple((0, size) for size in shape)
    return (Piece(spans, spans),)


@dataclass(frozen=True)
class Part:
    """What this rank stores of a tensor; ``torch.distributed.checkpoint`` asks it which blocks that are."""

    local: torch.Tensor
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, variable: Any, copied: bool) -> Part:
        """Return a variable's part; ``copied`` to the host if it may change before it is written.

        Summands of replicas are added for it, so that all ranks have to ask.
        """
        local = local_tensor(variable)
        if isinstance(variable, ParallelVariable):
            local = variable._stored.sharding.added(local)
        if copied:
            local = local.to("cpu", copy=True)
        return cls(local, tuple(variable.shape), pieces_of(variable))

    def __create_write_items__(self, name: str, part: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, [start for start, _ in piece.of_whole]),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(
                        torch.Size([start for start, _ in piece.of_whole]),
                        torch.Size([stop - start for start, stop in piece.of_whole]),
                    ),
                    properties=TensorProperties.create_from_tensor(self.local),
                    size=torch.Size(self.shape),
                ),
            )
            for piece in self.pieces
        ]

    def at(self, index: MetadataIndex) -> torch.Tensor:
        """Return the block that begins where an index says."""
        for piece in self.pieces:
            if tuple(start for start, _ in piece.of_whole) == tuple(index.offset or ()):
                return self.local[tuple(slice(*span) for span in piece.of_part)].contiguous()
        raise AssertionError(f"{index} is no piece of this rank")


class PartPlanner(DefaultSavePlanner):  # type: ignore[misc,unused-ignore]
    """Plans the saving of parts; torch's own looks for blocks in tensors of its own kinds alone."""

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """Return the block to write."""
        part: Part = self.state_dict[index.fqn]
        return part.at(index)
