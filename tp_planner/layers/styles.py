"""Parallel styles for Keras layers: torch's ParallelStyle interface, driven by the plan.

``parallelize_module(layer, mesh, style)`` places the layer's variables and hooks its calls. Inside a region
layers compute on plain local shards; the hooks convert tensors at the boundaries the plan names.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import keras
import torch
from keras.src.backend.common.masking import set_keras_mask
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle

from tp_planner.frontend.calling import is_symbolic
from tp_planner.frontend.contractions import call_mode
from tp_planner.ir.errors import ParallelRuntimeError
from tp_planner.ir.placement import Shape, Shard, whole_shape
from tp_planner.ir.plan import Boundary, LayerPlan
from tp_planner.job.axes import Axis
from tp_planner.layers.own_rows import own_rows, without_others
from tp_planner.regions.boundaries import cross
from tp_planner.regions.calls import Frame, Reader, Site, end_with_call, running
from tp_planner.regions.functions import FunctionCalls, PlannedFunction, planned_functions
from tp_planner.regions.left_out import watch_calls
from tp_planner.regions.logits import logits_of
from tp_planner.regions.made_again import keep_what_is_returned
from tp_planner.storage.casts import casts_weights
from tp_planner.storage.log import logger
from tp_planner.storage.sharding import own_shard
from tp_planner.storage.variables import read_whole

Place = Callable[[keras.Layer], None]
Undo = Callable[[], None]


class _PlannedStyle(ParallelStyle):
    """Places the variables of a Keras layer and hooks its calls as its LayerPlans say, if they say anything."""

    def __init__(self, layer_calls: LayerCalls | None, place: Place, undo: list[Undo]) -> None:
        super().__init__()
        self.layer_calls, self.place, self.undo = layer_calls, place, undo

    def _apply(self, module: keras.Layer, device_mesh: DeviceMesh) -> keras.Layer:
        self.place(module)
        if self.layer_calls is not None:
            self.layer_calls.hook(module, self.undo)
        return module


class KerasColwiseParallel(_PlannedStyle, ColwiseParallel):
    """Column-parallel Keras layer of any kernel rank: an output dim of its weight is sharded."""


class KerasRowwiseParallel(_PlannedStyle, RowwiseParallel):
    """Row-parallel Keras layer of any kernel rank: a contracted dim of its weight is sharded."""


class KerasVocabularyParallel(KerasRowwiseParallel):
    """Embedding with sharded rows: every rank looks up the ids it holds, the others contribute zeros."""


class KerasShardedParallel(_PlannedStyle):
    """Any other Keras layer: its variables are gathered at use, or its ops act on each shard alone."""


STYLES: Mapping[str, type[_PlannedStyle]] = {
    "column": KerasColwiseParallel,
    "row": KerasRowwiseParallel,
    "vocabulary": KerasVocabularyParallel,
    "batched": KerasShardedParallel,
    "sequence": KerasShardedParallel,
    "elementwise": KerasShardedParallel,
    "gathered": KerasShardedParallel,
    "replicated": KerasShardedParallel,
}


@dataclass(frozen=True)
class _PlannedCall:
    """What a layer's plan for one mode says of its calls, with the places where its boundaries stand."""

    plan: LayerPlan
    entries: tuple[tuple[int, Boundary, Site], ...]
    functions: Mapping[tuple[str, int], PlannedFunction]
    exit: Site | None
    behind: bool  # whether gradients of its inputs are summed while those of weights are computed

    @property
    def is_watched(self) -> bool:
        """Whether the torch functions are watched that the layer's code calls."""
        return self.behind or self.plan.sees_whole or self.plan.makes_again or bool(self.functions)

    @classmethod
    def of(cls, plan: LayerPlan) -> _PlannedCall:
        entries = tuple((position, boundary, _site(plan, "input", boundary)) for position, boundary in plan.inputs)
        exit_ = None if plan.output is None else _site(plan, "output", plan.output)
        behind = any(boundary.behind for _, boundary in plan.boundaries)
        return cls(plan, entries, planned_functions(plan), exit_, behind)


class LayerCalls:
    """The hooks of one layer: what happens before and after each of its calls.

    Args:
        plans: the layer's plans by mode.
        readers: by mode, the reader of each parallel variable (by ``id``) that the layer uses.
        axis: the model axis.
        model: identifies the parallelized model, for its open scopes.
        in_shards: its own variables (by ``id``) that are stored in shards.
    """

    def __init__(
        self,
        plans: Mapping[str, LayerPlan],
        readers: Mapping[str, dict[int, Reader]],
        axis: Axis,
        model: int,
        in_shards: Set[int],
    ) -> None:
        self.plans, self.readers, self.axis, self.model = plans, readers, axis, model
        self.in_shards = in_shards
        self.modal = set(plans) != {""}
        self.planned = {mode: _PlannedCall.of(plan) for mode, plan in plans.items()}
        self.where_stream_is_whole = {
            mode: planned
            if planned.plan.where_stream_is_whole is planned.plan
            else _PlannedCall.of(planned.plan.where_stream_is_whole)
            for mode, planned in self.planned.items()
        }
        self.warned: set[str] = set()  # of calls outside of these scopes, or of any plan

    @property
    def change_nothing(self) -> bool:
        """Whether the layer's calls are what they would be without the plan."""
        changes = any(map(_changes_calls, self.plans.values())) or any(self.readers.values())
        return not (changes or (self.in_shards and not self.plans))

    def hook(self, layer: keras.Layer, undo: list[Undo]) -> None:
        """Hook the layer; ``undo`` takes what removes the hooks again."""
        again = any(plan.keeps_less for plan in self.plans.values())
        if again or (any(self.readers.values()) and casts_weights(layer)):
            undo += [handle.remove for handle in watch_calls(layer)]
        undo.append(end_with_call(layer))
        before = layer.register_forward_pre_hook(self.before, with_kwargs=True)
        after = layer.register_forward_hook(self.after, with_kwargs=True, always_call=True)
        undo += [before.remove, after.remove]
        if any(plan.sharded_inputs or _takes_shards(plan) for plan in self.plans.values()):
            relax_input_spec(layer, undo)

    def _planned(self, layer: keras.Layer, args: Any, kwargs: Any) -> _PlannedCall | None:
        planned = self.where_stream_is_whole if running.stream_is_whole else self.planned
        return planned.get(call_mode(layer, args, kwargs) if self.modal else "")

    def before(self, layer: keras.Layer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if is_symbolic():
            return None
        planned = self._planned(layer, args, kwargs)
        if planned is None:
            if self.in_shards:
                self._begin_unplanned(layer)
            elif running.watching or not running.frames:  # what it does is not done by the code around it
                running.frames.append(Frame(self, {}))
            return None
        plan = planned.plan
        if plan.scope and not running.scopes[self.model, plan.scope]:
            self._begin_alone(layer, plan)
            return None
        frame = Frame(self, self.readers[plan.mode])
        running.frames.append(frame)
        for position, boundary, site in planned.entries:
            args, kwargs = self._convert(args, kwargs, position, boundary, site)
        if plan.style == "vocabulary":
            args, frame.kept = self._own_rows(layer, args)
        elif plan.dropout_order:
            args, frame.kept = self._whole_mask(plan, args, kwargs)
        elif plan.epilogue_after_output:
            frame.undo.append(functools.partial(give_back, layer, withhold(layer, plan.epilogue_after_output)))
            frame.changed = functools.partial(withheld, layer, plan.epilogue_after_output)
        if planned.is_watched:
            frame.functions = FunctionCalls(
                plan.layer,
                planned.functions,
                frame,
                self.axis,
                self._shared,
                planned.behind,
                self._seen_whole(plan, args, kwargs) if plan.sees_whole else (),
                plan.makes_again,
            )
            frame.functions.__enter__()
            running.watching += 1
            frame.undo.append(functools.partial(_stop_watching, frame.functions))
        return args, kwargs

    def after(self, layer: keras.Layer, args: Any, kwargs: Any, output: Any) -> Any:
        if not running.frames or running.frames[-1].owner is not self:
            return None
        frame = running.frames[-1]
        functions = frame.functions
        try:
            frame.leave()
            if output is None:  # the call has failed
                return None
            if functions is not None:
                functions.check_all_called()
            planned = self._planned(layer, args, kwargs)
            if planned is None or frame.alone:
                return None
            if planned.plan.makes_again:
                keep_what_is_returned(output)
            return self._finish(layer, planned, frame, output)
        finally:
            running.frames.pop()

    def _begin_alone(self, layer: keras.Layer, plan: LayerPlan) -> None:
        """Let a call outside of the layer's region run on whole tensors, as those are that it is given."""
        if torch._C._current_graph_task_id() != -1:  # autograd runs
            raise _runs_again_outside(layer, plan.scope)
        if plan.scope not in self.warned:
            self.warned.add(plan.scope)
            logger.warning(
                "[ModelParallel] layer %r is called outside %r, by which it is planned: its weights are put together "
                "for each such call, which no plan has",
                layer.name,
                plan.scope,
            )
        running.frames.append(Frame(self, dict.fromkeys(self.readers[plan.mode], _read_whole), alone=True))

    def _begin_unplanned(self, layer: keras.Layer) -> None:
        """Let a call run on whole tensors that no plan has: one from outside of the model's own, as in its loss."""
        if "" not in self.warned:
            self.warned.add("")
            logger.warning(
                "[ModelParallel] layer %r is called in a way in which the planned model does not call it: its weights "
                "are put together for each such call, which no plan has",
                layer.name,
            )
        running.frames.append(Frame(self, dict.fromkeys(self.in_shards, _read_whole), alone=True))

    def _finish(self, layer: keras.Layer, planned: _PlannedCall, frame: Frame, output: Any) -> Any:
        plan = planned.plan
        if not isinstance(output, torch.Tensor):
            return None
        result = output
        if plan.style == "vocabulary":
            result = without_others(result, frame.kept)
        elif plan.dropout_order and frame.kept is not None:
            placement = plan.sharded_inputs[0][1]
            result = frame.kept * own_shard(result, placement, self.axis)
        kept = plan.into_loss and running.keeping == self.model
        if plan.output is not None and planned.exit is not None and not kept:
            result = cross(result, plan.output, self.axis, planned.exit)
        if "bias" in plan.epilogue_after_output and layer.bias is not None:
            result = keras.ops.add(result, layer.bias)
        if plan.epilogue_after_output and layer.activation is not None:
            result = layer.activation(result)
        if result is not output and hasattr(output, "_keras_mask"):
            set_keras_mask(result, output._keras_mask)
        return result

    def _convert(self, args: Any, kwargs: Any, position: int, boundary: Boundary, site: Site) -> tuple[Any, Any]:
        if position == 0 and args and isinstance(args[0], torch.Tensor):
            return (self._shared(args[0], boundary, site), *args[1:]), kwargs
        leaves = keras.tree.flatten((args, kwargs))
        leaves[position] = self._shared(leaves[position], boundary, site)
        converted: tuple[Any, Any] = keras.tree.pack_sequence_as((args, kwargs), leaves)
        return converted

    def _shared(self, tensor: torch.Tensor, boundary: Boundary, site: Site) -> torch.Tensor:
        """Return the tensor across the boundary; a tensor that crosses equal boundaries crosses once."""
        if not running.scopes:  # nothing would end the sharing
            return cross(tensor, boundary, self.axis, site)
        crossed = running.entered.setdefault(tensor, {})
        version = 0 if tensor.is_inference() else tensor._version  # one that is written into is another
        key = (boundary.forward, boundary.backward, torch.is_grad_enabled(), version)
        result, left = crossed.get(key) or (cross(tensor, boundary, self.axis, site), boundary.readers)
        # Only what is gathered takes memory of its own.
        if left == 1 and boundary.forward.collective == "all_gather":
            crossed.pop(key, None)
        else:
            crossed[key] = result, left - 1
        across: torch.Tensor = result
        return across

    def _own_rows(self, layer: keras.Layer, args: Any) -> tuple[Any, torch.Tensor]:
        """Return the call's arguments with ids relative to this rank's rows, and the mask of ids that others hold."""
        ids = args[0] if not args[0].is_floating_point() else keras.ops.cast(args[0], "int32")
        own, elsewhere = own_rows(ids, layer.input_dim, self.axis.size, self.axis.rank)
        return (own, *args[1:]), elsewhere

    def _seen_whole(self, plan: LayerPlan, args: Any, kwargs: Any) -> tuple[tuple[torch.Tensor, Shape], ...]:
        """Return the shards that a call takes, with the shapes of the whole tensors."""
        leaves = keras.tree.flatten((args, kwargs))
        sharded = ((leaves[position], placement) for position, placement in plan.sharded_inputs)
        return tuple((each, whole_shape(tuple(each.shape), at, self.axis.size)) for each, at in sharded)

    def _whole_mask(self, plan: LayerPlan, args: Any, kwargs: Any) -> tuple[Any, torch.Tensor | None]:
        """Let dropout run on ones of the whole shape and memory order: the mask is the one a single device draws."""
        if not kwargs.get("training"):
            return args, None
        shard, placement = args[0], plan.sharded_inputs[0][1]
        assert isinstance(placement, Shard)
        shape = whole_shape(tuple(shard.shape), placement, self.axis.size)
        order = plan.dropout_order
        ones = torch.ones([shape[dim] for dim in order], dtype=shard.dtype, device=shard.device)
        return (ones.permute([order.index(dim) for dim in range(len(order))]), *args[1:]), shard


def _read_whole(variable: Any) -> torch.Tensor:
    return read_whole(variable, None)


def _runs_again_outside(layer: keras.Layer, scope: str) -> ParallelRuntimeError:
    return ParallelRuntimeError(
        f"layer {layer.name!r} runs again in the backward pass, outside {scope!r}, where its tensors are sharded; "
        f"call torch's checkpoint by its full name, torch.utils.checkpoint.checkpoint, and not by one that was "
        f"imported from there before the model was planned"
    )


def _takes_shards(plan: LayerPlan) -> bool:
    return any(isinstance(boundary.forward.source, Shard) for _, boundary in plan.inputs)


def _changes_calls(plan: LayerPlan) -> bool:
    at_boundaries = plan.inputs or plan.output or plan.functions or plan.sharded_inputs or plan.scope
    in_its_code = plan.epilogue_after_output or plan.dropout_order or plan.makes_again
    return bool(at_boundaries or in_its_code) or plan.style == "vocabulary"


def _site(plan: LayerPlan, place: str, boundary: Boundary) -> Site:
    return Site(plan.layer, f"{place} ({boundary.tensor})")


def _stop_watching(functions: FunctionCalls) -> None:
    running.watching -= 1
    functions.__exit__(None, None, None)


def withhold(layer: keras.Layer, epilogue: str) -> dict[str, Any]:
    """Take bias and activation away from a layer for the length of one call."""
    names = ["activation", "bias"] if "bias" in epilogue else ["activation"]
    kept = {name: layer.__dict__[name] for name in names if name in layer.__dict__}
    layer.__dict__.update(dict.fromkeys(kept))
    return kept


def give_back(layer: keras.Layer, kept: dict[str, Any]) -> None:
    """Undo ``withhold``."""
    layer.__dict__.update(kept)


@contextlib.contextmanager
def withheld(layer: keras.Layer, epilogue: str) -> Iterator[None]:
    """Inside, a layer has no bias or activation."""
    kept = withhold(layer, epilogue)
    try:
        yield
    finally:
        give_back(layer, kept)


def relax_input_spec(layer: keras.Layer, undo: list[Undo]) -> None:
    """Let a layer take shards: Keras checks input dims against the whole shape before any hook runs."""
    spec, before = layer.input_spec, vars(layer).keys() | set()
    if not any(isinstance(each, keras.InputSpec) and (each.axes or each.shape) for each in keras.tree.flatten(spec)):
        return
    layer.input_spec = keras.tree.map_structure(_without_lengths, spec)
    made = vars(layer).keys() - before  # by a Functional model, which works out its specs where none is set

    def check_again() -> None:
        layer.input_spec = spec
        for name in made:
            delattr(layer, name)

    undo.append(check_again)


def _without_lengths(spec: Any) -> Any:
    if not isinstance(spec, keras.InputSpec):
        return spec
    relaxed = copy.copy(spec)  # which keeps its rank
    relaxed.shape, relaxed.axes = None, {}
    return relaxed


def open_scope(layer: keras.Layer, model: int, name: str, undo: list[Undo]) -> None:
    """Mark the calls of a layer inside which regions lie; conversions are shared until the outermost ends."""

    def before(layer: keras.Layer, args: Any) -> None:
        running.scopes[model, name] += 1

    def after(layer: keras.Layer, args: Any, output: Any) -> None:
        running.scopes[model, name] -= 1
        if running.scopes[model, name] <= 0:
            del running.scopes[model, name]
        if not running.scopes:
            running.forget_what_crossed()

    undo.append(end_with_call(layer))
    undo.append(layer.register_forward_pre_hook(before, prepend=True).remove)
    undo.append(layer.register_forward_hook(after, always_call=True).remove)


def keep_for_the_loss(model: keras.Model, plan: LayerPlan, axis: Axis, undo: list[Undo]) -> None:
    """In steps of the model, let it return in shards what the layer of ``plan`` returns; see ``regions/logits.py``."""
    boundary = plan.output
    assert boundary is not None
    site = _site(plan, "output", boundary)

    def before(model: keras.Model, args: Any) -> None:
        if running.loss_of == id(model) and not is_symbolic():
            running.keeping = id(model)

    def after(model: keras.Model, args: Any, output: Any) -> Any:
        if running.keeping != id(model):
            return None
        running.keeping = None
        if output is None:  # an error
            return None
        logits = logits_of(output, boundary, axis, site)
        if hasattr(output, "_keras_mask"):
            set_keras_mask(logits, output._keras_mask)
        return logits

    undo.append(model.register_forward_pre_hook(before, prepend=True).remove)
    undo.append(model.register_forward_hook(after, always_call=True).remove)


def refuse_input_gradients(model: keras.Model, undo: list[Undo]) -> None:
    """Raise where a gradient with respect to the model's input is asked for that the plan cannot give."""

    def before(layer: keras.Layer, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in keras.tree.flatten((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise ParallelRuntimeError(
                f"gradients with respect to the inputs of {layer.name!r} would be wrong: an input meets sharded "
                f"tensors inside a layer; call tp_planner.restore(model) first, or shard less of that layer"
            )

    undo.append(model.register_forward_pre_hook(before, with_kwargs=True).remove)
