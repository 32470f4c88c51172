"""Share updates: of what every replica stores whole, each updates a part, so that an optimizer's slots are in parts.

That is the first stage of ZeRO (https://arxiv.org/abs/1910.02054), and the second: of the mean of the gradients, too, a
replica has its part alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tp_planner.ir.placement import WHOLE, Shard, divides, smallest_parts
from tp_planner.ir.plan import VariablePlan


def share_updates(
    variables: Sequence[VariablePlan], ranks: int, replicas: int, whole: Mapping[str, str]
) -> tuple[VariablePlan, ...]:
    """Return the decisions about variables, those of which each replica updates a part marked so, with the reason.

    Args:
        variables: what is stored where.
        ranks: the size of the model axis.
        replicas: how many there are.
        whole: variables that cannot be updated in parts, by key, and why.
    """
    return tuple(_shared(each, ranks, replicas, whole.get(each.key, "")) for each in variables)


def _shared(variable: VariablePlan, ranks: int, replicas: int, why_whole: str) -> VariablePlan:
    if not (variable.trainable and "float" in variable.dtype) or variable.batch_placement != WHOLE:
        return variable
    placed = variable.placement
    # A dim of which ranks hold unequal shards may be shorter than its replicas on some of them.
    unequal = placed.dim if isinstance(placed, Shard) and not divides(variable.shape, placed, ranks) else None
    cut = smallest_parts(variable.local_shape, replicas, but=unequal)
    if cut == WHOLE:
        why_whole = why_whole or f"no dim has an element for each of {replicas}"
    if why_whole:
        return replace(variable, reason=f"{variable.reason}; each replica updates the whole: {why_whole}")
    reason = f"{variable.reason}; each of {replicas} replicas updates a part"
    return replace(variable, slot_placement=cut, reason=reason)
