"""Explain: why one layer or variable is planned as it is, and what other layout rules for it would cost.

An alternative is the same layout with a rule for the variable's exact path, which wins over every pattern. Each
is planned like any layout, so that its figures are those of a plan.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from tp_planner.frontend.survey import survey
from tp_planner.frontend.trace import require_built
from tp_planner.frontend.training_loss import TrainingLoss
from tp_planner.ir.errors import PlanError
from tp_planner.ir.explanation import Alternative, ComputedLayer, Crossing, PathExplanation, StoredVariable
from tp_planner.ir.figures import figures_of, local_bytes, whole_bytes
from tp_planner.ir.graph import LayerInfo, VariableInfo
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.placement import Placement, Replicate, Shape, Shard, without_parts
from tp_planner.ir.plan import Boundary, LayerPlan, Plan, VariablePlan
from tp_planner.ir.step import Collective
from tp_planner.passes.compare_plans import compare_plans, layer_name
from tp_planner.planner import make_plan

Placements = Mapping[str, Placement]  # by variable key


@dataclass(frozen=True, slots=True)
class Survey:
    """The layers and variables of a model by name, the model itself the first of its layers."""

    layers: Mapping[str, LayerInfo]
    variables: Mapping[str, VariableInfo]

    @property
    def model(self) -> str:
        return next(iter(self.layers))


@dataclass(frozen=True, slots=True)
class Subject:
    """What a path names. Which of its variables decide how it is computed is what the alternatives change."""

    name: str
    kind: str
    layers: tuple[str, ...]
    variables: tuple[str, ...]
    deciding: tuple[str, ...]


def explain(
    model: keras.Model,
    layout: Layout,
    path: str,
    inputs: Any = None,
    optimizer: keras.optimizers.Optimizer | None = None,
    loss: TrainingLoss | None = None,
) -> PathExplanation:
    """Return why the layer or variable at ``path`` is planned so, with its alternatives; the model is as before.

    ``inputs``, ``optimizer`` and ``loss`` are those of ``make_plan``.

    Raises:
        PlanError: if the model has no such path, with the closest ones, or if the layout cannot be planned.
    """
    require_built(model)
    known = Survey(*survey(model))
    subject = _find(path, known)
    make = functools.partial(make_plan, model, inputs=inputs, optimizer=optimizer, loss=loss)
    plan = make(layout)
    concerned = [layer for layer in plan.layers if layer.layer in subject.layers]
    stored = {variable.key: variable for variable in plan.variables}
    equals = _equals(subject, known, stored)
    alone = _choices(subject, known)
    together = _united([_choices(each, known) for each in equals]) if len(equals) > 1 else []

    def tried(choices: Sequence[Placements], subjects: Sequence[Subject]) -> tuple[Alternative, ...]:
        if plan.axis_size == 1:
            return ()
        other = [
            choice for choice in choices if any(without_parts(stored[key].placement) != choice[key] for key in choice)
        ]
        return tuple(_try(choice, make, layout, plan, subjects) for choice in other)

    return PathExplanation(
        model=plan.model,
        mesh=str(plan.mesh),
        path=subject.name,
        kind=subject.kind,
        variables=tuple(_stored(stored[key]) for key in subject.variables),
        layers=tuple(_computed(layer, plan) for layer in concerned),
        collectives=tuple(_collectives(concerned, plan)),
        figures=figures_of(plan),
        equals=tuple(each.name for each in equals),
        alternatives=tried(alone, [subject]),
        alternatives_for_equals=tried(together, equals),
    )


# --- what the path names -------------------------------------------------------------------------------


def _find(path: str, known: Survey) -> Subject:
    for key, variable in known.variables.items():
        if path in (key, variable.path):
            return _variable_subject(key, known)
    for name, layer in known.layers.items():
        if path in (name, layer.path):
            return _layer_subject(name, known)
    raise PlanError(f"model {known.model!r} has no layer or variable {path!r}; closest: {_closest(path, known)}")


def _variable_subject(key: str, known: Survey) -> Subject:
    readers = tuple(name for name, layer in known.layers.items() if key in (*layer.variables, *_weights(layer)))
    return Subject(key, "variable", readers, (key,), (key,))


def _layer_subject(name: str, known: Survey) -> Subject:
    if name == known.model:
        raise PlanError(f"{name!r} is the whole model: tp-planner plan shows it; name one of its layers or variables")
    inner = [each for each in known.layers if each.startswith(f"{name}/")]
    own = dict.fromkeys(key for each in (name, *inner) for key in known.layers[each].variables)
    main = dict.fromkeys(contraction.main_weight for _, contraction in known.layers[name].contractions)
    deciding = () if inner else tuple(main or own)
    return Subject(name, known.layers[name].class_name, (name, *inner), tuple(own), deciding)


def _weights(layer: LayerInfo) -> list[str]:
    return [key for _, contraction in layer.contractions for key, _ in contraction.weights]


def _closest(path: str, known: Survey) -> str:
    """Return the paths that end as ``path`` does, or else look most like it."""
    names = sorted({*known.layers, *known.variables} - {known.model})
    ending = [name for name in names if name.endswith(f"/{path}")]
    closest = ending or difflib.get_close_matches(path, names, n=3, cutoff=0.0)
    return ", ".join(map(repr, closest[:3]))


def _equals(subject: Subject, known: Survey, stored: Mapping[str, VariablePlan]) -> list[Subject]:
    """Return the subject and those of other blocks: equal names but for numbers, equal shapes, placements and rules."""
    if subject.kind == "variable":
        others = [_variable_subject(key, known) for key in known.variables if _starred(key) == _starred(subject.name)]
    else:
        names = [name for name in known.layers if name != known.model and _starred(name) == _starred(subject.name)]
        others = [_layer_subject(name, known) for name in names]

    def facts(each: Subject) -> list[tuple[Shape, Placement, str | None]]:
        return [(stored[key].shape, stored[key].placement, stored[key].rule) for key in each.variables]

    return [each for each in others if facts(each) == facts(subject)]


def _starred(name: str) -> str:
    return re.sub(r"\d+", "*", name)


# --- how it is planned ---------------------------------------------------------------------------------


def _stored(variable: VariablePlan) -> StoredVariable:
    return StoredVariable(
        key=variable.key,
        shape=variable.shape,
        local_shape=variable.local_shape,
        dtype=variable.dtype,
        trainable=variable.trainable,
        placement=variable.stored_as,
        whole_bytes=whole_bytes(variable),
        local_bytes=local_bytes(variable),
        rule=variable.rule,
        reason=variable.reason,
    )


def _computed(layer: LayerPlan, plan: Plan) -> ComputedLayer:
    return ComputedLayer(
        layer=layer_name(layer),
        class_name=layer.class_name,
        style=layer.style,
        reason=layer.reason,
        crossings=tuple(_crossings(layer, plan)),
        after_output=layer.epilogue_after_output,
    )


def _crossings(layer: LayerPlan, plan: Plan) -> Iterator[Crossing]:
    """Yield what happens to each tensor that enters or leaves the layer sharded, or through a boundary."""
    boundaries = dict(layer.boundaries)
    for position, placement in layer.sharded_inputs:
        if f"input {position}" not in boundaries:
            yield Crossing(f"input {position}", "", (), str(placement), "", ())
    for place, boundary in boundaries.items():
        backward = str(boundary.backward) if boundary.has_gradient else ""
        shared = tuple(_sharing(layer, boundary, plan)) if place.startswith("input") else ()
        yield Crossing(place, boundary.tensor, boundary.shape, str(boundary.forward), backward, shared)
    if layer.output is None and layer.output_placement is not None:
        yield Crossing("output", "", (), str(layer.output_placement), "", ())


def _sharing(layer: LayerPlan, boundary: Boundary, plan: Plan) -> list[str]:
    """Return the other layers that an input's boundary is crossed for."""
    if boundary.is_identity:
        return []
    return [other.layer for other in plan.layers if other is not layer and _reads_through(other, boundary)]


def _reads_through(layer: LayerPlan, boundary: Boundary) -> bool:
    crossing = (boundary.tensor, boundary.forward, boundary.backward)
    return any(crossing == (each.tensor, each.forward, each.backward) for _, each in layer.inputs)


def _collectives(layers: Sequence[LayerPlan], plan: Plan) -> Iterator[Collective]:
    """Yield the collectives of the layers, and those that they share: of inputs, and of parts put together."""
    names = {layer.layer for layer in layers}
    gathered = {(each.layer, each.place) for each in plan.gatherings if names & {read.layer for read in each.reads}}
    shared = {
        (other, f"({boundary.tensor})")
        for layer in layers
        for _, boundary in layer.inputs
        for other in _sharing(layer, boundary, plan)
    }
    for collective in plan.collectives:
        place, _, tensor = collective.place.partition(" (")
        if (
            collective.layer in names
            or (collective.layer, collective.place) in gathered
            or (place.startswith("input") and (collective.layer, f"({tensor}") in shared)
        ):
            yield collective


# --- how else it could be planned ----------------------------------------------------------------------


def _choices(subject: Subject, known: Survey) -> list[Placements]:
    """Return the placements to try: each deciding variable sharded on each dim, then none of them sharded.

    Other weights of a contraction follow its main weight: they are sharded where they have the sharded label.
    """
    choices: list[Placements] = []
    for key in subject.deciding:
        if not known.variables[key].kept_whole:
            rank = len(known.variables[key].shape)
            choices += [{key: Shard(dim), **_followers(key, dim, known)} for dim in range(rank)]
    free = [key for key in subject.variables if not known.variables[key].kept_whole]
    whole = {key: Replicate() for key in [*free, *(follower for key in free for follower in _followers(key, 0, known))]}
    return [*choices, whole] if whole else choices


def _followers(key: str, dim: int, known: Survey) -> dict[str, Placement]:
    followers: dict[str, Placement] = {}
    for layer in known.layers.values():
        for _, contraction in layer.contractions:
            if contraction.main_weight == key:
                label = contraction.labels(key)[dim]
                found = {other: labels.find(label) for other, labels in contraction.weights if other != key}
                followers |= {other: Shard(at) if at >= 0 else Replicate() for other, at in found.items()}
    return followers


def _united(choices: Sequence[Sequence[Placements]]) -> list[Placements]:
    """Return the choices of equal subjects as if they were one."""
    return [
        {key: placement for part in parts for key, placement in part.items()} for parts in zip(*choices, strict=True)
    ]


def _try(
    choice: Placements,
    make: Callable[[Layout], Plan],
    layout: Layout,
    plan: Plan,
    subjects: Sequence[Subject],
) -> Alternative:
    paths = {variable.key: variable.path for variable in plan.variables}
    placements = tuple((key, str(placement)) for key, placement in choice.items())
    rules = [
        _rule(paths[variable.key], choice[variable.key], layout, len(variable.shape))
        for variable in plan.variables
        if variable.key in choice
    ]
    try:
        other = make(_with_rules(layout, rules))
    except PlanError as error:
        return Alternative(placements, (), (), None, "; ".join(error.problems))
    own = {name for subject in subjects for name in subject.layers}
    changed = compare_plans(plan, other).layers
    return Alternative(
        placements=placements,
        styles=tuple((layer_name(layer), layer.style, layer.reason) for layer in other.layers if layer.layer in own),
        changed=tuple(each.name for each in changed if each.name.partition(" [")[0] not in own),
        figures=figures_of(other),
        problem="",
    )


def _rule(path: str, placement: Placement, layout: Layout, rank: int) -> LayoutRule:
    dim = placement.dim if isinstance(placement, Shard) else None
    return LayoutRule(path, tuple(layout.mesh.model_axis if each == dim else None for each in range(rank)))


def _with_rules(layout: Layout, rules: Sequence[LayoutRule]) -> Layout:
    """Return the layout with rules for exact paths, which win over every pattern and replace an equal one."""
    patterns = {rule.pattern for rule in rules}
    return Layout(layout.mesh, (*(rule for rule in layout.rules if rule.pattern not in patterns), *rules))
