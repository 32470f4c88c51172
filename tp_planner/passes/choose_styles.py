"""Choose styles: from the dim that is sharded and what the layer contracts, how the layer is computed.

The rule is one for all layers. Let label l be sharded. A tensor that carries l is used as shards of that dim;
a tensor that does not is used whole, and its gradient is a sum over the ranks. The output carries l
(column-parallel) or is itself a sum over the ranks (row-parallel).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tp_planner.ir.contraction import Contraction, label_dim
from tp_planner.ir.graph import LayerInfo, VariableInfo
from tp_planner.ir.placement import Placement, Replicate, Shard, divides
from tp_planner.ir.plan import Style


@dataclass(frozen=True, slots=True)
class StyleChoice:
    """The style of one mode of one layer; ``label`` is the contraction label that is sharded, if any."""

    style: Style
    reason: str
    contraction: Contraction | None = None
    label: str | None = None

    @property
    def is_contraction(self) -> bool:
        return self.label is not None


def choose_styles(
    layers: Mapping[str, LayerInfo],
    variables: Mapping[str, VariableInfo],
    placements: Mapping[str, Placement],
    parts: int,
) -> dict[tuple[str, str], StyleChoice]:
    """Return the style of each (layer, mode) that has a sharded variable."""
    styles: dict[tuple[str, str], StyleChoice] = {}
    for layer in layers.values():
        contractions = layer.contractions or (("", None),)
        for mode, contraction in contractions:
            names = tuple(key for key, _ in contraction.weights) if contraction else layer.variables
            if any(placements[key] != Replicate() for key in names):
                styles[layer.name, mode] = _choose(layer, contraction, names, variables, placements, parts)
    return styles


def _choose(
    layer: LayerInfo,
    contraction: Contraction | None,
    names: tuple[str, ...],
    variables: Mapping[str, VariableInfo],
    placements: Mapping[str, Placement],
    parts: int,
) -> StyleChoice:
    uneven = [key for key in names if not divides(variables[key].shape, placements[key], parts)]
    if uneven:
        shape = variables[uneven[0]].shape
        return StyleChoice("gathered", f"{uneven[0]!r} of shape {shape} does not divide evenly by {parts}")
    if contraction is None:
        return StyleChoice("elementwise", f"{layer.class_name} is planned from the ops it runs")
    return style_of_contraction(contraction, placements)


def style_of_contraction(contraction: Contraction, placements: Mapping[str, Placement]) -> StyleChoice:
    """Return the style of a contraction whose weights are placed so, in shards of whatever sizes."""
    main = placements[contraction.main_weight]
    if not isinstance(main, Shard):
        return StyleChoice("gathered", f"its main weight {contraction.main_weight!r} is whole on every rank")
    label = contraction.labels(contraction.main_weight)[main.dim]
    return _style_of_label(contraction, label)


def _style_of_label(contraction: Contraction, label: str) -> StyleChoice:
    comes_in, comes_out = label in contraction.input, label in contraction.output
    if contraction.lookup and not comes_out:
        return StyleChoice(
            "vocabulary", "the looked-up dim is sharded: each rank looks up its rows", contraction, label
        )
    if comes_out and not comes_in:
        return StyleChoice("column", "an output dim of the weight is sharded", contraction, label)
    if comes_in and comes_out:
        return StyleChoice("batched", "a dim that input, weight and output share is sharded", contraction, label)
    if contraction.nonlinear:
        return StyleChoice("gathered", "a contracted dim is sharded, but the layer is not linear after the contraction")
    return StyleChoice("row", "a contracted dim of the weight is sharded", contraction, label)


@dataclass(frozen=True, slots=True)
class WeightUse:
    """How a contraction uses a weight: as this placement, with a gradient that is whole, sharded or a sum."""

    placement: Placement
    gradient_is_partial: bool


def weight_uses(choice: StyleChoice) -> dict[str, WeightUse]:
    """Return how a layer of this style uses each of its weights."""
    assert choice.contraction is not None and choice.label is not None
    uses = {}
    for key, labels in choice.contraction.weights:
        dim = labels.find(choice.label)
        added_after_sum = key == choice.contraction.bias and choice.label not in choice.contraction.output
        if dim >= 0:
            uses[key] = WeightUse(Shard(dim), False)
        else:
            uses[key] = WeightUse(Replicate(), gradient_is_partial=not added_after_sum)
    return uses


def input_placement(choice: StyleChoice, ndim: int) -> Placement:
    """Return the placement in which a layer of this style takes its input of ``ndim`` dims."""
    assert choice.contraction is not None and choice.label is not None
    dim = label_dim(choice.contraction.input, choice.label, ndim)
    return Replicate() if dim is None else Shard(dim)


def output_dim(choice: StyleChoice, ndim: int) -> int | None:
    """Return the dim of the output of ``ndim`` dims that is sharded; None where the output is a sum."""
    assert choice.contraction is not None and choice.label is not None
    return label_dim(choice.contraction.output, choice.label, ndim)
