"""What goes into a block and what comes out of it: tensors, the masks that Keras puts on them, the losses it adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import torch
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class MadeTensor:
    """A tensor that a block made."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True)
class _End:
    """A tensor that comes out: the one of this number among those given, or among those made."""

    made: bool
    number: int


@dataclass(frozen=True)
class BlockResult:
    """What a block came to, without the tensors.

    ``leaves`` are those of what it returned, with an ``_End`` for each tensor, ``masks`` what lies on each of them.
    ``losses`` are those that it added, each with the position of the layer among the block's.
    """

    structure: Any
    leaves: tuple[Any, ...]
    masks: tuple[_End | None, ...]
    losses: tuple[tuple[int, _End], ...]
    made: tuple[MadeTensor, ...]

    def returned(self, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> Any:
        """Return these tensors as the block returned its own, with masks on them."""
        leaves = [_at(leaf, given, made) for leaf in self.leaves]
        for leaf, mask in zip(leaves, self.masks, strict=True):
            if mask is not None:
                set_keras_mask(leaf, _at(mask, given, made))
        return tree_unflatten(leaves, self.structure)

    def add_losses(self, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor], layers: Sequence[Any]) -> None:
        """Let the block of these ``layers`` add these tensors as losses, as the block did with its own."""
        for position, loss in self.losses:
            layers[position]._losses.append(_at(loss, given, made))


def _at(leaf: Any, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> Any:
    if not isinstance(leaf, _End):
        return leaf
    return made[leaf.number] if leaf.made else given[leaf.number]


class BlockEnds:
    """The ends of one call of a block: the tensors it is given, and then those it ``made`` and what it came to.

    Args:
        layers: the block and all below it.
        arguments: what it is called with.
    """

    def __init__(self, layers: Sequence[keras.Layer], arguments: Any) -> None:
        self._losses = [(layer, len(layer._losses)) for layer in layers]
        self.given = once(tensors_in(leaves_and_masks(arguments)))
        self.made: list[torch.Tensor] = []

    def close(self, result: Any) -> BlockResult:
        """Return what the call came to."""
        ends = {id(tensor): _End(False, number) for number, tensor in enumerate(self.given)}

        def end(tensor: Any) -> Any:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in ends:
                ends[id(tensor)] = _End(True, len(self.made))
                self.made.append(tensor)
            return ends.get(id(tensor), tensor)

        leaves, structure = tree_flatten(result)
        losses = [
            (position, loss) for position, (layer, before) in enumerate(self._losses) for loss in layer._losses[before:]
        ]
        return BlockResult(
            structure,
            tuple(map(end, leaves)),
            tuple(end(_mask(leaf)) for leaf in leaves),
            tuple((position, end(loss)) for position, loss in losses),
            tuple(map(_described, self.made)),
        )


def leaves_and_masks(tree: Any) -> list[Any]:
    """Return the leaves of a tree, and after them what Keras's mask on each is; None where there is none."""
    leaves = tree_flatten(tree)[0]
    return [*leaves, *map(_mask, leaves)]


def tensors_in(leaves: Sequence[Any]) -> list[torch.Tensor]:
    """Return the tensors among the leaves."""
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def once(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return each tensor once: its gradients are added inside the block."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def _mask(leaf: Any) -> torch.Tensor | None:
    mask = get_keras_mask(leaf) if isinstance(leaf, torch.Tensor) else None
    return mask if isinstance(mask, torch.Tensor) else None


def _described(tensor: torch.Tensor) -> MadeTensor:
    return MadeTensor(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)
