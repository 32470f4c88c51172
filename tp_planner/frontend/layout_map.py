"""Read a keras.distribution.LayoutMap into plain rules."""

from __future__ import annotations

from typing import Any

import keras

from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh


def read_layout_map(layout_map: Any) -> Layout:
    """Return the rules of a ``keras.distribution.LayoutMap`` and its device mesh as plain data.

    A ``Layout``, as ``read_layout_file(path).on(mesh)`` makes it, is that already. Raises PlanError for anything
    else, and for a map without a device mesh.
    """
    if isinstance(layout_map, Layout):
        return layout_map
    if not isinstance(layout_map, keras.distribution.LayoutMap):
        raise PlanError(
            f"expected a keras.distribution.LayoutMap, got {type(layout_map).__name__}; "
            f"a layout file is read by tp_planner.frontend.layout_file.read_layout_file(path).on(mesh)"
        )
    mesh = layout_map.device_mesh
    if mesh is None:
        raise PlanError(
            "the LayoutMap has no device mesh; make it with LayoutMap(DeviceMesh(shape, axis_names, devices))"
        )
    rules = tuple(LayoutRule(pattern, tuple(layout_map._layout_map[pattern].axes)) for pattern in layout_map)
    return Layout(read_device_mesh(mesh), rules)


def read_device_mesh(mesh: keras.distribution.DeviceMesh) -> Mesh:
    """Return axis names and sizes of a Keras device mesh."""
    return Mesh(tuple((str(name), int(size)) for name, size in zip(mesh.axis_names, mesh.shape, strict=True)))
