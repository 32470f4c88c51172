"""Read a keras.distribution.LayoutMap into plain rules."""

from __future__ import annotations

from typing import Any, cast

import keras

from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import DeviceType, Layout, LayoutRule, Zero
from tp_planner.ir.mesh import Mesh

_DEVICE_TYPES: dict[str, DeviceType] = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}


def read_layout_map(layout_map: Any) -> Layout:
    """Return the rules of a ``keras.distribution.LayoutMap`` and its device mesh as plain data.

    A ``Layout``, as ``read_layout_file(path).on(mesh)`` makes it, is that already. Of a LayoutMap the attributes
    ``sequence_parallel``, ``gather_again``, ``gathers_ahead`` and ``zero`` count too, which users set where Keras has
    no argument. Raises PlanError for anything else, for a map without a device mesh, and for a mesh of CPUs and CUDA
    devices together.
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
    return Layout(
        read_device_mesh(mesh),
        rules,
        device_type_of(mesh),
        sequence_parallel=bool(getattr(layout_map, "sequence_parallel", False)),
        gather_again=bool(getattr(layout_map, "gather_again", True)),
        gathers_ahead=int(getattr(layout_map, "gathers_ahead", 1)),
        zero=read_zero(getattr(layout_map, "zero", 0)),
    )


def read_zero(stage: Any) -> Zero:
    """Return a stage of ZeRO; raise PlanError for what is none that there is."""
    if type(stage) is int and stage in (0, 1, 3):
        return cast(Zero, stage)
    raise PlanError(
        f"zero is {stage!r}; it is 1 for optimizer state in parts, and the gradients that it takes, 3 for weights in "
        f"parts too, 0 for neither"
    )


def read_device_mesh(mesh: keras.distribution.DeviceMesh) -> Mesh:
    """Return axis names and sizes of a Keras device mesh."""
    return Mesh(tuple((str(name), int(size)) for name, size in zip(mesh.axis_names, mesh.shape, strict=True)))


def device_type_of(mesh: keras.distribution.DeviceMesh) -> DeviceType | None:
    """Return what the devices of a Keras mesh are, by their names ("cpu:0", "gpu:1", "cuda:1"); None for others.

    Raises PlanError where some are CPUs and some are CUDA devices.
    """
    names = [str(device) for device in mesh.devices.flatten()]
    kinds = {_DEVICE_TYPES.get(name.partition(":")[0].lower()) for name in names}
    if kinds == {"cpu", "cuda"}:
        raise PlanError(f"the mesh has CPUs and CUDA devices ({', '.join(names)}); a mesh has devices of one type")
    return kinds.pop() if len(kinds) == 1 else None
