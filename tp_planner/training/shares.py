"""Shares: of a variable that every replica stores whole, each updates a part, and sends it to the others.

So an optimizer's slots are in parts, and a replica needs but its part of a gradient's mean, as in ZeRO
(https://arxiv.org/abs/1910.02054). While an optimizer works, such a variable is the share of this replica.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tp_planner.ir.placement import WHOLE, Shard
from tp_planner.ir.plan import Plan
from tp_planner.job.axes import Axes, Axis
from tp_planner.regions.buffers import Cut, Gathered
from tp_planner.regions.calls import Site, running, standing_at
from tp_planner.storage.sharding import Sharding, own_shard
from tp_planner.storage.variables import ParallelVariable, is_sharded, local_tensor, sharded_parameter


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What this replica updates of a variable.

    ``sharding`` cuts its slots and the mean of its gradients, and ``spec`` is what DTensor calls that.
    """

    variable: Any
    sharding: Sharding
    spec: Any

    @classmethod
    def of(cls, variable: Any, sharding: Sharding) -> Share:
        """Return that of a placed variable."""
        part = cls(variable, sharding, None).part
        parameter: Any = sharded_parameter(part, tuple(variable.shape), sharding, requires_grad=False)
        return cls(variable, sharding, parameter._spec)

    @property
    def cut(self) -> Cut:
        """How what this rank stores of the variable is cut over the replicas."""
        assert isinstance(self.sharding.batch_placement, Shard)
        return Cut(tuple(local_tensor(self.variable).shape), self.sharding.batch_placement)

    @property
    def part(self) -> torch.Tensor:
        """The part itself, inside of what this rank stores."""
        part: torch.Tensor = own_shard(local_tensor(self.variable), self.cut.placement, self._axis)
        return part

    @property
    def _axis(self) -> Axis:
        assert self.sharding.axes.batch is not None
        return self.sharding.axes.batch

    def of_gradient(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this replica's part of a gradient of what this rank stores."""
        part: torch.Tensor = own_shard(whole, self.cut.placement, self._axis).contiguous()
        return part

    def gradient(self, part: torch.Tensor) -> DTensor:
        """Return this replica's part of a gradient as the variable's parameter has it."""
        return DTensor(part, self.spec, requires_grad=False)

    def is_part(self, gradient: torch.Tensor) -> bool:
        """Whether a gradient is in parts already."""
        return isinstance(gradient, DTensor) and gradient._spec == self.spec


class Shares:
    """The shares of one model, in the buckets in which they travel when they are updated."""

    def __init__(self, axis: Axis, buckets: Sequence[tuple[Site, Sequence[Share]]]) -> None:
        self._axis, self._buckets = axis, buckets

    def watch(self, undo: list[Callable[[], None]]) -> None:
        """Let optimizers know of them; add what ends that."""
        for _, shares in self._buckets:
            for share in shares:
                _known[id(share.variable)] = share, self
                undo.append(functools.partial(_forget, id(share.variable)))

    def put_together(self, updated: Mapping[int, torch.Tensor]) -> None:
        """Write what all replicas have updated to where variables are stored, bucket by bucket.

        Args:
            updated: this replica's parts, by the variables' ``id``. Buckets of none of them stay at home.
        """
        before: tuple[Gathered, Sequence[Share]] | None = None
        for site, shares in self._buckets:
            if any(id(share.variable) in updated for share in shares):
                with standing_at(site):
                    parts = [updated.get(id(share.variable), share.part) for share in shares]
                    sent = Gathered(parts, [share.cut for share in shares], self._axis)
                _write(before)  # while this one travels
                before = sent, shares
        _write(before)


def _write(arriving: tuple[Gathered, Sequence[Share]] | None) -> None:
    if arriving is not None:
        gathered, shares = arriving
        for number, share in enumerate(shares):
            gathered.write(number, local_tensor(share.variable))


_known: dict[int, tuple[Share, Shares]] = {}  # by id of the variable


def _forget(variable: int) -> None:
    _known.pop(variable, None)


def share_of(variable: Any) -> Share | None:
    """Return this replica's share of a variable; None if it updates all that it stores of it."""
    share, _ = _known.get(id(variable), (None, None))
    return share


def slot_sharding(variable: Any) -> Sharding | None:
    """Return how the slots of a variable are cut; None if they are not."""
    share = share_of(variable)
    if share is not None:
        return share.sharding
    stored: Sharding | None = variable._stored.sharding if is_sharded(variable) else None
    return stored


@contextlib.contextmanager
def being_shares(variables: Iterable[Any], changed: bool = True) -> Iterator[None]:
    """Inside, each of the variables is this replica's share, if it has one; then all are put together, if changed."""
    known = [_known[id(variable)] for variable in variables if id(variable) in _known]
    parts = _in_one_piece([share.part for share, _ in known])
    kept = [(share.variable, share.variable._value, share.variable._shape) for share, _ in known]
    try:
        for (variable, _, _), part in zip(kept, parts, strict=True):
            variable._value = part
            if not isinstance(variable, ParallelVariable):  # which takes what is as long as its part
                variable._shape = tuple(part.shape)
        yield
    finally:
        for variable, value, shape in kept:
            variable._value, variable._shape = value, shape
    if not changed:
        return
    updated = {id(variable): part for (variable, _, _), part in zip(kept, parts, strict=True)}
    with torch.no_grad():
        for shares in dict.fromkeys(shares for _, shares in known):
            running.run(shares.put_together, updated)


def _in_one_piece(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the parts, copied at once those that do not lie in one piece, for fused kernels go through memory."""
    apart = [number for number, part in enumerate(parts) if not part.is_contiguous()]
    pieces = list(parts)
    copies = torch._foreach_mul([parts[number] for number in apart], 1) if apart else ()
    for number, copy in zip(apart, copies, strict=True):
        pieces[number] = copy.contiguous()
    return pieces


def shares_in(plan: Plan, axes: Axes, variables: Mapping[str, Any]) -> list[tuple[Site, list[Share]]]:
    """Return the shares of each bucket of the plan, and where it stands when they are updated.

    ``variables`` are placed ones by key; of those that are not there, there are no shares.
    """
    shared = {each.key: each for each in plan.variables if each.slot_placement != WHOLE and each.key in variables}
    found = []
    for number, keys in enumerate(plan.buckets):
        here = [shared[key] for key in keys if key in shared]
        shares = [Share.of(variables[each.key], Sharding(axes, each.placement, each.slot_placement)) for each in here]
        if shares:
            found.append((Site("", f"weights {number}"), shares))
    return found


def share_their_updates(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether replicas share the update of any of these parameters."""
    shared = {id(share.variable._value) for share, _ in _known.values()}
    return any(id(parameter) in shared for parameter in parameters)
