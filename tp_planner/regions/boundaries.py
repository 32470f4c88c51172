"""Boundaries at run time: change a local tensor's placement forward, and its gradient's backward.

The four classic conversions of tensor parallelism (Megatron-LM's f and g, gather and scatter) are one autograd
function with two transitions.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace

import torch

from tp_planner.ir.errors import ParallelRuntimeError
from tp_planner.ir.placement import Partial, Replicate, SequenceShard, Shard, chunk_sizes
from tp_planner.ir.plan import Boundary, Transition
from tp_planner.job.axes import Axis
from tp_planner.regions.backward import without_gradients
from tp_planner.regions.calls import Site, running, standing_at
from tp_planner.regions.collectives import (
    all_reduce,
    arrived,
    begin_all_gather,
    begin_all_reduce,
    begin_reduce_scatter,
    is_alone_in_memory,
    is_nobodys,
)
from tp_planner.regions.left_out import LeftOut, can_be_made_again, cannot_be_made_again
from tp_planner.regions.parts_side_by_side import in_stored_order, in_whole_order


def change(
    tensor: torch.Tensor, transition: Transition, axis: Axis, site: Site, length: int | None = None
) -> torch.Tensor:
    """Return this rank's tensor after the transition; no gradient flows through it.

    Args:
        tensor: what this rank holds before. Sharded dims divide evenly, but for a last dim that is gathered, or cut.
        transition: placements before and after.
        axis: the model axis.
        site: where the transition stands in the plan.
        length: how long a dim is whose shards are unequal; by default they are equal.
    """
    if transition.source == transition.target:
        return tensor
    if isinstance(transition.target, SequenceShard) and tensor.shape[transition.target.dim] % axis.size:
        running.indivisible = tensor.shape[transition.target.dim]
        raise ParallelRuntimeError(
            f"a sequence of length {running.indivisible} at {site.layer!r} does not divide by {axis.size}"
        )
    before, running.site = running.site, site  # standing_at takes longer
    try:
        return _change(tensor, transition, axis, length)
    finally:
        running.site = before


def _change(tensor: torch.Tensor, transition: Transition, axis: Axis, length: int | None) -> torch.Tensor:
    match transition.source, transition.target:
        case Partial(), Replicate():
            return all_reduce(tensor.contiguous(), axis)
        case Shard(dim) as shards, Replicate() if length is not None:
            return gather(tensor, shards, length, axis)
        case Shard(dim) as shards, Replicate():
            return in_whole_order(_all_gather(tensor.contiguous(), dim, axis), shards, axis.size)
        case Partial(), Shard(dim) as shards:
            return _reduce_scatter(in_stored_order(tensor, shards, axis.size).contiguous(), dim, axis)
        case Replicate(), Shard(dim) as shards:
            sizes = chunk_sizes(tensor.shape[dim], axis.size)
            # A copy: a slice would keep the whole tensor's storage.
            shard = in_stored_order(tensor, shards, axis.size).narrow(dim, axis.rank * sizes[0], sizes[axis.rank])
            return shard.clone(memory_format=torch.contiguous_format)
        case Shard(dim), Partial():
            around = torch.zeros(_with_length(tensor, dim, axis.size), dtype=tensor.dtype, device=tensor.device)
            around.narrow(dim, axis.rank * tensor.shape[dim], tensor.shape[dim]).copy_(tensor)
            return around
        case Replicate(), Partial():
            return tensor if axis.rank == 0 else torch.zeros_like(tensor)
    raise AssertionError(f"no boundary changes {transition}")


def sum_in_place(summand: torch.Tensor, axis: Axis, site: Site) -> torch.Tensor:
    """Return the sum of all ranks' tensors in the memory of this one, which nothing else reads; not tracked."""
    cannot_be_made_again(summand)  # nor what lies there from now on
    with standing_at(site):
        return arrived(begin_all_reduce(summand.detach(), axis, in_place=True))


def is_sum(transition: Transition) -> bool:
    """Whether what comes across is the sum of what all ranks have."""
    return isinstance(transition.source, Partial) and isinstance(transition.target, Replicate)


def _is_sum_alone(boundary: Boundary) -> bool:
    """Whether a boundary is a sum, and nothing on the way back."""
    on_the_way_back = boundary.backward.source != boundary.backward.target or boundary.behind or boundary.again
    return is_sum(boundary.forward) and not on_the_way_back


def unequal_length(boundary: Boundary, transition: Transition, axis: Axis) -> int | None:
    """Return how long a dim is whose unequal shards one of the boundary's transitions gathers; None for equal ones.

    Only dims of weights are cut into unequal shards, which are as long in every call.
    """
    source = transition.source
    length = boundary.shape[source.dim] if isinstance(source, Shard) else 0
    return length if length % axis.size else None


def _with_length(shard: torch.Tensor, dim: int, parts: int) -> list[int]:
    """Return the shape of the whole of equal shards."""
    return [size * parts if each == dim else size for each, size in enumerate(shard.shape)]


def gather(shard: torch.Tensor, placement: Shard, length: int, axis: Axis) -> torch.Tensor:
    """Return the whole tensor, ``length`` long in the dim that is cut, of which ``shard`` is this rank's.

    Chunks may be unequal: short ones travel padded, so that one all-gather does.
    """
    dim, full = placement.dim, chunk_sizes(length, axis.size)[0]
    whole = in_whole_order(_all_gather(_padded(shard, dim, full), dim, axis), placement, axis.size)
    return whole if whole.shape[dim] == length else whole.narrow(dim, 0, length).contiguous()


def reduce_to_shard(summand: torch.Tensor, placement: Shard, axis: Axis) -> torch.Tensor:
    """Return this rank's chunk of the sum of all ranks' whole tensors; chunks may be unequal."""
    dim, summand = placement.dim, in_stored_order(summand, placement, axis.size)
    sizes = chunk_sizes(summand.shape[dim], axis.size)
    padded = _padded(summand, dim, sizes[0] * axis.size)
    chunk = _reduce_scatter(padded, dim, axis)
    own = sizes[axis.rank]
    return chunk if chunk.shape[dim] == own else chunk.narrow(dim, 0, own).clone(memory_format=torch.contiguous_format)


def _padded(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    missing = length - tensor.shape[dim]
    if not missing:
        return tensor.contiguous()
    return torch.nn.functional.pad(tensor, [0, 0] * (tensor.ndim - 1 - dim) + [0, missing])


def _all_gather(shard: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    return _side_by_side(arrived(begin_all_gather(shard, axis)), dim, axis)


def _side_by_side(stacked: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    return stacked if dim == 0 else torch.cat(stacked.chunk(axis.size), dim)


def _reduce_scatter(summand: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    return arrived(begin_reduce_scatter(_stacked(summand, dim, axis), axis))


def _stacked(summand: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    return summand if dim == 0 else torch.cat(summand.chunk(axis.size, dim))


class _Shards:
    """What is gathered at a boundary, from which it can be gathered again."""

    def __init__(self, part: torch.Tensor, transition: Transition, axis: Axis, site: Site) -> None:
        self.kept, self._transition, self._axis, self._site = (part,), transition, axis, site
        self._begun: tuple[torch.Tensor, torch.Tensor] | None = None  # what is sent, and what arrives

    def begin(self) -> None:
        """Begin to gather again, before the whole is asked for."""
        if self._begun is None:
            with torch.no_grad(), standing_at(replace(self._site, early=True)):
                sent = self.kept[0].contiguous()
                self._begun = sent, begin_all_gather(sent, self._axis)

    def whole(self) -> torch.Tensor:
        with torch.no_grad():
            if self._begun is None:
                return change(self.kept[0], self._transition, self._axis, self._site)
            shards = self._transition.source
            assert isinstance(shards, Shard)
            whole = _side_by_side(self._arrive(), shards.dim, self._axis)
            return in_whole_order(whole, shards, self._axis.size)

    def forget(self) -> None:
        """Wait for what was begun and not asked for."""
        if self._begun is not None:
            self._arrive()

    def _arrive(self) -> torch.Tensor:
        assert self._begun is not None
        whole = arrived(self._begun[1])
        self._begun = None
        return whole


class _OnItsWay:
    """A gradient between the start of its sum and the wait for it.

    ``number`` is that of the autograd nodes which run meanwhile, ``again`` what they need that is gathered again. What
    autograd keeps holds that, and lets go of it; nodes are there until the step ends.
    """

    def __init__(self) -> None:
        self.number = 0
        self.again: Callable[[], LeftOut | None] = _nothing
        self._begun: LeftOut | None = None  # that of which shards travel
        self._sent: torch.Tensor | None = None  # which has to stay as long as it travels

    def begin_again(self) -> None:
        """Begin to gather again what will be asked for."""
        left_out = self.again()
        if left_out is not None and left_out.is_left_out:
            self._begun = left_out
            _shards_of(left_out).begin()

    def begin(
        self, gradient: torch.Tensor, transition: Transition, axis: Axis, site: Site, in_place: bool
    ) -> torch.Tensor:
        """Begin to change a summand as ``change`` does, and return what will hold the result."""
        with standing_at(site):
            if not isinstance(transition.target, Shard):
                return begin_all_reduce(gradient.contiguous(), axis, in_place)
            shards, dim = transition.target, transition.target.dim
            self._sent = _stacked(in_stored_order(gradient, shards, axis.size).contiguous(), dim, axis)
            return begin_reduce_scatter(self._sent, axis)

    def arrive(self, arriving: torch.Tensor) -> torch.Tensor:
        """Return the result once it is there."""
        result, self._sent = arrived(arriving), None
        left_out, self._begun = self._begun or self.again(), None
        if left_out is not None:
            left_out.let_go()
            _shards_of(left_out).forget()
        return result


def _nothing() -> None:
    return None


def _shards_of(left_out: LeftOut) -> _Shards:
    assert isinstance(left_out.source, _Shards)
    return left_out.source


class _Arriving(torch.autograd.Function):
    """Nothing, before a boundary; on the way back it waits for what the boundary has begun."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: torch.Tensor, on_its_way: _OnItsWay) -> torch.Tensor:
        ctx.on_its_way = on_its_way  # type: ignore[attr-defined]
        return tensor.view_as(tensor)

    @staticmethod
    @without_gradients
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.on_its_way.arrive(gradient), None  # type: ignore[attr-defined]


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        tensor: torch.Tensor,
        boundary: Boundary,
        axis: Axis,
        site: Site,
        on_its_way: _OnItsWay | None,
        alone: bool,
    ) -> torch.Tensor:
        ctx.boundary, ctx.axis, ctx.site, ctx.on_its_way = boundary, axis, site, on_its_way  # type: ignore[attr-defined]
        ctx.alone = alone and is_sum(boundary.backward)  # type: ignore[attr-defined]
        changed = _forward(tensor, boundary, axis, site, alone)
        ctx.again = _nothing  # type: ignore[attr-defined]
        if boundary.again and not running.recomputable:  # or the shards would be kept, which run again
            left_out = LeftOut(_Shards(tensor.detach(), boundary.forward, axis, site))
            can_be_made_again(changed, left_out)
            if on_its_way is None:
                ctx.again = weakref.ref(left_out)  # type: ignore[attr-defined]
            else:
                on_its_way.again = weakref.ref(left_out)
        return tensor.view_as(tensor) if changed is tensor else changed

    @staticmethod
    @without_gradients
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None, None]:
        left_out: LeftOut | None = ctx.again()  # type: ignore[attr-defined]
        if left_out is not None:
            left_out.let_go()
        boundary, axis, site = ctx.boundary, ctx.axis, ctx.site  # type: ignore[attr-defined]
        on_its_way: _OnItsWay | None = ctx.on_its_way  # type: ignore[attr-defined]
        in_place: bool = ctx.alone and is_nobodys(gradient)  # type: ignore[attr-defined]
        if on_its_way is not None:
            begun = on_its_way.begin(gradient, boundary.backward, axis, replace(site, early=True), in_place)
            return begun, None, None, None, None, None
        if in_place:
            return sum_in_place(gradient, axis, site), None, None, None, None, None
        length = unequal_length(boundary, boundary.backward, axis)
        return change(gradient, boundary.backward, axis, site, length), None, None, None, None, None


def _forward(tensor: torch.Tensor, boundary: Boundary, axis: Axis, site: Site, alone: bool) -> torch.Tensor:
    if alone and is_sum(boundary.forward) and is_alone_in_memory(tensor):
        return sum_in_place(tensor, axis, site)
    return change(tensor, boundary.forward, axis, site, unequal_length(boundary, boundary.forward, axis))


def _enter(tensor: torch.Tensor, boundary: Boundary, axis: Axis, site: Site, alone: bool) -> torch.Tensor:
    """Return the tensor across the boundary; where its gradient comes back behind others, these wait for it."""
    if not boundary.behind:
        across: torch.Tensor = _Boundary.apply(tensor, boundary, axis, site, None, alone)
        return across
    on_its_way = _OnItsWay()
    before = _Arriving.apply(tensor, on_its_way)
    between = before.view_as(before).grad_fn  # for its number, which what runs between the other two gets
    across = _Boundary.apply(before, boundary, axis, site, on_its_way, alone)
    on_its_way.number = between._sequence_nr()
    return across


def cross(tensor: torch.Tensor, boundary: Boundary, axis: Axis, site: Site) -> torch.Tensor:
    """Return this rank's tensor on the other side of the boundary, gradients flowing back as it says."""
    across: torch.Tensor = running.run(cross_at_once, tensor, boundary, axis, site)
    return across


def cross_at_once(
    tensor: torch.Tensor, boundary: Boundary, axis: Axis, site: Site, alone: bool = False
) -> torch.Tensor:
    """Return what ``cross`` does.

    ``alone`` says that nobody reads the tensor later, nor holds the gradient that comes back: sums are made in their
    place where autograd has no use for them either.
    """
    with running.converting():
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return _forward(tensor, boundary, axis, site, alone)
        if alone and _is_sum_alone(boundary) and is_alone_in_memory(tensor):
            sum_in_place(tensor, axis, site)
            return tensor  # as autograd knows it: the sum's gradient is that of each summand
        return _enter(tensor, boundary, axis, site, alone)
