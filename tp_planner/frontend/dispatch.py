"""What watches every op: a quick base for dispatch modes, and the tensors among an op's arguments.

Planning runs a few thousand ops, so what each of them passes on its way counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

_DEVICE_OF = torch.ops.prim.device.default


class WatchingMode(TorchDispatchMode):
    """A dispatch mode whose ``watch`` sees the ops.

    For each op, autograd and Keras ask about twice on which device a fake tensor is, which is an op too. It is
    answered here at once, not by the last of the modes.
    """

    def watch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Run an op, and note what is to be noted."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF and type(args[0]) is FakeTensor:
            return args[0].device  # of a fake tensor a property, and no op
        return self.watch(func, types, args, kwargs or {})


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of an op's arguments or results: tuples, lists and dicts. A tenth of pytree's time."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for each in tree:
            yield from tensors_in(each)
    elif isinstance(tree, Mapping):
        for each in tree.values():
            yield from tensors_in(each)


def with_tensors_replaced(tree: Any, replace: Callable[[torch.Tensor], Any]) -> Any:
    """Return an op's arguments with each tensor replaced, in order; tuples, lists and dicts stay what they are."""
    if isinstance(tree, torch.Tensor):
        return replace(tree)
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind([with_tensors_replaced(each, replace) for each in tree])
    if kind is dict:
        return {key: with_tensors_replaced(each, replace) for key, each in tree.items()}
    return tree
