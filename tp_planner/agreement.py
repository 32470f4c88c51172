"""What ranks agree on before a model is changed on any of them: the mesh, the inputs to plan for, and the plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import keras

from tp_planner.frontend.inputs import CallArguments
from tp_planner.ir.errors import PlanError
from tp_planner.ir.mesh import Mesh
from tp_planner.job.rendezvous import exchange
from tp_planner.readable_plan import Plan


def agree_on_mesh(mesh: Mesh) -> None:
    """Raise PlanError on all ranks unless they have the same mesh, for which process groups are made together."""
    mine = f"({mesh})" + (f", the batch over {mesh.batch_axis!r}" if mesh.batch_axis else "")
    answers = exchange("tp_planner.parallelize", mine)
    if len(set(answers)) > 1:
        meshes = "; ".join(f"rank {rank}: {answer}" for rank, answer in enumerate(answers))
        raise PlanError(f"ranks have different meshes ({meshes}); give all of them the same")


def as_on_rank_zero(inputs: Any, mesh: Mesh) -> Any:
    """Return the inputs as rank 0 has them, for which all ranks plan: replicas may have shares of different sizes.

    Raises PlanError on all ranks if two of one replica have different inputs.
    """
    arguments = CallArguments.of(inputs)
    mine = [[list(leaf.shape), keras.backend.standardize_dtype(leaf.dtype)] for leaf in arguments.tensors]
    all_specs = [json.loads(text) for text in exchange("the inputs of tp_planner.parallelize", json.dumps(mine))]
    _require_alike_in_replicas(all_specs, mesh)
    first = all_specs[0]
    if len(first) != len(mine):
        return inputs  # ranks will make different plans, and hear of it
    specs = iter([keras.InputSpec(shape=tuple(shape), dtype=dtype) for shape, dtype in first])
    return arguments.map(lambda leaf: next(specs))


def _require_alike_in_replicas(all_specs: list[Any], mesh: Mesh) -> None:
    firsts: dict[int, int] = {}  # the first rank of each replica
    for rank, specs in enumerate(all_specs):
        replica = 0 if mesh.batch_axis is None else mesh.coordinate(rank, mesh.batch_axis)
        first = firsts.setdefault(replica, rank)
        if specs != all_specs[first]:
            words = "; ".join(f"rank {each}: {_words(all_specs[each])}" for each in (first, rank))
            raise PlanError(
                f"ranks {first} and {rank} hold parts of one replica and were given different inputs ({words}); "
                f"give all ranks of a replica the same data"
            )


def _words(specs: list[Any]) -> str:
    return ", ".join(f"{tuple(shape)} {dtype}" for shape, dtype in specs)


def agree(choose: Callable[[], Plan]) -> Plan:
    """Return the plan that all ranks chose; if one could not, or they differ, all raise PlanError."""
    try:
        chosen = choose()
    except PlanError as refusal:
        exchange("tp_planner.parallelize", f"problem {refusal}")
        raise
    answers = exchange("tp_planner.parallelize", f"plan {chosen.hash}")
    for rank, answer in enumerate(answers):
        if answer.startswith("problem "):
            raise PlanError(f"rank {rank} cannot parallelize the model: {answer.removeprefix('problem ')}")
    if len(set(answers)) > 1:
        hashes = ", ".join(f"rank {rank}: {answer.removeprefix('plan ')[:12]}" for rank, answer in enumerate(answers))
        raise PlanError(
            f"ranks made different plans ({hashes}); build the same model with the same layout on all of them"
        )
    return chosen
