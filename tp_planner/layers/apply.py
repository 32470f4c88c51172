"""Apply: change a Keras model as its plan says, variable by variable, so that everything can be undone."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from tp_planner.frontend.layer_tree import named_layers, named_variables, own_variables
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.placement import Replicate, Shard
from tp_planner.ir.plan import Boundary, Gathering, LayerPlan, Plan, VariablePlan
from tp_planner.job.axes import Axes, Axis
from tp_planner.job.scattering import scatter_parts
from tp_planner.layers.generation import follow_caches
from tp_planner.layers.statistics import OF_THE_BATCH, share_statistics
from tp_planner.layers.stream import shard_stream
from tp_planner.layers.styles import STYLES, LayerCalls, Undo, keep_for_the_loss, open_scope, refuse_input_gradients
from tp_planner.regions.calls import Reader, Site
from tp_planner.regions.left_out import watch_calls
from tp_planner.regions.recomputation import follow_recomputation
from tp_planner.regions.replicas import Replicas
from tp_planner.regions.summands import Summands
from tp_planner.storage.forwarding import Content, forward, revive
from tp_planner.storage.parts import ReadTogether, Turn
from tp_planner.storage.regularization import parallel_constraint, parallel_regularizer
from tp_planner.storage.sharding import Sharding, part_of_shards
from tp_planner.storage.torch_modules import follow_variables
from tp_planner.storage.variables import (
    make_parallel,
    make_plain,
    read_as,
    read_on_stream,
    read_whole,
    sharded_parameter,
    whole_tensor,
)

# Returns this rank's stored tensor of a variable: (variable, sharding) -> local tensor
Scatter = Callable[[Any, Sharding], torch.Tensor]


@dataclass
class PlacedVariable:
    """What undoing the placement of one variable needs.

    ``old`` is the parameter it had, ``content`` what was in it if it kept it; both are let go once the whole model is
    placed. ``former`` is the parameter that it had then, as long as somebody else holds it.
    """

    variable: Any
    device: torch.device
    parallel: bool
    regularizer: Any
    constraint: Any
    old: torch.nn.Parameter | None
    content: Content | None
    former: Callable[[], torch.nn.Parameter | None] = lambda: None


@dataclass
class Applied:
    """A plan applied to a model: what was done, and how to undo it."""

    plan: Plan
    axes: Axes
    replicas: Replicas | None = None
    summands: Summands = field(init=False)
    placed: dict[str, PlacedVariable] = field(default_factory=dict)
    undo: list[Undo] = field(default_factory=list)
    committed: bool = False

    def __post_init__(self) -> None:
        self.summands = Summands(self.axis, self.replicas)

    @property
    def axis(self) -> Axis:
        """The model axis."""
        return self.axes.model

    def commit(self) -> None:
        """Let go of the whole values; from now on they are spread over the ranks."""
        self.committed = True
        for placed in self.placed.values():
            if placed.old is not None and placed.old is not placed.variable._value:
                if not placed.old.is_meta:  # which can never hold a value
                    placed.former = weakref.ref(placed.old)
                forward(placed.old, placed.variable)
            placed.old = placed.content = None

    def revert(self, model: keras.Model, values: Callable[[str, PlacedVariable], torch.nn.Parameter]) -> None:
        """Undo everything, last change first; ``values`` gives each variable its parameter."""
        while self.undo:
            self.undo.pop()()
        rebind = Rebinding(model)
        for key in reversed(list(self.placed)):
            placed = self.placed[key]
            value, variable = values(key, placed), placed.variable
            former = variable._value
            rebind(former, value)
            if placed.parallel:
                make_plain(variable, value)
            variable._value = value
            if self.committed and former is not value:
                forward(former, variable)
            variable._regularizer, variable._constraint = placed.regularizer, placed.constraint
            del self.placed[key]


def old_value(key: str, placed: PlacedVariable) -> torch.nn.Parameter:
    """Return the parameter that the variable had before; only before ``commit``."""
    assert placed.old is not None
    if placed.content is not None:
        placed.content.fill(placed.old)
    return placed.old


def gathered_value(key: str, placed: PlacedVariable) -> torch.nn.Parameter:
    """Return the variable's whole value, gathered from the ranks, on the device it was on before."""
    parameter: torch.nn.Parameter = placed.variable._value
    value = whole_tensor(placed.variable).to(placed.device)
    if isinstance(parameter, DTensor):
        plain: torch.nn.Parameter = revive(placed.former(), value, parameter.requires_grad)
        return plain
    parameter.data = value
    return parameter


def apply_layers(
    model: keras.Model,
    plan: Plan,
    axes: Axes,
    scatter: Scatter,
    left_out: frozenset[str] = frozenset(),
    starting: bool = True,
    stored: frozenset[str] = frozenset(),
) -> Applied:
    """Place the model's variables and hook its layers as ``plan`` says.

    Args:
        model: a plain model for which the plan was made.
        plan: the plan.
        axes: the axes of the plan's mesh.
        scatter: makes this rank's stored tensor of a variable.
        left_out: layers that stay as they are, by name.
        starting: whether gathers are started before they are needed; else only those that would be are known.
        stored: those of the layers left out whose variables are placed all the same.

    If anything fails, the model is as before.
    """
    follow_recomputation()
    applied = Applied(plan, axes, None if axes.batch is None else Replicas(axes.batch))
    layers = {name: layer for name, layer in named_layers(model).items() if name not in left_out}
    by_layer: dict[str, dict[str, LayerPlan]] = {}
    for layer_plan in plan.layers:
        by_layer.setdefault(layer_plan.layer, {})[layer_plan.mode] = layer_plan
    try:
        placer = _Placer(model, applied, scatter, list(layers.values()))
        if not plan.input_gradients:
            refuse_input_gradients(next(iter(layers.values())), applied.undo)
        for name in sorted(_scopes(plan, layers)):
            open_scope(layers[name], id(model), name, applied.undo)
        # Inside the model's call there is a frame, and what a layer does is not done by watched code around it.
        hooked = layers if any(each.functions for each in plan.layers) else {next(iter(layers))}
        for name, layer in layers.items():
            modes = by_layer.get(name, {})
            readers, in_shards = placer.readers(layer, modes), placer.in_shards(layer)
            calls = LayerCalls(modes, readers, axes.model, id(model), in_shards)
            style = STYLES[next(iter(modes.values())).style if modes else "replicated"]
            changed = None if calls.change_nothing and name not in hooked else calls
            parallelize_module(layer, axes.model.mesh, style(changed, placer.place, applied.undo))
            if isinstance(layer, keras.layers.TorchModuleWrapper):
                applied.undo.append(follow_variables(layer))
            if (forget := follow_caches(layer, name, plan, axes.model, id(model))) is not None:
                applied.undo.append(forget)
        for layer_plan in (each for each in plan.layers if each.into_loss):
            keep_for_the_loss(model, layer_plan, axes.model, applied.undo)
        if plan.shards_stream:
            applied.undo.append(shard_stream(model, axes.model.size))
        if applied.replicas is not None:
            _join_replicas(model, applied, applied.replicas, placer, starting)
        for layer in (layer for name, layer in named_layers(model).items() if name in stored):
            placer.place(layer)
    except BaseException:
        applied.revert(model, old_value)
        raise
    return applied


def _join_replicas(model: keras.Model, applied: Applied, replicas: Replicas, placer: _Placer, starting: bool) -> None:
    """Let replicas count their samples, put their parts of variables together for use, and share statistics."""
    hook = model.register_forward_pre_hook(replicas.see, with_kwargs=True)
    applied.undo.append(hook.remove)
    for layer in placer.layers_with_parts():
        applied.undo += [handle.remove for handle in watch_calls(layer)]
    _read_together(applied, placer, starting)
    for layer in placer.layers:
        name = placer.names[id(layer)]
        if isinstance(layer, OF_THE_BATCH):
            share_statistics(layer, replicas, Site(name, "statistics"))
            applied.undo.append(functools.partial(layer.__dict__.pop, "_moments"))


def _read_together(applied: Applied, placer: _Placer, starting: bool) -> None:
    """Let what the plan gathers together be read so, but for blocks that are left out.

    Unless gathers are ``starting`` before they are needed, they are only known to.
    """
    plan = applied.plan
    in_turn = [each for each in plan.gatherings if each.once] if plan.gathers_ahead else []
    ahead, late = plan.gathers_ahead * starting, plan.gathers_ahead > 0
    turns = {each: Turn(ahead=ahead, early=each in in_turn, late=late) for each in plan.gatherings}
    made: dict[Gathering, ReadTogether] = {}
    for gathering in plan.gatherings:
        if all(read.variable in applied.placed for read in gathering.reads):
            variables = [placer.variables[read.variable] for read in gathering.reads]
            dtypes = [getattr(torch, read.dtype) for read in gathering.reads]
            site = Site(gathering.layer, gathering.place)
            made[gathering] = ReadTogether(variables, dtypes, site, turns[gathering])
            for read, variable in zip(gathering.reads, variables, strict=True):
                variable._stored.together[Site(read.layer, read.variable)] = made[gathering]
    for place, gathering in enumerate(in_turn if starting else ()):
        following = in_turn[place + 1 : place + 1 + plan.gathers_ahead]
        turns[gathering].following = tuple(made[each] for each in following)


def _scopes(plan: Plan, layers: Mapping[str, Any]) -> set[str]:
    """Return the layers inside whose calls regions lie, and the model."""
    return {layer.scope for layer in plan.layers if layer.scope in layers} | {next(iter(layers))}


class Rebinding:
    """Replaces a parameter wherever torch modules of the model hold it beside its variable.

    A layer is such a module, and may have a dict of the parameters of all layers inside. There are modules inside of it
    that are no layers of the model to Keras: the Functional model that a Sequential runs, the module of a wrapper.
    """

    def __init__(self, model: keras.Model) -> None:
        self._holders: dict[int, list[tuple[Any, str]]] = {}
        waiting: list[Any] = list(named_layers(model).values())
        seen: set[int] = set()
        while waiting:
            module = waiting.pop()
            if module is not None and id(module) not in seen:
                seen.add(id(module))
                waiting += module._modules.values()
                for name, parameter in module._parameters.items():
                    self._holders.setdefault(id(parameter), []).append((module._parameters, name))

    def __call__(self, old: torch.nn.Parameter, new: torch.nn.Parameter) -> None:
        holders = self._holders.pop(id(old), [])
        for parameters, key in holders:
            parameters[key] = new
        self._holders[id(new)] = holders


class _Placer:
    """Places the variables of one layer after the other, each once."""

    def __init__(self, model: keras.Model, applied: Applied, scatter: Scatter, layers: list[keras.Layer]) -> None:
        self.applied, self.rebind, self.scatter = applied, Rebinding(model), scatter
        self.plans = {variable.key: variable for variable in applied.plan.variables}
        self.layers = layers
        self.names = {id(layer): name for name, layer in named_layers(model).items()}
        self.variables = named_variables(model)
        self.keys = {id(variable): key for key, variable in self.variables.items()}
        self.reads: dict[str, set[str]] = {}  # by layer, what replicas store in parts
        for read in (read for each in applied.plan.gatherings for read in each.reads):
            self.reads.setdefault(read.layer, set()).add(read.variable)
        self.converted = {
            use.variable
            for layer in applied.plan.layers
            for use in layer.uses
            if not use.boundary.is_identity or use.boundary.forward.source != Replicate()
        }

    def readers(self, layer: keras.Layer, modes: dict[str, LayerPlan]) -> dict[str, dict[int, Reader]]:
        """Return, by mode, how each parallel variable is read in the layer's calls."""
        variables = self.variables
        own = {self.keys[id(variable)] for variable in own_variables(layer)}
        in_parts = [(id(variables[key]), key) for key in sorted(own | self.read_in(layer)) if self._in_parts(key)]
        return {
            mode: {each: functools.partial(read_whole, site=Site(plan.layer, key)) for each, key in in_parts}
            | {
                id(variables[use.variable]): self._reader(use.boundary, Site(plan.layer, use.variable))
                for use in plan.uses
                if self._is_parallel(use.variable)
            }
            for mode, plan in modes.items()
        }

    def read_in(self, layer: keras.Layer) -> set[str]:
        """Return what replicas store in parts and this layer's own code reads, though it may be another layer's."""
        return self.reads.get(self.names[id(layer)], set())

    def _reader(self, boundary: Boundary, site: Site) -> Reader:
        if boundary.is_on_stream:
            return read_on_stream(boundary, self.applied.axis, site, self.applied.summands)
        return read_as(boundary, self.applied.axis, site)

    def _in_parts(self, key: str) -> bool:
        """Whether replicas store a variable in parts."""
        return isinstance(self.plans[key].batch_placement, Shard)

    def _is_parallel(self, key: str) -> bool:
        """Whether a variable is cut, or changes where it is used."""
        return self.plans[key].is_sharded or key in self.converted

    def in_shards(self, layer: keras.Layer) -> set[int]:
        """Return the layer's own variables, by ``id``, that are stored in shards over either axis."""
        return {id(each) for each in own_variables(layer) if self.plans[self.keys[id(each)]].is_sharded}

    def layers_with_parts(self) -> list[keras.Layer]:
        """Return the layers that read variables which replicas store in parts."""
        return [
            layer
            for layer in self.layers
            if self.read_in(layer) or any(self._in_parts(self.keys[id(v)]) for v in own_variables(layer))
        ]

    def place(self, layer: keras.Layer) -> None:
        """Give each of the layer's own variables the value that this rank stores."""
        for variable in own_variables(layer):
            key = self.keys[id(variable)]
            if key not in self.applied.placed:
                self._place(key, variable, self.names[id(layer)])

    def _place(self, key: str, variable: Any, layer: str) -> None:
        plan, axes, old = self.plans[key], self.applied.axes, variable._value
        sharding = Sharding(axes, plan.placement, plan.batch_placement)
        local = self.scatter(variable, sharding)
        trainable = old.requires_grad and old.is_floating_point()
        content = Content.of(old) if _stays(old, local, sharding) else None
        new = (
            sharded_parameter(local, plan.shape, sharding, trainable)
            if sharding.cuts
            else torch.nn.Parameter(local, requires_grad=trainable)
        )
        home = local.device if old.is_meta else old.device
        parallel = self._is_parallel(key)
        regularizer, constraint = variable._regularizer, variable._constraint
        self.applied.placed[key] = PlacedVariable(variable, home, parallel, regularizer, constraint, old, content)
        if content is not None:  # the same object: modules and optimizers of torch's may hold it too
            gradient = _gradient_in_shards(old, sharding)
            Content.of(new).fill(old)
            old.grad, new = gradient, old
        if parallel:
            make_parallel(variable, new, sharding, self.applied.replicas)
        else:
            variable._value = new
        self.rebind(old, new)
        self._restrict(variable, plan, layer)

    def _restrict(self, variable: Any, plan: VariablePlan, layer: str) -> None:
        """Let regularizer and constraint of a sharded variable be functions of its whole value."""
        if plan.is_sharded:
            penalty, limit = Site(layer, f"penalty of {plan.key}"), Site(layer, f"constraint of {plan.key}")
            regularizer, constraint = variable._regularizer, variable._constraint
            variable._regularizer = regularizer and parallel_regularizer(
                regularizer, plan.placement, self.applied.axis, penalty
            )
            variable._constraint = constraint and parallel_constraint(constraint, limit)


def _stays(parameter: torch.nn.Parameter, local: torch.Tensor, sharding: Sharding) -> bool:
    """Whether a parameter can be given what this rank stores: both hold values, and it is a DTensor before as after."""
    if isinstance(local, FakeTensor) or parameter.is_meta:
        return False
    return isinstance(parameter, DTensor) == bool(sharding.cuts)


def _gradient_in_shards(parameter: torch.nn.Parameter, sharding: Sharding) -> torch.Tensor | None:
    """Return the gradient of a parameter that stays, in the layout that the parameter will have."""
    gradient = parameter.grad
    if not isinstance(gradient, DTensor):
        return gradient
    local = part_of_shards(gradient, sharding)
    return sharded_parameter(local, tuple(gradient.shape), sharding, requires_grad=False).detach()


def scatter_from_rank_zero(device: torch.device, mesh: Mesh) -> Scatter:
    """Return a scatter that makes rank 0's values the truth, one variable at a time.

    Only rank 0's value is read. Sharded values are cut on the device they are on, and only the shards move. A value
    that is in shards already stays so.
    """

    def scatter(variable: Any, sharding: Sharding) -> torch.Tensor:
        if isinstance(variable._value, DTensor):
            return part_of_shards(variable._value, sharding)
        value = variable._value.detach()
        shape = sharding.local_shape(tuple(variable.shape))
        local = torch.empty(shape, dtype=variable._value.dtype, device=device)
        with torch.no_grad():
            if not sharding.cuts:
                if dist.get_rank() == 0:
                    local.copy_(value)
                dist.broadcast(local, 0)
                return local

        def part_of(rank: int) -> torch.Tensor:
            places = [mesh.coordinate(rank, axis.name) for axis in sharding.axes.all]
            part: torch.Tensor = sharding.at(places).own(value)
            return part

        return scatter_parts(local, part_of)

    return scatter


@contextlib.contextmanager
def applied_for_simulation(
    model: keras.Model,
    plan: Plan,
    axes: Axes,
    left_out: frozenset[str] = frozenset(),
    stored: frozenset[str] = frozenset(),
) -> Iterator[Applied]:
    """Apply the plan with fake shards, on the same code path as for real, and undo it afterwards.

    Layers that are ``left_out`` stay as they are, but for the variables of those that are ``stored``.
    """

    def empty(variable: Any, sharding: Sharding) -> torch.Tensor:
        shape = sharding.local_shape(tuple(variable.shape))
        return torch.empty(shape, dtype=variable._value.dtype, device="cpu")

    applied = apply_layers(model, plan, axes, empty, left_out, starting=False, stored=stored)
    try:
        yield applied
    finally:
        applied.revert(model, old_value)
