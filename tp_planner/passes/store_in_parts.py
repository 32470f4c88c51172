"""Store in parts: replicas store parts of weights that no rule cuts over the batch axis, and put them together for use.

That is the third stage of ZeRO (https://arxiv.org/abs/1910.02054), as FSDP has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace

from tp_planner.ir.graph import VariableInfo
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.placement import WHOLE, Shard, divides, local_shape, smallest_parts
from tp_planner.passes.resolve_rules import Resolution, Resolved


def store_in_parts(
    resolution: Resolution, variables: Mapping[str, VariableInfo], mesh: Mesh, state: Set[str]
) -> Resolution:
    """Return what was resolved, with weights in parts over the batch axis.

    Args:
        resolution: what rules say.
        variables: the model's, by key.
        mesh: the mesh.
        state: variables that layers keep for themselves, and are no weights: they stay as they are.
    """
    if mesh.replicas == 1:
        return resolution
    resolved = {
        key: each if key in state else _in_parts(each, variables[key], mesh)
        for key, each in resolution.variables.items()
    }
    return replace(resolution, variables=resolved)


def _in_parts(resolved: Resolved, variable: VariableInfo, mesh: Mesh) -> Resolved:
    if variable.kept_whole or "float" not in variable.dtype or resolved.batch_placement != WHOLE:
        return resolved
    placed, ranks = resolved.placement, mesh.axis_size(mesh.model_axis)
    # A dim of which ranks hold unequal shards may be shorter than its replicas on some of them.
    unequal = placed.dim if isinstance(placed, Shard) and not divides(variable.shape, placed, ranks) else None
    cut = smallest_parts(local_shape(variable.shape, placed, ranks), mesh.replicas, but=unequal)
    if cut == WHOLE:
        reason = f"{resolved.reason}; whole on each replica: no dim has an element for each of {mesh.replicas}"
        return replace(resolved, reason=reason)
    stored = f"stored in {mesh.replicas} parts over {mesh.batch_axis!r}, put together for use"
    return replace(resolved, batch_placement=cut, reason=f"{resolved.reason}; {stored}")
