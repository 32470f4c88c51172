"""Functions at run time: change what single calls of torch functions inside a layer take and return.

While a layer runs in whose code the plan has boundaries, a torch-function mode counts the calls that this code makes,
layers inside not counted, and changes those that the plan names. Code that is to see whole tensors is told their sizes
where it asks for those of the shards that the layer takes. Where the gradient of what the code reads comes back behind
those of weights, it computes products so that they can; and where the plan says so, it notes how to make again what is
made element by element.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import torch
from torch.overrides import TorchFunctionMode

from tp_planner.frontend.functions import (
    computes_places,
    flatten_arguments,
    function_name,
    is_elementwise,
    put_arguments_together,
)
from tp_planner.ir.errors import ParallelRuntimeError
from tp_planner.ir.placement import Shape, Shard
from tp_planner.ir.plan import Boundary, FunctionPlan, LayerPlan
from tp_planner.job.axes import Axis
from tp_planner.regions.behind import PRODUCTS, run_product
from tp_planner.regions.boundaries import cross
from tp_planner.regions.calls import Frame, Site, running
from tp_planner.regions.made_again import made_again

# Takes a tensor across a boundary, once for equal boundaries of one tensor.
Crossing = Callable[[torch.Tensor, Boundary, Site], torch.Tensor]
_READS_SIZES = {torch.Tensor.shape.__get__, torch.Tensor.size}  # type: ignore[attr-defined]


@dataclass(frozen=True)
class PlannedFunction:
    """A function that the plan names, and where its boundaries stand."""

    plan: FunctionPlan
    inputs: tuple[tuple[int, Boundary, Site], ...]
    output: tuple[Boundary, Site] | None

    @classmethod
    def of(cls, plan: FunctionPlan, layer: str) -> PlannedFunction:
        def site(end: str, boundary: Boundary) -> Site:
            return Site(layer, f"{plan} {end} ({boundary.tensor})")

        inputs = tuple((position, each, site("input", each)) for position, each in plan.inputs)
        return cls(plan, inputs, None if plan.output is None else (plan.output, site("output", plan.output)))


def planned_functions(plan: LayerPlan) -> dict[tuple[str, int], PlannedFunction]:
    """Return the functions of a layer that the plan names, by name and number."""
    return {(each.name, each.number): PlannedFunction.of(each, plan.layer) for each in plan.functions}


class FunctionCalls(TorchFunctionMode):
    """Changes the planned functions in one call of a layer; entered and left with it.

    Args:
        layer: the layer's name, for errors.
        planned: what the plan names.
        frame: the layer's running call.
        axis: the model axis.
        enter: takes an input across its boundary.
        behind: whether products by weights are computed so that the gradient of an input can be summed meanwhile.
        seen_whole: shards, with the shape of the whole, which the code sees.
        makes_again: whether what is made element by element is made again, rather than kept, for the backward pass.
    """

    def __init__(
        self,
        layer: str,
        planned: Mapping[tuple[str, int], PlannedFunction],
        frame: Frame,
        axis: Axis,
        enter: Crossing,
        behind: bool = False,
        seen_whole: Sequence[tuple[torch.Tensor, Shape]] = (),
        makes_again: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.planned, self.frame, self.axis, self.enter = layer, planned, frame, axis, enter
        self.behind, self.seen_whole, self.makes_again = behind, seen_whole, makes_again
        self.names = {name for name, _ in planned}
        self.counts: Counter[str] = Counter()

    def again(self, frame: Frame, counts: Counter[str]) -> FunctionCalls:
        """Return what changes the same functions in ``frame``, where the layer's code goes on after these calls."""
        resumed = FunctionCalls(self.layer, self.planned, frame, self.axis, self.enter, self.behind, self.seen_whole)
        resumed.counts = counts.copy()
        return resumed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function_name(func)
        if running.frames[-1] is not self.frame:
            return func(*args, **kwargs)
        if self.seen_whole and func in _READS_SIZES:
            return self._size(func, *args, **kwargs)
        if name in self.names and not computes_places(flatten_arguments(args, kwargs)[0]):
            self.counts[name] += 1
            function = self.planned.get((name, self.counts[name]))
            if function is not None:
                return self._call(function, func, args, kwargs)
        return self._run(func, name, args, kwargs)

    def _size(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shape = next((torch.Size(shape) for shard, shape in self.seen_whole if shard is tensor), None)
        if shape is None:
            return func(tensor, *args, **kwargs)
        return shape[args[0] if args else kwargs["dim"]] if func is torch.Tensor.size and (args or kwargs) else shape

    def _run(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if self.behind and name in PRODUCTS:
            return run_product(func, name, args, kwargs)
        if self.makes_again and is_elementwise(name):
            values = {each: _value(given) for each, given in kwargs.items()}
            return running.run(made_again, func, *map(_value, args), **values)
        return func(*args, **kwargs)

    def _call(self, function: PlannedFunction, func: Any, args: Any, kwargs: Any) -> Any:
        leaves, structure = flatten_arguments(args, kwargs)
        for position, boundary, site in function.inputs:
            leaves[position] = self.enter(self._expected(leaves, position, boundary, function), boundary, site)
        for position, whole, local in function.plan.sizes:
            if position >= len(leaves) or leaves[position] not in (whole, local, *self._rests(whole, leaves)):
                raise self._other_path(function)
            leaves[position] = local
        for position in function.plan.scales:
            if position >= len(leaves) or type(leaves[position]) is not int:
                raise self._other_path(function)
            leaves[position] *= self.axis.size
        args, kwargs = put_arguments_together(leaves, structure)
        result = self._run(func, function.plan.name, args, kwargs)
        if function.output is None:
            return result
        boundary, site = function.output
        return cross(result, boundary, self.axis, site)

    def _rests(self, whole: int, leaves: list[Any]) -> set[int]:
        """Return what code may have for a size that is the rest of a dim, having read the length of a shard of it."""
        lengths = {length for leaf in leaves if isinstance(leaf, torch.Tensor) for length in leaf.shape}
        return {whole - (self.axis.size - 1) * length for length in lengths}

    def _expected(
        self, leaves: list[Any], position: int, boundary: Boundary, function: PlannedFunction
    ) -> torch.Tensor:
        """Return the tensor at ``position`` if it can cross the boundary."""
        tensor = leaves[position] if position < len(leaves) else None
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != len(boundary.shape):
            raise self._other_path(function)
        cut = boundary.forward.target
        if isinstance(cut, Shard) and tensor.shape[cut.dim] != boundary.shape[cut.dim]:
            raise self._other_path(function)
        return tensor

    def check_all_called(self) -> None:
        """Raise ParallelRuntimeError if the layer did not call a function that the plan names."""
        for (name, number), function in self.planned.items():
            if self.counts[name] < number:
                raise self._other_path(function)

    def _other_path(self, function: PlannedFunction) -> ParallelRuntimeError:
        return ParallelRuntimeError(
            f"layer {self.layer!r} runs other code than was planned: its call {function.plan.number} of torch's "
            f"{function.plan.name} is another one; call it as in the traced call, or tp_planner.restore(model) first"
        )


def _value(given: Any) -> Any:
    """Return what a function is given, read now if it is a variable."""
    return given.value if isinstance(given, keras.Variable) else given


@contextmanager
def beneath_the_calls(mode: TorchFunctionMode) -> Iterator[None]:
    """Inside, the mode sees what becomes of the functions that the running call's own code calls.

    Entered behind it, it would see the code's.
    """
    functions = running.frames[-1].functions if running.frames else None
    if functions is None:
        with mode:
            yield
        return
    functions.__exit__(None, None, None)
    try:
        with mode, functions:
            yield
    finally:
        functions.__enter__()


@contextmanager
def changed_already() -> Iterator[None]:
    """Inside, functions are called into which those of the running call's code have been changed before."""
    frame = running.frames[-1] if running.frames else None
    if frame is None or frame.functions is None:
        yield
        return
    functions, frame.functions = frame.functions, None  # for good: this call makes none that could be counted
    functions.__exit__(None, None, None)
    try:
        yield
    finally:
        functions.__enter__()
