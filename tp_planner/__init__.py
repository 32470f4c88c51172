"""tp_planner: plan and apply tensor parallelism for Keras models on PyTorch."""

from tp_planner.api import parallelize, plan, restore
from tp_planner.ir.errors import ParallelRuntimeError, PlanError, TpPlannerError
from tp_planner.ir.plan import Plan
from tp_planner.runtime.verify import Verification, verify_model_parallel

__version__ = "0.1.0"

__all__ = [
    "ParallelRuntimeError",
    "Plan",
    "PlanError",
    "TpPlannerError",
    "Verification",
    "parallelize",
    "plan",
    "restore",
    "verify_model_parallel",
]
