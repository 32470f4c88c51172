"""Constants: numbers of the host that a step needs on a GPU, without the host waiting until they are there.

Keras makes a tensor of each number that its code writes. Copied from the host's ordinary memory that waits for all that
the device has still to do; filled in on the device, or copied from pinned memory, it does not.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tp_planner.patches import wrapped


@contextlib.contextmanager
def constants_without_waiting() -> Iterator[None]:
    """Inside, ``torch.as_tensor`` of what is no tensor, for CUDA devices, lets no host wait."""
    with wrapped(torch, "as_tensor", _without_waiting, "constants of a step are filled in on the device"):
        yield


def _without_waiting(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(plain)
    def as_tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        if not str(device).startswith("cuda"):
            return plain(data, dtype=dtype, device=device)
        if isinstance(data, bool | int | float):
            return torch.full((), data, dtype=dtype, device=device)
        if isinstance(data, torch.Tensor):
            return plain(data, dtype=dtype, device=device)
        return plain(data, dtype=dtype).pin_memory().to(device, non_blocking=True)

    return as_tensor
