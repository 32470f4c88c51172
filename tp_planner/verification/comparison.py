"""Comparison: what the ranks hold, put together as the plan says, beside what one device has."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tp_planner.ir.placement import WHOLE, Partial, Placement, Shard, StridedShard
from tp_planner.ir.plan import Plan
from tp_planner.ir.verdict import IN_LAYERS, Difference, Event
from tp_planner.verification.rehearsal import replica
from tp_planner.verification.watching import Seen

SMALLEST_SCALE = 1e-6  # of the largest tensor of its kind: what is smaller is rounding and has no scale of its own


def compare(single: Seen, ranks: Sequence[Seen], plan: Plan) -> list[Difference]:
    """Return the difference of every tensor that one device or a rank saw, in the order of one device."""
    joining = _Joining(plan, ranks, _Scales(single))
    events = dict.fromkeys([*single.tensors, *(event for seen in ranks for event in seen.tensors)])
    if any(seen.failure for seen in ranks):  # what came after it is nowhere
        events = {event: None for event in events if all(event in seen.tensors for seen in ranks)}
    return [joining.difference(event, single.tensors.get(event)) for event in events]


def compare_copies(ranks: Sequence[Seen]) -> list[Difference]:
    """Return, for every tensor that all ranks have whole, whether they have the same."""
    return [
        Difference(event, 0.0, math.inf if copies_differ(event, ranks) else 0.0, str(WHOLE))
        for event in ranks[0].digests
    ]


def copies_differ(event: Event, ranks: Sequence[Seen]) -> bool:
    """Whether ranks that have a tensor whole have different ones, in any bit."""
    return len({seen.digests[event] for seen in ranks if event in seen.digests}) > 1


def rounding_of(narrow: Seen, wide: Seen) -> dict[Event, float]:
    """Return how far one device is from itself in float64, relative to the largest element of each tensor."""
    scales = _Scales(wide)
    both = ((event, narrow.tensors[event], exact) for event, exact in wide.tensors.items() if event in narrow.tensors)
    return {event: _distance(tensor, exact) / scales.of(event, exact) for event, tensor, exact in both}


class _Scales:
    """What differences are relative to: a tensor's largest element, but where what it sums up is far larger.

    A sum's rounding is relative to what is added, not to what is left of it: in theory the gradient of a bias of
    softmax's keys is zero. So the gradient of a variable has no smaller scale than those at its layer's outputs.
    """

    def __init__(self, single: Seen) -> None:
        self.owners = single.owners
        self.largest: dict[tuple[str, str], float] = {}  # by phase and kind
        self.gradients: dict[tuple[str, str], float] = {}  # at outputs, by phase and layer
        for event, tensor in single.tensors.items():
            _raise(self.largest, (event.phase, event.kind), _size(tensor))
            if event.kind == "gradient at":
                _raise(self.gradients, (event.phase, event.name), _size(tensor))

    def of(self, event: Event, expected: np.ndarray) -> float:
        """Return the scale of a tensor."""
        scales = [_size(expected), SMALLEST_SCALE * self.largest[event.phase, event.kind]]
        if event.kind == "gradient of":
            scales.append(self.gradients.get((event.phase, self.owners.get(event.name, "")), 0.0))
        return max(*scales, float(np.finfo("float64").tiny))


def _raise(largest: dict[tuple[str, str], float], key: tuple[str, str], size: float) -> None:
    largest[key] = max(largest.get(key, 0.0), size)


class _Joining:
    """Puts together what the ranks of each replica hold of a tensor, and compares it."""

    def __init__(self, plan: Plan, ranks: Sequence[Seen], scales: _Scales) -> None:
        self.ranks, self.scales = ranks, scales
        self.layers = {(layer.layer, layer.mode): layer for layer in plan.layers}
        self.replicas: dict[int, list[Seen]] = {}
        for rank, seen in enumerate(ranks):
            self.replicas.setdefault(replica(rank, plan.mesh), []).append(seen)

    def difference(self, event: Event, expected: np.ndarray | None) -> Difference:
        """Return how far the ranks' tensors are from the expected one."""
        held = [[seen.tensors.get(event) for seen in seens] for seens in self._holders(event)]
        present = [[each for each in tensors if each is not None] for tensors in held]
        if expected is None or any(len(some) < len(all_) for some, all_ in zip(present, held, strict=True)):
            return Difference(event, math.inf, 0.0, "not everywhere")
        placement = _placement(present[0], self._planned(event), expected)
        whole = [_joined(tensors, placement) for tensors in present]
        apart = [_distance(each, tensors[0]) for tensors in present for each in tensors if placement == WHOLE]
        scale = self.scales.of(event, expected)
        error = _error(whole, event, expected)
        disagreement = math.inf if copies_differ(event, self.ranks) else max(apart, default=0.0) / scale
        return Difference(event, error / scale, disagreement, str(placement))

    def _holders(self, event: Event) -> list[list[Seen]]:
        """Return the ranks that noted the tensor, by replica: of what all hold whole it is the first rank alone."""
        if event.kind in IN_LAYERS:
            return list(self.replicas.values())
        return [[self.ranks[0]]]

    def _planned(self, event: Event) -> Placement | None:
        layer = self.layers.get((event.name, self.ranks[0].modes.get(event, "")))
        return layer.output_placement if layer and event.kind in IN_LAYERS else None


def _placement(tensors: Sequence[np.ndarray], planned: Placement | None, expected: np.ndarray) -> Placement:
    """Return how the ranks of a replica hold a tensor: as planned, or as the shapes tell.

    Layers without a plan compute on what they are given. The first dim of a tensor may be that of a replica's rows.
    """
    if isinstance(planned, Partial | StridedShard) or planned == Shard(0):
        return planned
    if tensors[0].ndim != expected.ndim:
        return WHOLE
    sizes = zip(*(tensor.shape for tensor in tensors), strict=True)
    cut = [dim for dim, each in enumerate(sizes) if dim and max(each) < expected.shape[dim] == sum(each)]
    return Shard(cut[0]) if len(cut) == 1 else WHOLE


def _joined(tensors: Sequence[np.ndarray], placement: Placement) -> np.ndarray:
    if isinstance(placement, Partial):
        total: np.ndarray = np.sum(tensors, axis=0)
        return total
    return _concatenated(tensors, placement) if isinstance(placement, Shard | StridedShard) else tensors[0]


def _concatenated(tensors: Sequence[np.ndarray], placement: Shard | StridedShard) -> np.ndarray:
    dim = placement.dim
    if isinstance(placement, Shard):
        return np.concatenate(tensors, axis=dim)
    runs = [each.reshape(*each.shape[:dim], placement.split, -1, *each.shape[dim + 1 :]) for each in tensors]
    joined = np.concatenate(runs, axis=dim + 1)
    return joined.reshape(*joined.shape[:dim], -1, *joined.shape[dim + 2 :])


def _error(joined: Sequence[np.ndarray], event: Event, expected: np.ndarray) -> float:
    """Return the largest difference of what replicas hold: their rows together, or a tensor that all have.

    Where rows are divided, a replica's loss is the mean over its own: gradients at them are as many times larger. What
    has no rows is the same in all replicas, or a mean over a replica's rows.
    """
    if joined[0].shape == expected.shape:
        each = max(_distance(tensor, expected) for tensor in joined)
        return min(each, _distance(np.mean(joined, axis=0), expected)) if event.kind in IN_LAYERS else each
    rows = np.concatenate(joined)
    error = _distance(rows, expected)
    return min(error, _distance(rows / len(joined), expected)) if event.kind == "gradient at" else error


def _size(tensor: np.ndarray) -> float:
    return float(np.abs(tensor.astype("float64")).max(initial=0.0))


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape:
        return float("inf")
    both = np.isnan(found) & np.isnan(expected) | (found == expected)  # infinities, and what masks leave, may be equal
    with np.errstate(invalid="ignore"):
        apart = np.abs(found.astype("float64") - expected.astype("float64"))
    return float(np.nan_to_num(np.where(both, 0.0, apart), nan=np.inf).max(initial=0.0))
