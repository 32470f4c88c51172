"""Reads: the weights in shards that a program reads, each for itself, are read in one step.

On the way back autograd then calls Python once for all of their gradients, which takes as long as for two or three.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence

from tp_planner.replay.once import SWITCH
from tp_planner.replay.program import Name, Step
from tp_planner.storage.variables import may_be_read_together, read_shard, read_shards


def with_reads_together(steps: Sequence[Step]) -> list[Step]:
    """Return steps that compute the same to the bit, in which those reads are one that need no communication.

    They stand where the first of them did. What is read behind a switch of gradients stays where it is, and what is
    read twice, too: its gradients are added in the order in which they come.
    """
    before_switch = list(itertools.takewhile(lambda step: step.function is not SWITCH, steps))
    times = Counter(id(step.args[0]) for step in steps if _is_read(step))
    reads = {step.result: step.args[0] for step in before_switch if _is_read(step) and _may_be_together(step, times)}
    if len(reads) < 2:
        return list(steps)
    together = Step(tuple(reads), read_shards, (tuple(reads.values()),), {}, views=True)
    first = next(iter(reads))
    return [
        together if step.result == first else step
        for step in steps
        if not isinstance(step.result, Name) or step.result not in reads or step.result == first
    ]


def _is_read(step: Step) -> bool:
    function = step.function
    return isinstance(function, functools.partial) and function.func is read_shard


def _may_be_together(step: Step, times: Counter[int]) -> bool:
    (variable,), name = step.args, step.result
    return times[id(variable)] == 1 and name.gradient and may_be_read_together(variable, name.dtype)
