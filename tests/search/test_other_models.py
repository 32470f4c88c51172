"""Models as other people write them: what is found for them is what the program says, and trains as one device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import pytest

from tests.models import usual
from tests.search.other_models import OTHERS
from tests.search.test_found_models import assert_trains_as_one_device, fast_links, found_for
from tests.test_parity import make_batches
from tests.workers import Pools
from tp_planner.ir.mesh import Mesh
from tp_planner.planner import make_plan
from tp_planner.search.find import _Planner, search

QUICK = {"universal", "cross_network", "graph_network"}
# By how much program and plan differ: more where planning stores in parts what it then gathers, for one.
ERRORS = dict.fromkeys(OTHERS, 1e-3) | {"cross_network": 0.01, "sequences": 0.01, "video": 0.015}


@pytest.mark.parametrize("name", usual(OTHERS, QUICK))
def test_the_program_says_what_the_plan_costs(name: str) -> None:
    found = found_for(OTHERS[name])
    assert any(variable.is_sharded for variable in found.best.proven.plan.variables)
    assert abs(found.error) < ERRORS[name]
    assert found.gap is not None
    assert found.gap < 1e-6
    assert found.cost < found.whole.cost


@pytest.mark.parametrize("name", usual(["cross_network", "experts"], {"cross_network"}))
def test_what_replicas_average_is_priced(name: str) -> None:
    """A gradient in shards is joined and divided in less time: the more so the less there is to compute."""
    case = OTHERS[name]
    inputs, mesh = make_batches(case)[0][0], Mesh((("batch", 2), ("model", 2)))
    found = search(case.build("float64"), mesh, fast_links(), inputs, keras.optimizers.AdamW())
    assert abs(found.error) < ERRORS[name]
    assert found.gap is not None
    assert found.gap < 1e-6


@pytest.mark.slow
def test_a_region_that_plans_end_again_and_again_is_left() -> None:
    """How biases are stored that are gathered makes no other region: all plans of the search were spent on them."""
    found = found_for(OTHERS["sequences"], 4)
    assert found.cost < 0.6 * found.whole.cost
    assert found.gap is not None
    assert found.gap < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_found_layout_trains_as_one_device(pools: Pools, name: str) -> None:
    case = OTHERS[name]
    inputs, _ = make_batches(case)[0]
    assert_trains_as_one_device(pools(2), case, make_plan(case.build("float64"), found_for(case).layout, inputs))


def test_reshapes_that_guess_the_batch_are_given_sizes_of_shards() -> None:
    """Of heads side by side; only a layer after it would see that there are more batches than there were."""
    plan = found_for(OTHERS["graph_network"]).plan
    attention = next(layer for layer in plan.layers if layer.layer == "attention")
    assert any(use.variable == "attention/kernel" for use in attention.uses)
    assert all(use.boundary.forward.collective is None for use in attention.uses)


def test_nothing_sharded_is_found_where_all_that_is_planned_is_dearer(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = _Planner.candidate

    def dearer(self: _Planner, *args: Any) -> Any:
        candidate = planned(self, *args)
        shards = any(variable.is_sharded for variable in candidate.plan.variables)
        return replace(candidate, cost=3 * candidate.cost) if shards else candidate

    monkeypatch.setattr(_Planner, "candidate", dearer)
    found = found_for(OTHERS["cross_network"])
    assert found.cost == found.whole.cost
    assert found.bound is not None
    assert found.bound <= found.cost
    assert all(each.cost > found.cost for each in found.runners_up)
