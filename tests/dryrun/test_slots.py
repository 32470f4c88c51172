"""Slots: memory and work of a step do not tell that one slot takes the place of others that are stored alike."""

from __future__ import annotations

from typing import Any

import keras
import pytest

from tests.models import CASES
from tp_planner.dryrun import slots
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.planner import make_plan


@pytest.mark.parametrize(
    ("zero", "options"), [(0, {"gradient_accumulation_steps": 2, "global_clipnorm": 1.0}), (1, {})]
)
def test_a_step_takes_the_same_where_each_variable_has_slots_of_its_own(
    monkeypatch: pytest.MonkeyPatch, zero: int, options: dict[str, Any]
) -> None:
    case = CASES["gpt"]
    rules = tuple(LayoutRule(pattern, axes) for pattern, axes in case.rules.items())
    layout = Layout(Mesh((("batch", 2), ("model", 2))), rules, zero=zero)
    model, made = case.build(), keras.optimizers.Adam(**options)
    shared = make_plan(model, layout, optimizer=made)
    monkeypatch.setattr(slots, "is_elementwise", lambda optimizer: False)
    assert make_plan(model, layout, optimizer=made).to_json() == shared.to_json()
