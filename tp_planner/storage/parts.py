"""Parts: what replicas store in parts is put together for use, and let go after it.

What a block reads is put together in one collective. The backward pass puts together again what it needs of it, and
leaves each replica its parts of the averaged gradients, when those of all that was read have arrived (as FSDP and
ZeRO-3 do: https://arxiv.org/abs/1910.02054, https://arxiv.org/abs/2304.11277).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from tp_planner.ir.placement import local_shape
from tp_planner.job.axes import Axis
from tp_planner.regions.buffers import Cut, Gathered, Reduced
from tp_planner.regions.calls import Site, running, standing_at
from tp_planner.regions.left_out import LeftOut, can_be_made_again
from tp_planner.regions.replicas import Replicas


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What a replica stores of a tensor: its parameter, how that is cut, and the dtype in which it travels."""

    parameter: DTensor
    cut: Cut
    dtype: torch.dtype

    @classmethod
    def of(cls, variable: Any, dtype: torch.dtype) -> Part:
        """Return that of a parallel variable."""
        sharding = variable._stored.sharding
        model, placement = sharding.axes.model, sharding.batch_placement
        shape = local_shape(tuple(variable.shape), sharding.placement, model.size, model.rank)
        return cls(variable._value, Cut(shape, placement), dtype)

    @property
    def stored(self) -> torch.Tensor:
        """The tensor that is stored, without gradient history."""
        stored: torch.Tensor = self.parameter._local_tensor.detach()
        return stored

    def gradient(self, part: torch.Tensor) -> DTensor:
        """Return this replica's part of a gradient as the parameter has it."""
        return DTensor(part.to(self.parameter.dtype), self.parameter._spec, requires_grad=False)


@dataclass(slots=True, eq=False)
class Turn:
    """The turn of what is put together in an order that is known, one after the other.

    ``following`` is what is begun when this is read; ``ahead`` how many of those before it are begun in the backward
    pass when this is needed there. ``early`` says that it may itself be begun before it is needed, ``late`` that the
    sums of its gradients are waited for later.
    """

    following: tuple[ReadTogether, ...] = ()
    ahead: int = 0
    early: bool = False
    late: bool = False


class ReadTogether:
    """Variables that calls read one after the other, and that are put together when the first of them is read.

    Args:
        variables: parallel variables that replicas store in parts.
        dtypes: the dtypes in which they travel.
        site: where this stands in the plan.
        turn: how it follows others, if it does.
    """

    def __init__(
        self, variables: Sequence[Any], dtypes: Sequence[torch.dtype], site: Site | None, turn: Turn | None = None
    ) -> None:
        self._variables, self._dtypes, self._site, self._turn = variables, dtypes, site, turn or Turn()
        self._first: Parts | None = None  # as the last forward pass put them together
        self._places = {id(variable): place for place, variable in enumerate(variables)}

    def serves(self, variable: Any, dtype: torch.dtype) -> bool:
        """Whether what travels has all that is read of a variable in this dtype."""
        sent = self._dtypes[self._places[id(variable)]]
        return torch.promote_types(sent, dtype) == sent

    def read(self, variable: Any) -> torch.Tensor:
        """Return the whole of a variable, gradients flowing back to its parameter."""
        key, place = (self, torch.is_grad_enabled()), self._places[id(variable)]
        uses = running.gathered.get(key)
        if uses is None or place not in uses.left:
            started = running.started.pop(key, None)
            uses = running.gathered[key] = self.begin() if started is None or place not in started.left else started
            self._start_next()
        whole: torch.Tensor = uses.take(place)
        if not uses.left:
            del running.gathered[key]
        return whole

    def begin(self) -> Uses:
        """Begin to put the variables together."""
        stored, runs_again = self._variables[0]._stored, _autograd_runs()
        own = [Part.of(variable, dtype) for variable, dtype in zip(self._variables, self._dtypes, strict=True)]
        turn = Turn(early=self._turn.early) if runs_again else self._turn
        parts = Parts(
            own, stored.sharding.axes.batch, stored.replicas, self._site, turn, running.parts, self._begin_again
        )
        if not runs_again and turn.early and torch.is_grad_enabled():
            running.parts = self._first = parts
        return Uses(parts)

    def _start_next(self) -> None:
        """Begin to put together what is read next, and is not begun yet."""
        if _autograd_runs():  # a part of the model runs again, and that before it will be next
            if self._first is not None:
                self._first.start_before()
            return
        for each in self._turn.following:
            each.start()

    def start(self) -> Uses | None:
        """Begin what is not begun yet, for who reads it next; return it."""
        key = self, torch.is_grad_enabled()
        if key in running.gathered or key in running.started:
            return None
        running.started[key] = uses = self.begin()
        return uses

    def _begin_again(self) -> Callable[[], None] | None:
        """Begin what a part of the model will read that runs again; return what ends that if nobody reads it."""
        with torch.enable_grad():  # as it will
            begun = self.start()
        return None if begun is None else functools.partial(_end_unread, running.started, (self, True), begun)

    def forget(self, variable: Any) -> None:
        """Put a variable together anew when it is read next, for it has another value."""
        for gradients in (True, False):
            for uses in (running.gathered.get((self, gradients)), running.started.get((self, gradients))):
                if uses is not None:
                    uses.left.discard(self._places[id(variable)])


def _nothing() -> None:
    return None


def _end_unread(started: dict[Hashable, Any], key: Hashable, begun: Uses) -> None:
    """Wait for what was begun, unless it was read."""
    if started.get(key) is begun:
        del started[key]
        begun.wait()


def _autograd_runs() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


class Uses:
    """What the forward pass uses of parts that were put together: each whole is taken once, and is gone when let go."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._wholes = _Wholes(parts, range(len(parts.parts)), parts.turn.early)
        self._proxies: dict[int, torch.Tensor] | None = None  # by number, of those through which gradients flow

    @property
    def left(self) -> set[int]:
        """The numbers of the parts of which the whole was not taken yet."""
        return self._wholes.left

    def wait(self) -> None:
        """Wait for what is on its way, though nobody needs it."""
        self._wholes.wait()

    def take(self, number: int) -> torch.Tensor:
        """Return the whole of a part."""
        if self._proxies is None:  # not before: autograd runs first what was made last
            self._proxies = self._connected()
        proxy, taken = self._proxies.pop(number, None), self._wholes.take(number)
        whole: torch.Tensor = taken if proxy is None else _Taken.apply(proxy, taken, self._parts, number)
        can_be_made_again(whole, self._parts.left_out(number))
        return whole

    def _connected(self) -> dict[int, torch.Tensor]:
        parameters = [part.parameter for part in self._parts.parts]
        if not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in parameters):
            return {}
        proxies = _Together.apply(self._parts, *parameters)
        self._parts.connect(next(proxy.grad_fn for proxy in proxies if proxy.requires_grad))
        return {number: proxy for number, proxy in enumerate(proxies) if proxy.requires_grad}


class Parts:
    """Parts that are put together at once, as the backward pass knows them.

    Args:
        parts: this replica's.
        axis: the batch axis.
        replicas: the replicas that average the gradients.
        site: where this stands in the plan.
        turn: how it follows others.
        before: what was put together before this, if that was in turn.
        begin_again: begins to put them together for a reader that runs again; returns what ends that.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        axis: Axis,
        replicas: Replicas | None,
        site: Site | None,
        turn: Turn,
        before: Parts | None,
        begin_again: Callable[[], Callable[[], None] | None],
    ) -> None:
        self.parts, self.turn = parts, turn
        self._begin_again = begin_again
        self._connection: Callable[[], Any] = _nothing  # the node of autograd through which gradients come, if alive
        self._axis, self._replicas, self._site = axis, replicas, site
        self._before = before if turn.early else None
        self._reader_runs_again = False  # and puts it together by itself
        self._again: _Wholes | None = None
        self._left_out: dict[int, weakref.ref[LeftOut]] = {}  # by number

    def left_out(self, number: int) -> LeftOut:
        """Return the note of how the whole of a part that was taken is made again."""
        left_out = LeftOut(_Again((self.parts[number].stored,), self, number))
        self._left_out[number] = weakref.ref(left_out)
        self._reader_runs_again = running.recomputable
        return left_out

    def again(self, number: int) -> torch.Tensor:
        """Return a whole in the backward pass, for which all are put together that it needs."""
        if self._again is None or number not in self._again.left:
            self._again = _Wholes(self, sorted({*self._needed(), number}), self.turn.early)
        wholes = self._again
        self.start_before()
        return wholes.take(number)

    def _needed(self) -> list[int]:
        """Return the numbers of the parts that the backward pass puts together again."""
        return [each for each, left_out in self._left_out.items() if (kept := left_out()) and kept.is_left_out]

    def start_before(self) -> None:
        """Begin to put together again what the backward pass needs next, and is not begun yet."""
        before, ahead = self._before, self.turn.ahead
        while before is not None and ahead:
            ahead -= before._is_begun_early()
            before = before._before

    def _is_begun_early(self) -> bool:
        """Begin what the backward pass needs of this, if it is not begun; return whether it needs anything."""
        assert self._replicas is not None
        if self._reader_runs_again:
            if self._gets_gradients() and (end := self._begin_again()) is not None:
                self._replicas.finish_with(end)
            return True
        needed = self._needed()
        if needed and self._again is None:
            self._again = _Wholes(self, needed, early=True)
            self._replicas.finish_with(self._end)
        return bool(needed)

    def connect(self, node: Any) -> None:
        """Note the node of autograd through which the gradients come."""
        self._connection = weakref.ref(node)

    def _gets_gradients(self) -> bool:
        """Whether gradients of matrices will come in this backward pass, for which their readers run again."""
        node = self._connection()
        if node is None or not any(part.parameter.requires_grad and part.parameter.ndim > 1 for part in self.parts):
            return False
        try:
            return bool(torch._C._will_engine_execute_node(node))
        except RuntimeError:  # torch.autograd.grad was called
            return False

    def _end(self) -> None:
        """Wait for what was begun in a backward pass that has ended without it."""
        if self._again is not None:
            self._again.wait()
            self._again = None

    def sent(self, numbers: Sequence[int], early: bool) -> Gathered:
        """Send these parts, and return what will hold those of all replicas."""
        with torch.no_grad(), standing_at(self._at(early)):
            sent = [self.parts[number].stored.to(self.parts[number].dtype) for number in numbers]
            return Gathered(sent, [self.parts[number].cut for number in numbers], self._axis)

    def own(self, gradients: Sequence[torch.Tensor | None], left_in_parameters: bool) -> list[DTensor | None]:
        """Return this replica's parts of the means of all replicas' gradients.

        Those that are ``left_in_parameters`` may get there by themselves, later in the backward pass, and not be
        returned. One such sum is on its way at a time: another begins when it has arrived.
        """
        replicas = self._replicas
        assert replicas is not None
        self._again = None
        numbers = [number for number, gradient in enumerate(gradients) if gradient is not None]
        whole = [gradient for gradient in gradients if gradient is not None]
        means: list[DTensor | None] = [None] * len(gradients)
        if not whole:
            return means
        # Without samples they may be the gradients of the mean of nothing.
        share = replicas.share(whole[0].device)
        weight = share if replicas.samples else None
        replicas.take_what_is_on_its_way()
        with standing_at(self._at(self.turn.late)):
            reduced = Reduced(whole, [self.parts[number].cut for number in numbers], self._axis, weight)
        if left_in_parameters and self.turn.late and self.turn.ahead:
            replicas.on_its_way = functools.partial(self._leave, numbers, reduced)
            return means
        for number, mean in zip(numbers, reduced.parts(), strict=True):
            means[number] = self.parts[number].gradient(mean)
        return means

    def _leave(self, numbers: Sequence[int], reduced: Reduced) -> None:
        """Leave gradients that have arrived in their parameters, as autograd does."""
        with torch.no_grad():
            for number, mean in zip(numbers, reduced.parts(), strict=True):
                parameter = self.parts[number].parameter
                before: Any = parameter.grad
                if before is None:
                    parameter.grad = self.parts[number].gradient(mean)
                else:
                    before._local_tensor.add_(mean)

    def _at(self, early: bool) -> Site | None:
        return replace(self._site, early=early, moved=early) if self._site else None

    def let_go(self, number: int) -> None:
        """Note that the gradient of a whole has arrived: where a part of it was left out is in no gradient."""
        if left_out := self._left_out[number]():
            left_out.let_go()


class _Wholes:
    """Wholes of one collective: each is taken once, and what holds them goes with the last."""

    def __init__(self, parts: Parts, numbers: Sequence[int], early: bool) -> None:
        self._places = {number: place for place, number in enumerate(numbers)}
        self.left = set(numbers)
        self._gathered: Gathered | None = parts.sent(numbers, early)

    def wait(self) -> None:
        if self._gathered is not None:
            self._gathered.wait()

    def take(self, number: int) -> torch.Tensor:
        assert self._gathered is not None
        whole = self._gathered.whole(self._places[number])
        self.left.remove(number)
        if not self.left:
            self._gathered = None
        return whole


@dataclass(slots=True)
class _Again:
    """From which a whole can be made again that is left out of what autograd keeps."""

    kept: tuple[torch.Tensor]
    parts: Parts
    number: int

    def whole(self) -> torch.Tensor:
        return self.parts.again(self.number)


class _Together(torch.autograd.Function):
    """Stands between parameters and their wholes: its backward pass runs when the gradients of all have arrived.

    What it returns has the shapes of the wholes, and no content.
    """

    @staticmethod
    def forward(ctx: Any, parts: Parts, *parameters: DTensor) -> tuple[torch.Tensor, ...]:
        ctx.parts = parts
        ctx.set_materialize_grads(False)
        proxies = tuple(part.stored.new_empty((), dtype=part.dtype).expand(part.cut.shape) for part in parts.parts)
        still = [proxy for proxy, each in zip(proxies, parameters, strict=True) if not each.requires_grad]
        ctx.mark_non_differentiable(*still)
        return proxies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[DTensor | None, ...]:
        parameters = [part.parameter for part in ctx.parts.parts]
        nodes = [node for node, _ in ctx.next_functions]
        left = all(map(_is_left_in_parameter, parameters, nodes))
        return None, *ctx.parts.own(gradients, left)


def _is_left_in_parameter(parameter: DTensor, node: Any) -> bool:
    """Whether all that becomes of a gradient is that autograd leaves it in its parameter, at the end of ``node``."""
    if node is None:
        return True
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch.autograd.grad was called with this parameter
        return False


class _Taken(torch.autograd.Function):
    """The whole of one part."""

    @staticmethod
    def forward(ctx: Any, proxy: torch.Tensor, whole: torch.Tensor, parts: Parts, number: int) -> torch.Tensor:
        ctx.parts, ctx.number = parts, number
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        ctx.parts.let_go(ctx.number)
        return gradient, None, None, None
