"""tp_planner: plan and apply tensor parallelism for Keras models on PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tp_planner.api import no_sync, parallelize, plan, record, restore
    from tp_planner.checkpoints.callback import Checkpoint
    from tp_planner.checkpoints.initial import deferred_init
    from tp_planner.checkpoints.progress import Progress
    from tp_planner.checkpoints.saving import load_checkpoint, save_checkpoint
    from tp_planner.ir.contract import Recording
    from tp_planner.ir.errors import ContractError, ParallelRuntimeError, PlanError, TpPlannerError
    from tp_planner.ir.finding import Finding
    from tp_planner.keras_distribution.install import disable_keras_distribution, enable_keras_distribution
    from tp_planner.linter import lint
    from tp_planner.readable_plan import Plan
    from tp_planner.search.door import find_layout
    from tp_planner.search.found import Found
    from tp_planner.training.stored import Verification, verify_model_parallel
    from tp_planner.verification.in_job import verify_step
    from tp_planner.verification.readable import Verdict
    from tp_planner.verification.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "ContractError",
    "Finding",
    "Found",
    "ParallelRuntimeError",
    "Plan",
    "PlanError",
    "Progress",
    "Recording",
    "TpPlannerError",
    "Verdict",
    "Verification",
    "deferred_init",
    "disable_keras_distribution",
    "enable_keras_distribution",
    "find_layout",
    "lint",
    "load_checkpoint",
    "no_sync",
    "parallelize",
    "plan",
    "record",
    "restore",
    "save_checkpoint",
    "verify",
    "verify_model_parallel",
    "verify_step",
]

_HOMES = {
    "Checkpoint": "tp_planner.checkpoints.callback",
    "ContractError": "tp_planner.ir.errors",
    "Finding": "tp_planner.ir.finding",
    "Found": "tp_planner.search.found",
    "ParallelRuntimeError": "tp_planner.ir.errors",
    "Plan": "tp_planner.readable_plan",
    "PlanError": "tp_planner.ir.errors",
    "Progress": "tp_planner.checkpoints.progress",
    "Recording": "tp_planner.ir.contract",
    "TpPlannerError": "tp_planner.ir.errors",
    "Verdict": "tp_planner.verification.readable",
    "Verification": "tp_planner.training.stored",
    "deferred_init": "tp_planner.checkpoints.initial",
    "disable_keras_distribution": "tp_planner.keras_distribution.install",
    "enable_keras_distribution": "tp_planner.keras_distribution.install",
    "find_layout": "tp_planner.search.door",
    "lint": "tp_planner.linter",
    "load_checkpoint": "tp_planner.checkpoints.saving",
    "no_sync": "tp_planner.api",
    "parallelize": "tp_planner.api",
    "plan": "tp_planner.api",
    "record": "tp_planner.api",
    "restore": "tp_planner.api",
    "save_checkpoint": "tp_planner.checkpoints.saving",
    "verify": "tp_planner.verification.verify",
    "verify_model_parallel": "tp_planner.training.stored",
    "verify_step": "tp_planner.verification.in_job",
}


def __getattr__(name: str) -> Any:
    # Keras and torch are imported at first use: `tp-planner --help` is quick, plans can be read without either,
    # and the command line can still choose Keras's backend.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        raise ModuleNotFoundError(
            "Keras looks for TensorFlow, its default; set KERAS_BACKEND=torch in the environment before Python starts, "
            "or os.environ['KERAS_BACKEND'] = 'torch' before the first import of keras or tp_planner",
            name=error.name,
        ) from None


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
