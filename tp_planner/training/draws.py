"""Draws: each replica draws random numbers of its own, the ranks of one replica the same.

A single process draws one dropout mask for the whole batch; replicas draw one each, independent of each other. What
is drawn outside the model's calls, such as the order of the data, stays the same on all ranks, and is what a single
process draws whose model draws nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import keras
import torch

from tp_planner.frontend.calling import is_symbolic
from tp_planner.regions.calls import running

STRIDE = 0x9E3779B1  # far from the seeds of the steps that follow


class OwnDraws:
    """Gives the outermost call of a model a random state of its replica, and the state of all back afterwards.

    The replica's state follows from that of all ranks, and from how many calls have begun in it.
    """

    def __init__(self, replica: int) -> None:
        self._replica = replica
        self._running: list[contextlib.ExitStack] = []
        self._state, self._calls = b"", 0

    def begin(self, model: keras.Model, args: Any) -> None:
        """Before a call of the model."""
        stack = contextlib.ExitStack()
        if not self._running and not is_symbolic():
            state = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=7).digest()
            self._calls = self._calls + 1 if state == self._state else 0
            self._state = state
            devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            stack.enter_context(torch.random.fork_rng(devices))
            torch.manual_seed(int.from_bytes(state) + self._calls * STRIDE + self._replica)
        self._running.append(stack)
        running.open[stack] = functools.partial(self._close, stack)

    def end(self, model: keras.Model, args: Any, output: Any) -> None:
        """After it, whether it failed or not."""
        if self._running:
            running.open.pop(self._running[-1], lambda: None)()

    def _close(self, stack: contextlib.ExitStack) -> None:
        self._running.remove(stack)
        stack.close()


def own_seeds(generator: keras.random.SeedGenerator, replica: int) -> None:
    """Let a seed generator give a replica seeds of its own, its state being that of all."""
    generator.__dict__["next"] = functools.partial(_next, generator.next, replica)


def _next(plain: Callable[..., torch.Tensor], replica: int, ordered: bool = True) -> torch.Tensor:
    seed = plain(ordered).to(torch.int64)
    return seed + seed.new_tensor([replica * STRIDE, 0])
