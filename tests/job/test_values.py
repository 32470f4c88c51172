"""What ranks tell each other: rank 0's values, whatever they are made of."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.workers import Pools
from tp_planner.job.values import of_rank_zero

# On the ranks


def told() -> tuple[Any, str]:
    rank = dist.get_rank()
    values = {
        "vector": np.arange(3.0) + rank,
        "scalar": np.float32(0.5 + rank),
        "tensor": torch.tensor([1.0, 2.0]) + rank,
        "nested": {"deep": [1 + rank, {"deeper": np.int64(rank)}]},
        "nan": math.nan,
        "text": f"rank {rank}",
        "own": lambda: rank,
    }
    answer = of_rank_zero("the test", values)
    own = answer.pop("own")()
    return answer, f"{own} {of_rank_zero('a flag', rank == 0)}"


# In the parent


def test_values_of_rank_zero(pools: Pools) -> None:
    """Arrays, scalars, nested dicts and what is no number are rank 0's; what cannot be told is each rank's own."""
    for rank, (answer, own) in enumerate(pools(2).run(told)):
        np.testing.assert_array_equal(answer.pop("vector"), [0.0, 1.0, 2.0])
        np.testing.assert_array_equal(answer.pop("tensor"), [1.0, 2.0])
        assert math.isnan(answer.pop("nan"))
        assert answer == {"scalar": 0.5, "nested": {"deep": [1, {"deeper": 0}]}, "text": "rank 0"}
        assert own == f"{rank} True"
