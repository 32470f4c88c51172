"""Metering: what a training step allocates, computes and communicates on one rank, on real or on fake tensors.

Memory is counted by storages, from the op that makes one until its last tensor is gone. What kernels allocate
inside themselves is not seen.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace
from typing import Any

import keras
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tp_planner.frontend.dispatch import tensors_in
from tp_planner.frontend.layer_tree import named_layers
from tp_planner.frontend.stretches import Stretch
from tp_planner.ir.step import Collective, Phase, StorageKind
from tp_planner.ir.step_log import Began, Early, Freed, Kernel, Origin, StepLog
from tp_planner.job.axes import Axes
from tp_planner.regions.behind import made_as
from tp_planner.regions.calls import running
from tp_planner.regions.recording import LOCAL_OPS, CollectiveRecorder

_aten = torch.ops.aten
_ALLOCATE = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}


class StepMeter(CollectiveRecorder):
    """Writes the log of a step while it is entered.

    ``stands_for`` says of how many equal variables a storage is one; 1 where it has no entry. The device's allocator
    gives multiples of ``block`` bytes.
    """

    def __init__(self, axes: Axes, block: int = 1) -> None:
        super().__init__(axes)
        self.log = StepLog(block=block)
        self.stands_for: dict[int, int] = {}
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._began: Phase = "forward"
        self._counting = True
        self._early = False  # whether what is noted may happen before the log says
        self._last = 0  # the place of the last collective among the events
        self._flops: Counter[str] = Counter()  # of matrix products so far, by dtype
        self._begun: dict[int, tuple[int, Counter[str]]] = {}  # by storage, what was begun: the event, and FLOPs then
        self._in_call: list[str] = []  # the layers whose calls run
        self._nodes: list[tuple[int, str]] = [(0, "")]  # numbers of autograd nodes, and the layer of those from there

    # --- layers ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def attributing(self, model: keras.Model, not_called: Set[str]) -> Iterator[None]:
        """Inside, a storage is known by the layer whose call makes it, or makes it on the way back.

        Of the layers ``not_called`` there are none.
        """
        with contextlib.ExitStack() as stack:
            for name, layer in named_layers(model).items():
                if isinstance(layer, Stretch) or name in not_called:
                    continue  # what is done between a stretch's layers, the layer around it does
                enter = functools.partial(self._enter_layer, name)
                stack.callback(layer.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(layer.register_forward_hook(self._leave_layer, always_call=True).remove)
            yield

    def _enter_layer(self, name: str, layer: keras.Layer, args: Any) -> None:
        self._in_call.append(name)
        self._nodes.append((torch.autograd._get_sequence_nr(), name))  # type: ignore[attr-defined]

    def _leave_layer(self, layer: keras.Layer, args: Any, output: Any) -> None:
        self._in_call.pop()
        self._nodes.append((torch.autograd._get_sequence_nr(), self._layer_in_call))  # type: ignore[attr-defined]

    @property
    def _layer_in_call(self) -> str:
        return self._in_call[-1] if self._in_call else ""

    def _origin(self, func: Any, made: torch.Tensor) -> Origin:
        node = torch._C._current_autograd_node()
        layer = self._layer_in_call
        if node is not None and not layer:
            layer = self._nodes[bisect_right(self._nodes, made_as(node), key=lambda each: each[0]) - 1][1]
        op = func.__name__.partition(".")[0].lstrip("_")
        return Origin(layer, op, str(made.dtype).removeprefix("torch."), tuple(made.shape))

    # --- storages --------------------------------------------------------------------------------------

    def storage(self, tensor: torch.Tensor, times: int = 1) -> int:
        """Return the number of a tensor's storage, a new one where it was not met before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None:
            return known[0]
        number = self.log.allocate(storage.nbytes(), times=times)
        self._alive[key] = number, weakref.ref(storage, functools.partial(self._gone, key, number))
        return number

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's storage was met before."""
        return tensor.untyped_storage()._cdata in self._alive

    def _gone(self, key: int, number: int, _: Any) -> None:
        if self._alive.pop(key, None) is not None:
            self._mark_what_is_early()
            self.log.events.append(Freed(number))

    def lose(self, tensor: torch.Tensor) -> None:
        """Watch a tensor's storage no longer: whoever asked for it notes when it goes."""
        self._alive.pop(tensor.untyped_storage()._cdata, None)

    def hold(self, tensors: Iterable[Any], kind: StorageKind) -> None:
        """Say what the storages of these tensors are for."""
        for tensor in tensors:
            self.log.kinds[self.storage(tensor._local_tensor if isinstance(tensor, DTensor) else tensor)] = kind

    def end_forward(self) -> None:
        """Note that what is there now, and is for nothing else, was left for the backward pass."""
        for number, _ in self._alive.values():
            self.log.kinds.setdefault(number, "activations")

    @contextlib.contextmanager
    def not_counting(self) -> Iterator[None]:
        """Inside, storages are noted, but nothing is computed."""
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    def forget(self) -> None:
        """Watch no longer; storages that go from now on are not noted."""
        self._alive.clear()

    # --- ops -------------------------------------------------------------------------------------------

    def note(self, collective: Collective) -> None:
        """Log a collective that is about to run."""
        self.begin(collective.phase)
        self._last = len(self.log.events)
        self.log.events.append(collective)

    def begin(self, phase: Phase) -> None:
        """Note that what follows is of this phase."""
        if phase != self._began:
            self._began = phase
            self.log.events.append(Began(phase))
        self._mark_what_is_early()

    def _mark_what_is_early(self) -> None:
        early = running.site is not None and running.site.moved
        if early != self._early:
            self._early = early
            self.log.events.append(Early(early))

    def watch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func.namespace == "_c10d_functional" and func.__name__.partition(".")[0] in LOCAL_OPS:
            self._note_wait(args[0])
            # Neither makes a tensor on real devices; a fake one would be a new one.
            return args[0] if isinstance(args[0], FakeTensor) else func(*args, **kwargs)
        result = super().watch(func, types, args, kwargs)
        if result is NotImplemented or any(issubclass(kind, DTensor) for kind in types):
            return result
        inputs = _tensors((args, kwargs))
        if self.asked and not any(map(self.knows, inputs)):
            return result  # the first time DTensor works out the shape of a result, on fake tensors of its own
        self.begin(self.phase)
        made = [leaf for leaf in _tensors(result) if not self.knows(leaf)]
        if made or func._schema.is_mutable:
            self._count(func, args, kwargs, result, inputs)
        if func.namespace == "_c10d_functional" and running.site and running.site.early and not running.site.moved:
            self._begun[self.storage(result)] = self._last, self._flops.copy()
        return result

    def _note_wait(self, arriving: torch.Tensor) -> None:
        """Say of a collective that was begun which products have run since."""
        begun = self._begun.pop(self.storage(arriving), None) if self.knows(arriving) else None
        if begun is not None:
            place, before = begun
            behind = tuple(sorted((self._flops - before).items()))
            self.log.events[place] = replace(self.log.events[place], behind=behind)  # type: ignore[type-var]

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, inputs: Sequence[torch.Tensor]) -> None:
        """Log the storages that an op has made, and what it computed.

        An op on lists works on all variables at once, so that a variable that stands for several counts so often;
        any other op is run for each of them, one after the other, as is all of an update that works on one alone.
        """
        alone = running.updated_alone
        lists = alone is None and isinstance(args[0] if args else None, list | tuple)
        weights = [self.stands_for.get(self.storage(leaf), 1) for leaf in (inputs if alone is None else [alone])]
        times = 1 if lists else max(weights, default=1)
        moved = 0
        for position, leaf in enumerate(inputs):
            moved += leaf.numel() * leaf.element_size() * (weights[position] if lists else 1)
        for position, leaf in enumerate(_tensors(result)):
            if not self.knows(leaf):
                weight = weights[position] if lists and isinstance(result, list | tuple) else 1
                number = self.storage(leaf, weight)
                self.log.origins[number] = self._origin(func, leaf)
                if max(weight, times) > 1:
                    self.stands_for[number] = max(weight, times)
                moved += leaf.numel() * leaf.element_size() * weight
        if self._counting and computes(func):
            flops = flops_of(func, args, kwargs, result)
            dtype = str(inputs[0].dtype).removeprefix("torch.") if flops else ""
            if flops:
                self._flops[dtype] += flops * times
            self.log.events.append(Kernel(self.phase, dtype, flops, moved, times))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf.elem if isinstance(leaf, AsyncCollectiveTensor) else leaf for leaf in tensors_in(tree)]


def computes(func: Any) -> bool:
    """Whether an op reads or writes anything: those that leave what they make as it is are no kernels."""
    return func.overloadpacket not in _ALLOCATE


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the multiplications and additions of a matrix product, an attention or a convolution; 0 for the rest."""
    packet = func.overloadpacket
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape))
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
