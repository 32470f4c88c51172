"""Which axis of a mesh is which, and where each rank lies."""

from __future__ import annotations

import pytest

from tp_planner.ir.mesh import Mesh, parse_mesh

# Mesh and the named batch axis: the batch axis, the axis of the layers, replicas.
ROLES = {
    ("model=4", None): (None, "model", 1),
    ("batch=1,model=4", None): (None, "model", 1),
    ("batch=4,model=1", None): (None, "batch", 1),
    ("batch=1,model=1", None): (None, "model", 1),
    ("batch=2,model=4", None): ("batch", "model", 2),
    ("model=4,batch=2", None): ("model", "batch", 4),  # the first axis, as in Keras
    ("model=4,batch=2", "batch"): ("batch", "model", 2),
    ("batch=4,model=1", "batch"): ("batch", "model", 4),
    ("batch=1,model=4", "batch"): ("batch", "model", 1),
    ("stage=1,batch=2,model=4", "batch"): ("batch", "model", 2),
    ("batch=4", "batch"): ("batch", "model", 4),
    ("model=4", "model"): ("model", "layers", 4),
}


@pytest.mark.parametrize(("text", "batch_axis"), ROLES)
def test_roles_of_axes(text: str, batch_axis: str | None) -> None:
    mesh = parse_mesh(text).across(batch_axis)
    assert (mesh.batch_axis, mesh.model_axis, mesh.replicas) == ROLES[text, batch_axis]


def test_a_batch_axis_that_is_named_anew_means_the_same() -> None:
    mesh = parse_mesh("batch=2,model=4")
    named = mesh.across(mesh.batch_axis)
    assert named.across("batch") == named
    assert (named.batch_axis, named.model_axis) == (mesh.batch_axis, mesh.model_axis)


def test_coordinates_count_along_the_last_axis_first() -> None:
    mesh = Mesh((("batch", 2), ("stage", 1), ("model", 3)))
    places = [(mesh.coordinate(rank, "batch"), mesh.coordinate(rank, "model")) for rank in range(mesh.size)]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert {mesh.coordinate(rank, "stage") for rank in range(mesh.size)} == {0}
