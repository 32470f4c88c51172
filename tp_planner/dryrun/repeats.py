"""Blocks that do not run in a simulated step, because an equal one does.

A block that others repeat is watched: where its forward and backward passes begin and end in the log, and what it
saves for the backward pass. A block that repeats it is one autograd function, which writes down that both happen.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import torch
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_map

from tp_planner.dryrun.metering import StepMeter
from tp_planner.frontend.block_ends import BlockEnds, BlockResult
from tp_planner.ir.graph import ModelGraph, Repeat
from tp_planner.ir.step import Phase
from tp_planner.ir.step_log import Again, Edge
from tp_planner.regions.calls import looking_at_what_is_kept, running
from tp_planner.regions.recomputation import NotKept


@dataclass(frozen=True)
class _Ran:
    """A block that ran: what it came to, and which of the tensors given and made its backward pass needs.

    Tensors are named by position; of those made, some have a gradient.
    """

    result: BlockResult
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    with_gradient: tuple[int, ...]


class BlockRepeats:
    """The blocks of one simulated step.

    Args:
        layers: the model's layers by name.
        graph: the trace of the step's call.
        repeats: the calls that are not run.
        meter: writes the log.
    """

    def __init__(
        self, layers: Mapping[str, keras.Layer], graph: ModelGraph, repeats: Mapping[int, Repeat], meter: StepMeter
    ) -> None:
        self._layers, self._graph, self._repeats, self._meter = layers, graph, repeats, meter
        self._twins = {repeat.twin: [layers[twin] for twin, _ in repeat.layers] for repeat in repeats.values()}
        self._ran: dict[int, _Ran] = {}
        self._anchor: torch.Tensor | None = None  # lets blocks go backward of which no input has a gradient
        blocks = {graph.calls[call].layer for call in (*repeats, *self._twins)}
        self._calls = {
            block: iter([call.id for call in graph.calls.values() if call.layer == block]) for block in sorted(blocks)
        }

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, blocks run or are repeated; what they leave in reference cycles is collected when they end."""
        self._anchor = torch.empty((), device="cpu", requires_grad=True)
        with contextlib.ExitStack() as stack:
            for name, layer in list(self._layers.items())[1:]:
                if not layer._layers:
                    continue
                layer.__dict__["forward"] = functools.partial(self._forward, name, layer.forward)
                stack.callback(layer.__dict__.pop, "forward")
            yield

    def _forward(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = next(self._calls[name]) if name in self._calls else -1
        if call in self._repeats:
            return self._again(self._repeats[call], args, kwargs)
        if call in self._twins:
            return self._watch(call, self._twins[call], forward, args, kwargs)
        result = forward(*args, **kwargs)
        gc.collect(0)
        return result

    def _end(self, call: int, phase: Phase, made: Mapping[int, torch.Tensor | None]) -> None:
        """Note that a pass of a block ends, and what it hands on."""
        storages = [(place, self._meter.storage(tensor)) for place, tensor in made.items() if tensor is not None]
        self._meter.log.events.append(Edge(call, phase, False, made=tuple(storages)))

    def _watch(self, call: int, layers: Sequence[keras.Layer], forward: Callable[..., Any], *arguments: Any) -> Any:
        given = BlockEnds(layers, arguments).given
        first_node = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self._meter.log.events.append(Edge(call, "forward", True))
        views = {id(each): self._view(call, place, each) for place, each in enumerate(given) if each.requires_grad}
        args, kwargs = tree_map(lambda leaf: views.get(id(leaf), leaf), arguments)
        ends = BlockEnds(layers, (args, kwargs))
        result = ends.close(forward(*args, **kwargs))
        gc.collect(0)
        self._end(call, "forward", dict(enumerate(ends.made)))
        saved = self._saved_storages(ends.made, first_node)
        with_gradient = tuple(position for position, made in enumerate(ends.made) if made.requires_grad)
        self._ran[call] = _Ran(
            result, self._positions(ends.given, saved), self._positions(ends.made, saved), with_gradient
        )
        for position in with_gradient:
            ends.made[position].register_hook(functools.partial(self._arrive, call, position))
        return result.returned(given, ends.made)

    def _saved_storages(self, made: list[torch.Tensor], first_node: int) -> set[int]:
        """Return what the nodes of a block keep, but for numbers written in its code, which are in no storage."""
        with looking_at_what_is_kept() as in_place_of_others:
            kept = [*saved_tensors(made, first_node), *in_place_of_others]
            return {self._meter.storage(tensor) for tensor in kept if self._meter.knows(tensor)}

    def _arrive(self, call: int, output: int, gradient: torch.Tensor) -> None:
        own = ((output, self._meter.storage(gradient)),) if _fills_its_storage(gradient) else ()
        self._meter.log.events.append(Edge(call, "backward", True, own))

    def _view(self, call: int, place: int, tensor: torch.Tensor) -> torch.Tensor:
        """Return the input at this place as the block's own: gradients are added inside, complete when the block ends.

        What the tensor becomes across a boundary is shared with other blocks all the same.
        """
        view = tensor.view_as(tensor)
        assert view.grad_fn is not None
        set_keras_mask(view, get_keras_mask(tensor))
        view.grad_fn.register_hook(lambda made, _: self._end(call, "backward", {place: made[0]}))
        running.entered[view] = running.entered.setdefault(tensor, {})
        return view

    def _positions(self, tensors: list[torch.Tensor], saved: set[int]) -> tuple[int, ...]:
        return tuple(position for position, tensor in enumerate(tensors) if self._meter.storage(tensor) in saved)

    def _again(self, repeat: Repeat, *arguments: Any) -> Any:
        layers = [self._layers[layer] for _, layer in repeat.layers]
        given, ran = BlockEnds(layers, arguments).given, self._ran[repeat.twin]
        made = _StandIn.apply(self._meter, repeat.call, ran, self._anchor, *given)
        ran.result.add_losses(given, made, layers)
        return ran.result.returned(given, made)


class _StandIn(torch.autograd.Function):
    """Returns empty outputs, and on the way back empty gradients; keeps alive what the block would."""

    @staticmethod
    def forward(ctx: Any, meter: StepMeter, call: int, ran: _Ran, anchor: Any, *inputs: torch.Tensor) -> Any:
        events = meter.log.events
        begin = len(events)
        with meter.not_counting():
            outputs = [
                torch.empty_strided(each.shape, each.stride, dtype=each.dtype, device="cpu") for each in ran.result.made
            ]
        events.insert(begin, Again(call, "forward", made=tuple(enumerate(map(meter.storage, outputs)))))
        kept = [inputs[position] for position in ran.inputs] + [outputs[position] for position in ran.outputs]
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(
            *(output for position, output in enumerate(outputs) if position not in ran.with_gradient)
        )
        ctx.set_materialize_grads(False)  # nor does a block make gradients of what nobody took
        ctx.meter, ctx.call, ctx.inputs = meter, call, [(each.shape, each.dtype) for each in inputs]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        arrived = [(output, gradient) for output, gradient in enumerate(gradients) if gradient is not None]
        own = [(output, ctx.meter.storage(gradient)) for output, gradient in arrived if _fills_its_storage(gradient)]
        events = ctx.meter.log.events
        begin = len(events)
        with ctx.meter.not_counting():
            given = [
                torch.empty(shape, dtype=dtype, device="cpu") if needed else None
                for (shape, dtype), needed in zip(ctx.inputs, ctx.needs_input_grad[4:], strict=True)
            ]
        made = [(place, ctx.meter.storage(each)) for place, each in enumerate(given) if each is not None]
        events.insert(begin, Again(ctx.call, "backward", tuple(own), tuple(made)))
        return None, None, None, None, *given


def saved_tensors(outputs: list[torch.Tensor], first: int) -> Iterator[torch.Tensor]:
    """Yield the tensors that the autograd nodes of ``outputs`` keep, those from number ``first`` on."""
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node in seen or node._sequence_nr() < first:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions if following is not None]
        names = [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
        kept = [_kept(node, name) for name in names]
        yield from (tensor for tensor in _tensors(kept) if not isinstance(tensor, DTensor))


def _kept(node: Any, name: str) -> Any:
    """Return what a node keeps under this name, or what is kept in order to compute that again."""
    try:
        return getattr(node, name)
    except NotKept as found:
        return found.inputs


def stand_ins(repeats: Mapping[int, Repeat]) -> dict[str, str]:
    """Return for each variable of a block that does not run the equal one of the block that runs."""
    twins = {key: twin for repeat in repeats.values() for twin, key in repeat.variables if key != twin}
    found = {}
    for key in twins:
        runs = key
        while runs in twins:
            runs = twins[runs]
        found[key] = runs
    return found


def multiplicities(repeats: Mapping[int, Repeat]) -> Counter[str]:
    """Return for each variable of a block that runs how many equal variables of blocks that do not it stands for."""
    return Counter(stand_ins(repeats).values())


def _fills_its_storage(tensor: torch.Tensor) -> bool:
    """Whether no other tensor can lie in the same storage beside this one."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]
