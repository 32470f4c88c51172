"""Which axis of a layout's mesh the batch is split over, where nobody says it."""

from __future__ import annotations

import pytest

from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import parse_mesh

# Mesh and the axes that rules name: the batch axis, the axis of the layers.
ROLES = {
    ("batch=2,model=1", ("model",)): ("batch", "model"),
    ("data=2,tensor=1", ("tensor",)): ("data", "tensor"),
    ("data=2,tensor=1", ("data", "tensor")): (None, "data"),
    ("batch=8,model=1", ("model", "batch")): ("batch", "model"),  # KerasHub's maps
    ("batch=8,model=1", ("batch",)): (None, "batch"),
    ("batch=1,model=8", ("model", "batch")): (None, "model"),
    ("batch=8,model=1", ()): (None, "batch"),
    ("model=2,batch=2", ("model",)): ("batch", "model"),
    ("tensor=2,data=2", ("tensor",)): ("data", "tensor"),
    ("tensor=2,data=2", ("tensor", "data")): ("tensor", "data"),  # the first axis, as in Keras
    ("batch=2,model=2", ("batch",)): ("batch", "model"),
    ("batch=2", ("batch",)): (None, "batch"),
    ("batch=2,model=1", ("stage",)): (None, "batch"),  # an axis that the mesh has not
}


@pytest.mark.parametrize(("text", "named"), ROLES)
def test_the_axis_that_rules_leave_to_the_batch(text: str, named: tuple[str, ...]) -> None:
    layout = Layout(parse_mesh(text), tuple(LayoutRule(axis, (None, axis)) for axis in named))
    assert (layout.mesh.batch_axis, layout.mesh.model_axis) == ROLES[text, named]
    assert Layout(layout.mesh, ()).mesh == layout.mesh or layout.mesh.split is None


def test_a_rule_names_axes_of_dims_that_two_axes_cut() -> None:
    layout = Layout(parse_mesh("data=2,tensor=2"), (LayoutRule("kernel", (("tensor",), None)),))
    assert (layout.mesh.batch_axis, layout.mesh.model_axis) == ("data", "tensor")


def test_a_batch_axis_that_is_named_wins() -> None:
    layout = Layout(parse_mesh("batch=2,model=1"), (LayoutRule("kernel", ("model",)),)).across("model")
    assert (layout.mesh.batch_axis, layout.mesh.model_axis) == ("model", "batch")
