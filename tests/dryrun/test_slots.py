"""Slots: memory and work of a step do not tell that one slot takes the place of others that are stored alike."""

from __future__ import annotations

import keras
import pytest

from tests.models import CASES
from tp_planner.dryrun import slots
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.planner import make_plan


@pytest.mark.parametrize("zero", [0, 1])
def test_a_step_takes_the_same_where_each_variable_has_slots_of_its_own(
    monkeypatch: pytest.MonkeyPatch, zero: int
) -> None:
    case = CASES["gpt"]
    rules = tuple(LayoutRule(pattern, axes) for pattern, axes in case.rules.items())
    layout = Layout(Mesh((("batch", 2), ("model", 2))), rules, zero=zero)
    model, made = case.build(), keras.optimizers.Adam()
    shared = make_plan(model, layout, optimizer=made)
    monkeypatch.setattr(slots, "updates_all_at_once", lambda optimizer: False)
    assert make_plan(model, layout, optimizer=made).to_json() == shared.to_json()
