"""DTensors of unequal parts side by side: torch has no placement for them, so they lie on a mesh named for the parts.

Every tensor that torch makes of one lies on that mesh too: its gradient, a copy, what an optimizer remembers. So what
would take the shards one after the other for the whole knows better: ``full_tensor`` puts them in order, and what
writes or moves them in torch's way, on its own or inside an op, is refused. No other DTensor can be combined with them
by mistake.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, _dispatch
from torch.distributed.tensor import Shard as TorchShard

from tp_planner.ir.errors import PlanError
from tp_planner.ir.placement import PackedShard, Placement, parts_of
from tp_planner.patches import wrap_for_good
from tp_planner.regions.parts_side_by_side import in_whole_order

_NAME = re.compile(r".* in parts of (\d+(?:, \d+)*)")
_FILES = (
    "__create_write_items__",
    "__create_chunk_list__",
    "__get_tensor_shard__",
)  # torch.distributed.checkpoint asks


def has_unequal_parts(placement: Placement) -> bool:
    """Whether torch has no name for the placement."""
    return len(set(parts_of(placement))) > 1


@functools.cache
def mesh_of_parts(mesh: DeviceMesh, parts: tuple[int, ...]) -> DeviceMesh:
    """Return the mesh for DTensors that its first axis cuts in these parts, on the groups of another."""
    assert mesh.mesh_dim_names is not None
    first, *others = mesh.mesh_dim_names
    names = (f"{first} in parts of {', '.join(map(str, parts))}", *others)
    _let_torch_know()
    if mesh.ndim == 1:
        return DeviceMesh.from_group(mesh.get_group(), mesh.device_type, mesh_dim_names=names)
    return DeviceMesh.from_group(mesh.get_all_groups(), mesh.device_type, mesh.mesh, mesh_dim_names=names)


def is_in_unequal_parts(tensor: Any) -> bool:
    """Whether a tensor is a DTensor of unequal parts, or was made of one."""
    return isinstance(tensor, DTensor) and _parts_named(tensor.device_mesh) != ()


def _parts_named(mesh: DeviceMesh) -> tuple[int, ...]:
    named = _NAME.fullmatch((mesh.mesh_dim_names or ("",))[0])
    return tuple(map(int, named[1].split(", "))) if named else ()


def _cut(spec: Any) -> PackedShard | None:
    """Return how a DTensor is cut in unequal parts; None if it is not, or not any more, as a sum over them."""
    parts = _parts_named(spec.mesh)
    placement = spec.placements[0]
    if not parts or not isinstance(placement, TorchShard):
        return None
    if spec.shape[placement.dim] != sum(parts):
        raise _refusal(spec, f"what torch has made of it, of shape {tuple(spec.shape)}, has another order")
    return PackedShard(placement.dim, parts)


def _refusal(spec: Any, what: str) -> PlanError:
    return PlanError(
        f"a tensor is stored in parts of {', '.join(map(str, _parts_named(spec.mesh)))} side by side, for "
        f"which torch has no placement; {what}; take its full_tensor(), variable.numpy(), model.save_weights or "
        f"tp_planner.save_checkpoint"
    )


def _let_torch_know() -> None:
    why = "shards of unequal parts are the whole in another order"
    wrap_for_good(DTensor, "full_tensor", _in_order, why)
    wrap_for_good(DTensor, "redistribute", _where_it_is, why)
    wrap_for_good(_dispatch, "redistribute_local_tensor", _not_inside_an_op, why)
    for name in _FILES:
        wrap_for_good(DTensor, name, _not_written, why)


def _in_order(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(plain)
    def full_tensor(self: DTensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        cut = _cut(self._spec)
        if cut is None:
            return plain(self, *args, **kwargs)
        with _Moves():
            stored = plain(self, *args, **kwargs)
        return in_whole_order(stored, cut, self.device_mesh.size(0))

    return full_tensor


class _Moves:
    """Inside, shards may be put one after the other, for whoever puts them in order."""

    depth = 0

    def __enter__(self) -> None:
        _Moves.depth += 1

    def __exit__(self, *args: object) -> None:
        _Moves.depth -= 1


def _where_it_is(plain: Callable[..., DTensor]) -> Callable[..., DTensor]:
    @functools.wraps(plain)
    def redistribute(self: DTensor, device_mesh: Any = None, placements: Any = None, **options: Any) -> DTensor:
        stays = placements is None or tuple(placements) == tuple(self.placements)
        if not (stays or _Moves.depth) and _cut(self._spec) is not None:
            raise _refusal(self._spec, "torch cannot redistribute it")
        return plain(self, device_mesh, placements, **options)

    return redistribute


def _not_inside_an_op(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(plain)
    def redistribute_local_tensor(local: torch.Tensor, current: Any, target: Any, **options: Any) -> torch.Tensor:
        if current.placements[0] != target.placements[0] and _cut(current) is not None:
            raise _refusal(current, "an op of torch's on it would have to redistribute it")
        return plain(local, current, target, **options)

    return redistribute_local_tensor


def _not_written(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def asked(self: DTensor, *args: Any) -> Any:
        if _cut(self._spec) is not None:
            raise _refusal(self._spec, "torch.distributed.checkpoint would write it in the order in which it is stored")
        return plain(self, *args)

    return asked
