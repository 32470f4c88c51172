"""The work of one op on shards, forward and backward, measured on fake tensors of a rank's sizes.

What a layout would have a rank compute can so be added up op by op, before there is a plan to simulate.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from tp_planner.dryrun.metering import computes, flops_of
from tp_planner.dryrun.sharding_rules import DTensorRules, local_stride, resolve_op
from tp_planner.frontend.dispatch import WatchingMode, tensors_in
from tp_planner.frontend.fake_mode import FakeCpuMode
from tp_planner.frontend.quiet import quiet_torch
from tp_planner.ir.graph import Op, TensorInfo, TensorRef
from tp_planner.ir.placement import WHOLE, Placement, Shape, local_shape
from tp_planner.layers.own_rows import own_rows, without_others

Strides = Mapping[int, Shape]  # of a rank's gradients, by tensor; others are in memory as the tensors are
_AS_TENSORS: Strides = {}


@dataclass(frozen=True, slots=True)
class OpWork:
    """What one rank computes: FLOPs of matrix products by dtype, bytes read and written, kernels; see ``Work``."""

    matmul_flops: tuple[tuple[str, int], ...] = ()
    memory_bytes: int = 0
    ops: int = 0

    def __add__(self, other: OpWork) -> OpWork:
        flops = Counter(dict(self.matmul_flops)) + Counter(dict(other.matmul_flops))
        return OpWork(tuple(sorted(flops.items())), self.memory_bytes + other.memory_bytes, self.ops + other.ops)


NO_WORK = OpWork()


@dataclass(frozen=True, slots=True)
class Measured:
    """What ops compute, and the strides in which they leave the gradients of what they take, where there are any.

    ``disordered`` are those of ``Ends.returned`` of which the gradient is not in the order of its dims.
    """

    work: OpWork
    strides: Strides
    disordered: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Ends:
    """What becomes of the ends of ops that run one after the other.

    ``made`` are the tensors of which others read what the ops make. ``sent`` are those that are sent to other ranks
    where the ops make them: they are copied to be in the order of their dims. ``returned`` are those that the ops take,
    and of which the gradient is sent. ``gathered`` are variables that the ops read whole, and of which a rank keeps its
    part of the gradient.
    """

    made: Sequence[int]
    sent: Set[int]
    returned: Set[int]
    gathered: Set[int]


class OpMeter:
    """Measures each distinct op once for each placement of its inputs.

    Args:
        rules: those that tell distinct ops apart.
        parts: size of the model axis.
    """

    def __init__(self, rules: DTensorRules, parts: int) -> None:
        self._rules, self._parts, self._fake = rules, parts, FakeCpuMode()
        self._known: dict[Any, Measured] = {}

    def work(
        self,
        op: Op,
        tensors: Mapping[int, TensorInfo],
        placements: Sequence[Placement],
        arguments: Sequence[Any] | None = None,
        into_view: bool = False,
        gradients: Strides = _AS_TENSORS,
        kept: Set[int] = frozenset(),
    ) -> Measured:
        """Return what ``op`` computes of inputs placed so.

        Args:
            op: an op that was traced.
            tensors: those of the graph.
            placements: one for each of the op's inputs.
            arguments: its arguments that are no tensors, as they are on shards; those that were traced by default.
            into_view: whether it writes into a view: the gradient of what that views is copied around the op.
            gradients: in which strides gradients come of what it makes.
            kept: those of its inputs that are variables of which it leaves the whole gradient.
        """
        infos = [tensors[tensor] for tensor in op.inputs]
        trained = tuple(info.has_gradient for info in infos)
        if is_view(op.name) and not any(trained):
            return Measured(NO_WORK, {})
        strides = tuple(map(gradients.get, op.outputs))
        ended = tuple(not tensors[each].has_gradient for each in op.outputs)
        ends = tuple(tensor in kept for tensor in op.inputs)
        inputs = tuple((info.stride, placement) for info, placement in zip(infos, placements, strict=True))
        key = self._rules.question(op, tensors), inputs, trained, into_view, strides, ends, ended
        if key not in self._known:
            self._known[key] = self._measure(op, tensors, placements, trained, arguments, into_view, strides, ends)
        known = self._known[key]
        return Measured(known.work, {op.inputs[position]: each for position, each in known.strides.items()})

    def work_together(
        self,
        ops: Sequence[Op],
        tensors: Mapping[int, TensorInfo],
        placed: Mapping[int, Placement],
        arguments: Mapping[int, Sequence[Any]],
        ends: Ends,
        gradients: Strides = _AS_TENSORS,
    ) -> Measured:
        """Return what ops compute that run one after the other, with the gradients that autograd leaves in weights.

        Args:
            ops: ops that were traced.
            tensors: those of the graph.
            placed: the placement of every tensor that the ops take, summands for whole ones.
            arguments: as for ``work``, by the ids of ops.
            ends: what becomes of what they make, and of gradients.
            gradients: in which strides gradients come of what is read elsewhere.
        """
        numbers: dict[int, int] = {}
        wiring = tuple(
            tuple(numbers.setdefault(each, len(numbers)) for each in (*op.inputs, *op.outputs)) for op in ops
        )
        questions = tuple(self._rules.question(op, tensors) for op in ops)
        infos = ((placed.get(each), tensors[each]) for each in numbers)
        described = tuple((placement, of.stride, of.has_gradient, of.variable is None) for placement, of in infos)
        every = ends.made, ends.sent, ends.returned, ends.gathered
        ending = tuple(tuple(sorted(numbers[each] for each in those if each in numbers)) for those in every)
        key = questions, wiring, described, ending, tuple(map(gradients.get, ends.made))
        if key not in self._known:
            together = self._measure_together(ops, tensors, placed, arguments, ends, gradients)
            together = together or Measured(self._measure_each(ops, tensors, placed, arguments), {})
            self._known[key] = _renamed(together, numbers)
        return _renamed(self._known[key], dict(enumerate(numbers)))

    def of_own_rows(self, ids: TensorInfo, looked_up: TensorInfo, rows: int) -> OpWork:
        """Return what a lookup in a rank's own rows, of so many in all, computes besides the lookup."""
        meter = _Meter()
        with self._measuring():
            found = self._shard(looked_up, WHOLE, looked_up.has_gradient)
            with meter:
                _, elsewhere = own_rows(self._shard(ids, WHOLE), rows, self._parts, 0)
                result = without_others(found, elsewhere)
                if result.requires_grad:
                    torch.autograd.grad(result, found, torch.empty_like(result))
        return meter.work

    def is_contiguous(self, info: TensorInfo, placement: Placement) -> bool:
        """Whether a rank has a tensor that is placed so in the order of its dims."""
        with self._fake, quiet_torch():
            return self._shard(info, placement).is_contiguous()

    def is_view(self, info: TensorInfo, placement: Placement, shape: Shape) -> bool:
        """Whether a tensor that is placed so has a view of this shape, which is that of a rank."""
        with self._fake, quiet_torch():
            try:
                self._shard(info, placement).view(shape)
            except (RuntimeError, ValueError):
                return False
        return True

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        """Inside, ops run on fake tensors, with gradients, and nothing looks at values."""
        with self._fake, quiet_torch(), torch.enable_grad(), torch.autograd.set_detect_anomaly(False):
            yield

    def _measure_together(
        self,
        ops: Sequence[Op],
        tensors: Mapping[int, TensorInfo],
        placed: Mapping[int, Placement],
        arguments: Mapping[int, Sequence[Any]],
        ends: Ends,
        gradients: Strides,
    ) -> Measured | None:
        meter = _Meter()
        strides: dict[int, Shape] = {}
        disordered: set[int] = set()
        known: dict[int, torch.Tensor] = {}
        outside = dict.fromkeys(each for op in ops for each in op.inputs)
        outside = {each: None for each in outside if not any(each in op.outputs for op in ops)}
        with self._measuring():
            for each in outside:
                known[each] = self._shard(tensors[each], placed[each], tensors[each].has_gradient)
            try:
                for op in ops:
                    args, kwargs = _with_tensors(
                        op.arguments, [known[each] for each in op.inputs], arguments.get(op.id)
                    )
                    with meter:
                        result = _run(op.name, args, kwargs)
                        for each, value in zip(op.outputs, tensors_in(result), strict=True):
                            known[each] = value.contiguous() if each in ends.sent else value
                made = {each: known[each] for each in ends.made if _has_gradient(known[each], tensors[each])}
                wanted = {each: known[each] for each in outside if known[each].requires_grad}
                if made:
                    given = [_gradient_of(end, gradients.get(each)) for each, end in made.items()]
                    with meter:
                        found = torch.autograd.grad([*made.values()], [*wanted.values()], given, allow_unused=True)
                        for each, gradient in zip(wanted, found, strict=True):
                            if gradient is not None:
                                strides[each] = gradient.stride()
                                if each in ends.returned and not gradient.is_contiguous():
                                    disordered.add(each)
                                if tensors[each].variable is not None and each not in ends.gathered:
                                    _lay_out(gradient, known[each], placed[each])
            except (RuntimeError, ValueError, TypeError, NotImplementedError):
                return None
        return Measured(meter.work, strides, frozenset(disordered))

    def _measure_each(
        self,
        ops: Sequence[Op],
        tensors: Mapping[int, TensorInfo],
        placed: Mapping[int, Placement],
        arguments: Mapping[int, Sequence[Any]],
    ) -> OpWork:
        """Return what the ops compute of inputs that they do not take from each other."""
        each = (self.work(op, tensors, [placed[each] for each in op.inputs], arguments.get(op.id)) for op in ops)
        return sum((measured.work for measured in each), NO_WORK)

    def _measure(
        self,
        op: Op,
        tensors: Mapping[int, TensorInfo],
        placements: Sequence[Placement],
        trained: Sequence[bool],
        arguments: Sequence[Any] | None,
        into_view: bool,
        strides: Sequence[Shape | None],
        ends: Sequence[bool],
    ) -> Measured:
        meter = _Meter()
        left: dict[int, Shape] = {}
        with self._measuring():
            given = [
                self._shard(tensors[tensor], placement, gradient)
                for tensor, placement, gradient in zip(op.inputs, placements, trained, strict=True)
            ]
            try:
                # What is written into must not be a leaf of autograd.
                taken = [tensor.clone() for tensor in given] if is_in_place(op.name) else given
                if into_view:
                    taken[0] = taken[0].view_as(taken[0])
                args, kwargs = _with_tensors(op.arguments, taken, arguments)
                with meter:
                    result = _run(op.name, args, kwargs)
                infos = [tensors[tensor] for tensor in op.outputs]
                every = zip(tensors_in(result), strides, infos, strict=True)
                made = [(each, comes) for each, comes, info in every if _has_gradient(each, info)]
                wanted = [position for position, each in enumerate(given) if each.requires_grad]
                if made:
                    with meter:
                        found = torch.autograd.grad(
                            [each for each, _ in made],
                            [given[position] for position in wanted],
                            [_gradient_of(*each) for each in made],
                            allow_unused=True,
                        )
                        for position, gradient in zip(wanted, found, strict=True):
                            if gradient is not None:
                                left[position] = gradient.stride()
                            if gradient is not None and ends[position]:
                                _lay_out(gradient, given[position], placements[position])
            except (RuntimeError, ValueError, TypeError, NotImplementedError):
                return Measured(meter.work, {})  # a shard's sizes do not suit the op: the walk never runs it so
        return Measured(meter.work, left)

    def _shard(self, info: TensorInfo, placement: Placement, gradient: bool = False) -> torch.Tensor:
        shape = local_shape(info.shape, placement, self._parts)
        strides = local_stride(info, shape)
        shard = torch.empty_strided(shape, strides, dtype=getattr(torch, info.dtype), device="cpu")
        return shard.requires_grad_(gradient and shard.is_floating_point())


def _has_gradient(made: torch.Tensor, info: TensorInfo) -> bool:
    return made.requires_grad and info.has_gradient


def _run(name: str, args: Any, kwargs: Any) -> Any:
    """Run an op; a view of shards whose order in memory has none is a copy, as reshapes are where they have to."""
    run = resolve_op(name)
    if name != "aten.view.default":
        return run(*args, **kwargs)
    try:
        return run(*args, **kwargs)
    except (RuntimeError, ValueError):
        return run(args[0].contiguous(), *args[1:], **kwargs)


def _renamed(measured: Measured, names: Mapping[int, int]) -> Measured:
    strides = {names[each]: strides for each, strides in measured.strides.items()}
    return Measured(measured.work, strides, frozenset(names[each] for each in measured.disordered))


def _gradient_of(made: torch.Tensor, strides: Shape | None) -> torch.Tensor:
    """Return a gradient of a tensor in these strides, in those of the tensor if they are not known."""
    if strides is None:
        return torch.empty_like(made)
    return torch.empty_strided(made.shape, strides, dtype=made.dtype, device=made.device)


def _lay_out(gradient: torch.Tensor, value: torch.Tensor, placement: Placement) -> None:
    """Lay out a gradient as its variable: autograd does where it is whole, what reads a shard where it is one."""
    if placement != WHOLE:
        gradient.contiguous()
    elif gradient.stride() != value.stride():
        gradient.new_empty_strided(value.shape, value.stride()).copy_(gradient)


def is_in_place(name: str) -> bool:
    """Whether the op of this name writes into its first tensor."""
    return name.split(".")[1].endswith("_")


def is_copy_in_order(op: Op) -> bool:
    """Whether an op copies a tensor to have it in the order of its dims, as reshapes and ``contiguous`` do."""
    return op.name == "aten.clone.default" and op.arguments[1].get("memory_format") == torch.contiguous_format


@cache
def is_view(name: str) -> bool:
    """Whether what the op of this name makes is a view of what it takes, for autograd too."""
    returned = resolve_op(name)._schema.returns
    return bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write


def _with_tensors(arguments: Any, tensors: Sequence[torch.Tensor], others: Sequence[Any] | None) -> tuple[Any, Any]:
    """Return an op's arguments with tensors for the references to them, and ``others`` for what is none."""
    leaves, structure = tree_flatten(arguments)
    constants = [leaf for leaf in leaves if not isinstance(leaf, TensorRef)]
    rest = iter(others if others is not None and len(others) == len(constants) else constants)
    filled = [tensors[leaf.position] if isinstance(leaf, TensorRef) else next(rest) for leaf in leaves]
    args, kwargs = tree_unflatten(filled, structure)
    return args, kwargs


class _Meter(WatchingMode):
    """Counts the kernels that run, as ``StepMeter`` does: ops that make a storage or write into one."""

    def __init__(self) -> None:
        super().__init__()
        self.work = NO_WORK

    def watch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs)))
        storages = {each.untyped_storage()._cdata for each in inputs}
        made = [each for each in tensors_in(result) if each.untyped_storage()._cdata not in storages]
        if (made or func._schema.is_mutable) and computes(func):
            flops = flops_of(func, args, kwargs, result)
            dtype = str(inputs[0].dtype).removeprefix("torch.") if flops else ""
            moved = sum(each.numel() * each.element_size() for each in (*inputs, *made))
            self.work += OpWork(((dtype, flops),) if flops else (), moved, 1)
        return result
