"""A plan as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from tp_planner.ir.placement import Shard
from tp_planner.ir.plan import LayerPlan, Plan


def plan_to_text(plan: Plan) -> str:
    """Return the plan as text for a terminal: layers with variables, collectives, what was noted."""
    variables = {variable.key: variable for variable in plan.variables}
    lines = [
        f"Plan for {plan.model!r} on mesh ({plan.mesh}): layers are split over {plan.axis!r}, {plan.axis_size} ranks",
        f"traced with inputs {', '.join(f'{shape} {dtype}' for shape, dtype in plan.inputs)}",
        "",
    ]
    rows = [("layer", "style", "variable", "shape", "stored", "per rank")]
    owned: set[str] = set()
    for layer in plan.layers:
        head = (layer.layer + (f" [{layer.mode}]" if layer.mode else ""), layer.style)
        keys = [key for key in variables if key not in owned and _belongs(key, layer)]
        for key in keys:
            variable = variables[key]
            owned.add(key)
            rows.append(
                (*head, variable.path.split("/")[-1], _shape(variable.shape), str(variable.placement), _shape(variable.local_shape))
            )
            head = ("", "")
        if not keys:
            rows.append((*head, "", "", "", ""))
    lines += _table(rows)
    lines += ["", "reasons"]
    lines += [f"  {layer.layer}{f' [{layer.mode}]' if layer.mode else ''}: {layer.reason}" for layer in plan.layers if layer.style != "replicated"]
    lines += ["", f"collectives of one training step: {len(plan.collectives)}"]
    rows = [("phase", "collective", "layer", "where", "bytes")]
    rows += [(c.phase, c.kind, c.layer, c.place, str(c.bytes)) for c in plan.collectives]
    lines += _table(rows) if plan.collectives else []
    lines += ["", *_stored(plan)]
    if plan.notes:
        lines += ["", "notes", *(f"  {note}" for note in plan.notes)]
    return "\n".join(lines) + "\n"


def _belongs(key: str, layer: LayerPlan) -> bool:
    return key.rpartition("/")[0] == layer.path or any(use.variable == key for use in layer.uses)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _stored(plan: Plan) -> list[str]:
    whole = sum(_bytes(v.shape, v.itemsize) for v in plan.variables)
    local = sum(_bytes(v.local_shape, v.itemsize) for v in plan.variables)
    sharded = sum(isinstance(v.placement, Shard) for v in plan.variables)
    return [
        f"variables: {len(plan.variables)}, {sharded} of them sharded",
        f"bytes of variables: {whole} in the model, {local} on rank 0",
    ]


def _bytes(shape: Sequence[int], itemsize: int) -> int:
    for length in shape:
        itemsize *= length
    return itemsize


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
