"""Honor output rules: layout keys of the form ``<layer path>/output``, which place activations."""

from __future__ import annotations

from collections.abc import Mapping

from tp_planner.ir.layout import LayoutRule
from tp_planner.passes.choose_styles import StyleChoice
from tp_planner.passes.resolve_rules import sharded_dim
from tp_planner.passes.walk.facts import Closings, LayerMode


def honor_output_rules(
    outputs: Mapping[str, LayoutRule], styles: Mapping[LayerMode, StyleChoice], axis: str
) -> tuple[Closings, tuple[str, ...]]:
    """Return the closings that the rules on outputs ask for, and a note for each rule that changes nothing.

    A rule that keeps the output of a column-parallel layer whole ends the region there. Any other output is
    placed by what computes it: it is sharded where that is free and whole where it is not.
    """
    closings, notes = Closings(), []
    for layer, rule in outputs.items():
        modes = [key for key, choice in styles.items() if key[0] == layer and choice.is_contraction]
        if sharded_dim(rule, axis) is None:
            for key in modes:
                closings = closings.closing(("layer", key), f"rule {rule} keeps its output whole")
        elif not modes:
            notes.append(
                f"layout rule {rule} asks to shard an output of {layer!r}; it is placed by the ops that make it"
            )
    return closings, tuple(notes)
