"""What is wrong with rules is said once for all equal variables."""

from __future__ import annotations

import keras

from tests.models import CASES
from tp_planner.frontend.survey import survey
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.passes.check_rules import check_rules
from tp_planner.passes.resolve_rules import resolve_rules


def problems(*rules: LayoutRule) -> list[str]:
    layers, variables = survey(CASES["gpt"].build(blocks=4))
    layout = Layout(Mesh((("model", 2),)), rules)
    return [
        finding.text for finding in check_rules(layout, variables, {name: each.path for name, each in layers.items()})
    ]


def test_one_wrong_rule_is_one_problem() -> None:
    """Of equal blocks all are named at once, whether a rule has too many entries or too many rules match."""
    rank = LayoutRule("block_[0-9]+_up/kernel", ("model",))
    one, other = LayoutRule("block_[0-9]+_up/bias", ("model",)), LayoutRule("block_.*_up/bias", ("model",))
    assert problems(rank, one, other) == [
        "variable 'block_[0-3]_up/bias' matches 2 layout rules: 'block_[0-9]+_up/bias', 'block_.*_up/bias'; "
        "make each path match at most one",
        "layout rule 'block_[0-9]+_up/kernel' -> (model) has 1 entries, variable 'block_[0-3]_up/kernel' of shape "
        "(32, 128) has 2 dims; write one entry per dim",
    ]


def test_rules_that_match_nothing_are_counted() -> None:
    """Twenty are named, with what is closest, and the rest is a number."""
    found = problems(*(LayoutRule(f"nothing_{number}", ("model",)) for number in range(1000)))
    assert len(found) == 21
    assert found[-1] == "980 more layout rules match no variable; mend those above first"


def test_rules_that_name_states_in_vain_are_one_note() -> None:
    """The states of equal layers stay whole for one reason, which is said once."""
    x = y = keras.Input((4,))
    for number in range(12):
        y = keras.layers.Dropout(0.5, name=f"drop_{number}")(y)
    layers, variables = survey(keras.Model(x, y))
    layout = Layout(Mesh((("model", 2),)), (LayoutRule("drop_.*", ("model",)),))
    found = resolve_rules(layout, variables, {name: each.path for name, each in layers.items()})
    assert found.notes == (
        "variable 'drop_[0-11]/seed_generator_state' is named by layout rule 'drop_.*' but stays whole: "
        "int32 state is kept whole on every rank",
    )
