"""What users call: plan, parallelize, restore."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import keras
import torch
import torch.distributed as dist

from tp_planner.agreement import agree, agree_on_mesh, as_on_rank_zero
from tp_planner.checkpoints.initial import READING, Values, initial_values, read_and_initialize
from tp_planner.checkpoints.loading import let_loads_read_shards
from tp_planner.checkpoints.reading import reading_together
from tp_planner.checkpoints.values import lacks_values, tensors_for, values_of
from tp_planner.checkpoints.waiting_loads import loads_for
from tp_planner.frontend.fingerprint import fingerprint
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.frontend.layout_map import read_layout_map, read_zero
from tp_planner.frontend.optimizer import read_optimizer
from tp_planner.frontend.trace import require_built
from tp_planner.frontend.training_loss import TrainingLoss
from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import DeviceType, Layout, Zero
from tp_planner.ir.mesh import Mesh
from tp_planner.job.axes import Axes
from tp_planner.job.process_group import (
    device_type,
    job_axes,
    number_of_processes,
    require_process_group,
    this_device,
)
from tp_planner.job.random_state import share_random_state
from tp_planner.job.rendezvous import meet
from tp_planner.job.together import together
from tp_planner.layers.apply import Applied, apply_layers, gathered_value, old_value, scatter_from_rank_zero
from tp_planner.planner import make_plan
from tp_planner.readable_plan import Plan
from tp_planner.search.door import find_layout
from tp_planner.storage.log import log_sharding, logger
from tp_planner.storage.sharding import Sharding
from tp_planner.training.averaging import averaging_of
from tp_planner.training.checking import Recorder, check_first_step, recording
from tp_planner.training.model import adopt_its_optimizer, applied_to, let_go, take_over
from tp_planner.training.torch_optimizers import gather_states


def plan(
    model: keras.Model,
    layout_map: keras.distribution.LayoutMap,
    inputs: Any = None,
    optimizer: str | keras.optimizers.Optimizer | None = None,
    batch_axis: str | None = None,
    loss: Any = None,
    sequence_parallel: bool | None = None,
    gather_again: bool | None = None,
    device: DeviceType | None = None,
    gathers_ahead: int | None = None,
    zero: Zero | None = None,
) -> Plan:
    """Return how ``model`` would be sharded under ``layout_map``; needs no device and changes nothing.

    Args:
        model: a built Keras model on the torch backend, on any device ("meta" for one that fits nowhere).
        layout_map: regular expressions over variable paths, each with a mesh axis name or None per dim
            (https://keras.io/api/distribution/layout_map). Keys ``<layer path>/output`` name activations.
        inputs: example inputs; only shapes and dtypes are read. Needed for models that do not know theirs. An open
            batch dim is planned with size 2: give a batch of the size you train with for its memory.
        optimizer: makes the update of the simulated training step: a Keras optimizer, or the name of one. By
            default the one that the model is compiled with, if it is.
        batch_axis: the mesh axis over which the batch is split; across it lie replicas of the model, each of which
            sees its own share. By default the axis called "batch", or the one that no rule names, or the first, if two
            are larger than 1. If one is, it is the batch's where rules name others; else there is none.
        loss: the loss of the simulated training step, as for ``Model.compile``. By default that of Keras which the
            model is compiled with; without one the sum of the outputs stands for it, and takes less memory.
        sequence_parallel: whether the residual stream, what is between sharded layers, is sharded over the sequence
            (Korthikanti et al. 2022): as many bytes are sent, norms, dropout and sums take a rank's share of the
            memory. By default as the layout says, which is no.
        gather_again: whether what sharded layers gather from the residual stream is not kept for the backward pass
            but gathered again there: less memory, more communication. By default it is.
        device: "cpu" or "cuda", whose kernels count in memory and work. By default that of the mesh's devices,
            as their names say, else "cpu". Layers and collectives are the same.
        gathers_ahead: of what replicas store in parts, how many gathers before its own use each is started, forward
            and backward, so that it runs behind what is computed: more of them take more memory. By default 1.
        zero: what replicas store in parts, beside what rules say (the stages of ZeRO, Rajbhandari et al. 2020): with 1
            an optimizer's slots, each replica updating its part of every weight, and being left but that of its
            gradient; with 3 weights too, put together for use. By default as the layout says, which is 0, neither.

    Raises:
        PlanError: with every problem of the model, the mesh and the rules.

    >>> plan = tp_planner.plan(model, layout_map)  # doctest: +SKIP
    >>> print(plan)  # doctest: +SKIP
    """
    require_built(model)
    _require_plain(model)
    layout = _Asked(batch_axis, sequence_parallel, gather_again, gathers_ahead, zero).on(layout_map)
    if device not in (None, "cpu", "cuda"):
        raise PlanError(f"device is {device!r}; it is 'cpu' or 'cuda', or None for that of the mesh")
    layout = replace(layout, devices=device or layout.devices)
    return make_plan(model, layout, inputs, read_optimizer(optimizer, model), TrainingLoss.of(model, loss))


def read_layout(layout_map: Any, batch_axis: str | None) -> Layout:
    """Return the rules of a LayoutMap on its mesh, with the batch split over ``batch_axis`` where it is named."""
    return read_layout_map(layout_map).across(batch_axis)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a caller says of a layout beside its rules; None for what the layout says itself."""

    batch_axis: str | None
    sequence_parallel: bool | None
    gather_again: bool | None
    gathers_ahead: int | None
    zero: Zero | None

    def __post_init__(self) -> None:
        ahead = self.gathers_ahead
        if ahead is not None and (type(ahead) is not int or ahead < 0):
            raise PlanError(f"gathers_ahead is {ahead!r}; it is a number of gathers, 0 for none")
        if self.zero is not None:
            read_zero(self.zero)

    @property
    def of_the_plan(self) -> dict[str, Any]:
        """What is said of all but the batch axis, by name."""
        said = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "batch_axis"}
        return {name: value for name, value in said.items() if value is not None}

    def on(self, layout_map: Any) -> Layout:
        """Return the layout of a LayoutMap, with this said of it."""
        return replace(read_layout(layout_map, self.batch_axis), **self.of_the_plan)


@torch.inference_mode(False)  # shards that are made in that mode cannot be trained
def parallelize(
    model: keras.Model,
    layout_map_or_plan: keras.distribution.LayoutMap | Plan | Literal["auto"],
    inputs: Any = None,
    check: Literal["first_step"] | None = None,
    batch_axis: str | None = None,
    sequence_parallel: bool | None = None,
    gather_again: bool | None = None,
    gathers_ahead: int | None = None,
    weights: str | Path | None = None,
    names: Mapping[str, str] | None = None,
    zero: Zero | None = None,
) -> keras.Model:
    """Shard ``model`` over the devices of its mesh and return it; every process of the job has to call it.

    Starts the process group from torchrun's environment where there is none. Rank 0's weights are the truth;
    random number generators of all ranks continue from rank 0's state.

    A model that fits nowhere is built under ``keras.device("meta")``, and its weights come from a file; or it is built
    under ``deferred_init``, and its initializers run, or what it was to load there is read. Each rank makes its own
    shards and never holds the model whole.

    Args:
        model: a built, plain Keras model.
        layout_map_or_plan: a LayoutMap, a plan that ``plan`` made for this model, or "auto" for the layout that
            ``find_layout`` finds on a mesh of all processes, one axis called "model".
        inputs: as for ``plan``.
        check: "first_step" compares the collectives of the first training step by Keras with the plan; all ranks
            raise ContractError if they differ on any.
        batch_axis: as for ``plan``, of which a plan has its own. Each replica is called on its own share of the batch,
            the ranks of one replica on the same; gradients are averaged over the samples of all.
        sequence_parallel: as for ``plan``; a plan has decided it.
        gather_again: as for ``plan``; a plan has decided it.
        gathers_ahead: as for ``plan``; a plan has decided it.
        weights: a file or folder that all ranks read, each its own shards: ``.weights.h5``, ``.weights.json``,
            ``.keras``, ``.safetensors``, a folder with an index of many, or one of torch.distributed.checkpoint. The
            model may hold values already; they are not used.
        names: names of tensors in that file by the variables' keys (as ``plan.variables`` has them), where they are
            named otherwise. In Keras's own files tensors are found by their place in the model, in others by the key.
        zero: as for ``plan``; a plan has decided it.

    Raises:
        PlanError: if the layout cannot be planned, the plan does not fit the model, the number of processes is
            not the size of the mesh, or ranks made different plans; if variables are not in the file of weights, or do
            not fit, with all of them. The model is then as before on all ranks.
    """
    if check not in (None, "first_step"):
        raise PlanError(f"check is {check!r}; it is 'first_step' or None")
    asked = _Asked(batch_axis, sequence_parallel, gather_again, gathers_ahead, zero)
    layout = _asked_for(layout_map_or_plan, asked)
    mesh = layout if isinstance(layout, Mesh) else layout.mesh
    require_process_group(mesh.size, layout.devices if isinstance(layout, Layout) else None)
    agree_on_mesh(mesh)
    axes = job_axes(mesh)
    if inputs is not None:
        inputs = as_on_rank_zero(inputs, mesh)
    chosen = agree(lambda: _choose(model, layout, inputs))
    share_random_state()
    applied = _apply(model, chosen, axes, weights, names)
    try:
        take_over(model, applied)
        let_loads_read_shards()
    except BaseException:  # an interrupt, say
        applied.revert(model, old_value)
        raise
    applied.commit()
    adopt_its_optimizer(model, applied)
    for variable in chosen.variables:
        log_sharding(variable, applied.placed[variable.key].variable, axes.model)
    if check is not None:
        check_first_step(model, applied)
    if dist.get_rank() == 0:
        for note in chosen.notes:
            logger.warning("[ModelParallel] %s", note)
    return model


@contextlib.contextmanager
def record(model: keras.Model) -> Iterator[Recorder]:
    """Record the collectives that run inside, for ``Plan.check``; its ``recording`` is there afterwards.

    Raises PlanError for a model that is not parallelized.

    >>> with tp_planner.record(model) as recorder:  # doctest: +SKIP
    ...     model.train_on_batch(x, y)
    >>> plan.check(recorder.recording)  # doctest: +SKIP
    """
    applied = applied_to(model)
    if applied is None:
        raise PlanError(f"model {model.name!r} is not parallelized; there is nothing to record")
    with recording(model, applied) as recorder:
        yield recorder


@contextlib.contextmanager
def no_sync(model: keras.Model) -> Iterator[None]:
    """Inside, backward passes send no gradients to other replicas, as in torch's modules of this name.

    They stay in the parameters, this replica's alone and weighed by its samples, and travel with those of the next
    backward pass outside. So a loop of one's own that adds up gradients averages them once. Those of which replicas
    keep parts, as with zero=1 and 3, are reduced in each pass, and may be read at any time.

    Raises PlanError for a model that is not parallelized. Of others, an update without such a pass, or clipping before
    it, raises ParallelRuntimeError.

    >>> for number, (x, y) in enumerate(batches):  # doctest: +SKIP
    ...     with contextlib.nullcontext() if number == last else tp_planner.no_sync(model):
    ...         loss(y, model(x, training=True)).backward()
    """
    if applied_to(model) is None:
        raise PlanError(f"model {model.name!r} is not parallelized; there are no gradients to send")
    averaging = averaging_of(named_variables(model).values())
    with contextlib.nullcontext() if averaging is None else averaging.putting_off():
        yield


@torch.inference_mode(False)
def restore(model: keras.Model) -> keras.Model:
    """Gather the weights of a parallelized model and return it as an ordinary single-device model.

    Every process has to call it; each then holds the whole model on the devices it was on before.

    Raises PlanError for a model that is not parallelized.
    """
    applied = applied_to(model)
    if applied is None:
        raise PlanError(f"model {model.name!r} is not parallelized; there is nothing to restore")
    meet("tp_planner.restore")
    let_go(model, applied)
    gather_states(placed.variable for placed in applied.placed.values())
    applied.revert(model, gathered_value)
    return model


def _require_plain(model: keras.Model) -> None:
    if applied_to(model) is not None:
        raise PlanError(f"model {model.name!r} is parallelized already; call tp_planner.restore(model) first")


def _asked_for(given: Any, asked: _Asked) -> Plan | Layout | Mesh:
    """Return the plan or the layout that a user gives, or the mesh on which a layout is to be found."""
    if isinstance(given, str) and given == "auto":
        _require_left_to_the_search(asked)
        return Mesh((("model", number_of_processes()),))
    if isinstance(given, Plan):
        _require_as_planned(given, asked)
        return given
    return asked.on(given)


def _require_as_planned(chosen: Plan, asked: _Asked) -> None:
    if asked.batch_axis not in (None, chosen.mesh.batch_axis):
        raise PlanError(
            f"batch_axis is {asked.batch_axis!r}, the plan was made for {chosen.mesh.batch_axis!r}; "
            f"give batch_axis= to tp_planner.plan"
        )
    if asked.of_the_plan:
        raise PlanError(f"a plan has decided {' and '.join(asked.of_the_plan)}; say it to tp_planner.plan")


def _require_left_to_the_search(asked: _Asked) -> None:
    said = [*(["batch_axis"] if asked.batch_axis is not None else []), *asked.of_the_plan]
    if said:
        raise PlanError(
            f"layout 'auto' is found for one axis, with what is cheapest; find a layout with tp_planner.find_layout, "
            f"and give that with {' and '.join(said)}"
        )


def require_fit(model: keras.Model, chosen: Plan) -> None:
    """Raise PlanError unless the plan was made for this model."""
    if fingerprint(model) != chosen.fingerprint:
        raise PlanError(
            f"the plan was made for another model than {model.name!r}: variables or layers differ; "
            f"make it again with tp_planner.plan(model, layout_map)"
        )


def _apply(
    model: keras.Model, chosen: Plan, axes: Axes, weights: str | Path | None, names: Mapping[str, str] | None
) -> Applied:
    """Apply the plan with values from the file, the initializers, or rank 0; on all ranks or none."""
    scatter = scatter_from_rank_zero(this_device(), chosen.mesh)
    if weights is None and lacks_values(model):
        if loads_for(named_variables(model).values()):
            return _apply_and_read(model, chosen, axes, scatter)
        return apply_layers(model, chosen, axes, initial_values(model, scatter, this_device()))
    if weights is None:
        return apply_layers(model, chosen, axes, scatter)
    with contextlib.ExitStack() as opened:
        tensors = together(READING, lambda: opened.enter_context(tensors_for(model, Path(weights), names)))
        applied: list[Applied] = []
        try:
            with reading_together(READING) as reading:
                applied.append(apply_layers(model, chosen, axes, values_of(tensors, reading, this_device())))
        except BaseException:
            for each in applied:
                each.revert(model, old_value)
            raise
    return applied[0]


def _apply_and_read(model: keras.Model, chosen: Plan, axes: Axes, scatter: Values) -> Applied:
    """Apply the plan with room for values, and fill it with what waits to be read, or the initializers."""

    def room(variable: Any, sharding: Sharding) -> torch.Tensor:
        shape = sharding.local_shape(tuple(variable.shape))
        return torch.empty(shape, dtype=variable._value.dtype, device=this_device())

    applied = apply_layers(model, chosen, axes, room)
    try:
        shardings = {each.key: Sharding(axes, each.placement, each.batch_placement) for each in chosen.variables}
        read_and_initialize(model, shardings, scatter, this_device())
    except BaseException:
        applied.revert(model, old_value)
        raise
    return applied


def _choose(model: keras.Model, layout_or_plan: Layout | Plan | Mesh, inputs: Any) -> Plan:
    """Return the plan to apply, once everything that can be wrong with it was looked at."""
    require_built(model)
    _require_plain(model)
    if isinstance(layout_or_plan, Mesh):
        hardware = "cpu" if device_type() == "cpu" else "h100"
        chosen = find_layout(model, layout_or_plan, inputs, hardware=hardware).plan
    else:
        chosen = layout_or_plan if isinstance(layout_or_plan, Plan) else plan(model, layout_or_plan, inputs)
    require_fit(model, chosen)
    return chosen
