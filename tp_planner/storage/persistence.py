"""Save a parallel model with Keras's own calls: rank 0 writes one ordinary file, variable by variable.

While ranks save together rank 0 runs Keras's own code; whenever that asks a sharded variable for its value,
rank 0 tells the others which one, all gather it, and only rank 0 keeps it. So no order of variables has to be
known, and no rank holds more than one whole variable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from tp_planner.ir.errors import ParallelRuntimeError
from tp_planner.job.process_group import this_device
from tp_planner.job.rendezvous import meet
from tp_planner.storage.variables import is_in_shards

_DONE, _FAILED = -1, -2


class _Saving:
    on_this_rank = False  # what it saves meanwhile is part of it


def save_together(what: str, variables: Iterable[Any], save: Callable[[], Any]) -> Any:
    """Run ``save`` on rank 0 while the other ranks contribute their shards; return what it returns there.

    Args:
        what: the call, for errors.
        variables: every variable that ``save`` may read.
        save: Keras's own saving call.

    Raises:
        ParallelRuntimeError: if not all ranks call, or on the other ranks if rank 0 failed.
    """
    if _Saving.on_this_rank:
        return save()
    meet(what)
    sharded = [*{id(variable): variable for variable in variables if is_in_shards(variable)}.values()]
    if dist.get_rank() != 0:
        _serve(what, sharded)
        return None
    numbers = {id(variable): number for number, variable in enumerate(sharded)}

    def gather(variable: Any) -> torch.Tensor:
        _tell(numbers[id(variable)])
        whole: torch.Tensor = variable.whole()
        return whole

    for variable in sharded:
        variable.let_gather(gather)
    _Saving.on_this_rank = True
    try:
        result = save()
    except BaseException:
        _tell(_FAILED)
        raise
    finally:
        _Saving.on_this_rank = False
        for variable in sharded:
            variable.let_gather(None)
    _tell(_DONE)
    return result


def _tell(number: int) -> None:
    dist.broadcast(torch.tensor(number, device=this_device()), 0)


def _serve(what: str, sharded: list[Any]) -> None:
    while True:
        number = torch.tensor(0, device=this_device())
        dist.broadcast(number, 0)
        if (wanted := int(number)) == _DONE:
            return
        if wanted == _FAILED:
            raise ParallelRuntimeError(f"{what} failed on rank 0; see its error there")
        sharded[wanted].whole()
