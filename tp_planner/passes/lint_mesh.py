"""Lint a mesh: what its axes and its replicas tell, whatever the rules say of layers."""

from __future__ import annotations

from collections.abc import Iterator

from tp_planner.ir.finding import Finding, count_of, some_of
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.placement import WHOLE
from tp_planner.ir.plan import Plan


def lint_replicas(plan: Plan) -> Iterator[Finding]:
    """Yield where what ``zero`` asks for does not happen."""
    if plan.zero and plan.replicas == 1:
        yield Finding(
            "one-replica",
            "warning",
            f"zero={plan.zero} stores in parts over the replicas, and on mesh ({plan.mesh}) there is one: the batch is "
            f"split over no axis",
            f"give the mesh an axis for the batch, for example batch=2,{plan.axis}={plan.axis_size}",
        )
    elif plan.zero:
        yield from _whole_on_replicas(plan)


def _whole_on_replicas(plan: Plan) -> Iterator[Finding]:
    whole = [
        each
        for each in plan.variables
        if each.trainable and "float" in each.dtype and each.batch_placement == each.slot_placement == WHOLE
    ]
    if whole:
        does = "updates" if plan.zero == 1 else "stores"
        paths = tuple(each.path for each in whole)
        yield Finding(
            "not-in-parts",
            "info",
            f"zero={plan.zero} leaves {count_of(len(whole), 'variable')} whole, {some_of(paths)}, which each replica "
            f"{does}: {whole[0].reason.rpartition(': ')[2]}",
            paths=paths,
        )


def lint_nodes(mesh: Mesh, devices_per_node: int) -> Iterator[Finding]:
    """Yield whether ranks that split layers are on several nodes of so many devices, in the order of the mesh."""
    axis, size = mesh.model_axis, mesh.axis_size(mesh.model_axis)
    if not any(_crosses(mesh, rank, devices_per_node) for rank in range(mesh.size)):
        return
    others = [(name, each) for name, each in mesh.axes if name != axis]
    fitting = max(each for each in range(1, devices_per_node + 1) if size % each == devices_per_node % each == 0)
    if size == fitting:
        advice = f"put it last, so that its ranks are neighbours: {Mesh((*others, (axis, size)))}"
    else:
        split = [(name, each * (size // fitting if name == mesh.batch_axis else 1)) for name, each in others]
        split = split if mesh.batch_axis else [("batch", size // fitting), *split]
        advice = f"split layers over the devices of one node: {Mesh((*split, (axis, fitting)))}"
    yield Finding(
        "crosses-nodes",
        "warning",
        f"mesh ({mesh}) has ranks that share layers over {axis!r} on several nodes of {devices_per_node} devices: what "
        f"each layer communicates crosses the links between nodes, many times slower than those within one",
        advice,
    )


def _crosses(mesh: Mesh, rank: int, devices_per_node: int) -> bool:
    """Whether a rank and the first one of its group on the model axis are on different nodes."""
    following = mesh.axes[mesh.names.index(mesh.model_axis) + 1 :]
    stride = 1
    for _, size in following:
        stride *= size
    first = rank - stride * mesh.coordinate(rank, mesh.model_axis)
    return first // devices_per_node != rank // devices_per_node
