"""Honor output rules: layout keys of the form ``<layer path>/output``, which place activations."""

from __future__ import annotations

from collections.abc import Mapping

from tp_planner.ir.layout import LayoutRule
from tp_planner.passes.choose_styles import StyleChoice
from tp_planner.passes.resolve_rules import sharded_dim
from tp_planner.passes.walk.facts import Closings, LayerMode
from tp_planner.passes.walk.known import SEQUENCE


def honor_output_rules(
    outputs: Mapping[str, LayoutRule], styles: Mapping[LayerMode, StyleChoice], axis: str
) -> tuple[Closings, frozenset[str], tuple[str, ...]]:
    """Return what the rules on outputs ask for: closings, the layers that return shards of the residual stream, notes.

    A rule that keeps the output of a column-parallel layer whole ends the region there. One that shards the sequence,
    dim 1 of three or more, shards the stream there. Any other output is placed by what computes it: it is sharded where
    that is free and whole where it is not, and there is a note for each rule that changes nothing.
    """
    closings, notes = Closings(), []
    on_sequence = frozenset(
        layer for layer, rule in outputs.items() if sharded_dim(rule, axis) == SEQUENCE and len(rule.axes) > 2
    )
    for layer, rule in outputs.items():
        if layer in on_sequence:
            if not any(key[0] == layer and choice.is_contraction for key, choice in styles.items()):
                closings = closings.closing(("begin", (layer, "")), f"rule {rule} shards its output over the sequence")
            continue
        modes = [key for key, choice in styles.items() if key[0] == layer and choice.is_contraction]
        if sharded_dim(rule, axis) is None:
            for key in modes:
                closings = closings.closing(("layer", key), f"rule {rule} keeps its output whole")
        elif not modes:
            notes.append(
                f"layout rule {rule} asks to shard an output of {layer!r}; it is placed by the ops that make it"
            )
    return closings, on_sequence, tuple(notes)
