"""Random numbers that agree: all ranks continue from rank 0's state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tp_planner.job.process_group import this_device


def share_random_state() -> None:
    """Continue on all ranks from rank 0's random state, so that replicated dropout masks and data order agree."""
    state: list[Any] = [None]
    if dist.get_rank() == 0:
        cuda = torch.cuda.get_rng_state() if this_device().type == "cuda" else None
        state = [(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())]
    dist.broadcast_object_list(state, 0, device=this_device())
    cpu, cuda, numpy_state, python_state = state[0]
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
    np.random.set_state(numpy_state)
    random.setstate(python_state)
