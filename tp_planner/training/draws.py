"""Draws: each replica draws random numbers of its own, the ranks of one replica the same.

A single process draws one dropout mask for the whole batch; replicas draw one each, independent of each other. What
is drawn outside the model's calls, such as the order of the data, stays the same on all ranks, and is what a single
process draws whose model draws nothing.

Seeds are read on the host, which would wait for a device to have computed them: there it counts along.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import keras
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.torch import random as keras_random
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from tp_planner.frontend.calling import is_symbolic
from tp_planner.patches import wrap_for_good
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


@dataclass(slots=True)
class _Counted:
    """The state of a seed generator on the host, true while its tensor is the one, and as often changed, as noted."""

    replica: int = 0
    state: torch.Tensor | None = None
    tensor: int = 0
    version: int = -1

    def next(self, value: torch.Tensor) -> torch.Tensor:
        """Return the state that a device has in ``value``, on the host, and count on in both places."""
        if self.state is None or (self.tensor, self.version) != (value.data_ptr(), value._version):
            self.state = value.detach().cpu()
        seed = self.state.to(torch.int64) + torch.tensor([self.replica * STRIDE, 0])
        with torch.no_grad():
            self.state = self.state + torch.arange(2, dtype=self.state.dtype)
            value.add_(torch.arange(2, dtype=value.dtype, device=value.device))
        self.tensor, self.version = value.data_ptr(), value._version
        return seed


_counted: weakref.WeakKeyDictionary[keras.random.SeedGenerator, _Counted] = weakref.WeakKeyDictionary()


def follow_seeds(generators: Iterable[keras.random.SeedGenerator], replica: int, undo: list[Callable[[], Any]]) -> None:
    """Let seed generators give a replica seeds of its own, their state being that of all, and no host wait for one."""
    wrap_for_good(keras_random, "draw_seed", _drawing, "seeds of parallel models are counted on the host, too")
    for generator in {id(each): each for each in generators}.values():  # layers may share one
        _counted[generator] = _Counted(replica)
        undo.append(functools.partial(_counted.pop, generator, None))
        if replica:
            generator.__dict__["next"] = functools.partial(_next, generator.next, replica)
            undo.append(functools.partial(generator.__dict__.pop, "next"))


def _drawing(plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(plain)
    def draw_seed(seed: Any) -> Any:
        counted = _counted.get(seed) if isinstance(seed, keras.random.SeedGenerator) else None
        if counted is None or in_stateless_scope() or not _is_on_device(seed.state._value):
            return plain(seed)
        return running.draw(functools.partial(counted.next, seed.state._value))

    return draw_seed


def _is_on_device(value: torch.Tensor) -> bool:
    return value.is_cuda and not isinstance(value, DTensor | FakeTensor)


def _next(plain: Callable[..., torch.Tensor], replica: int, ordered: bool = True) -> torch.Tensor:
    seed = plain(ordered).to(torch.int64)
    return seed + seed.new_tensor([replica * STRIDE, 0])
