"""The machine: from ``start`` on, this process believes that it has GPUs and that its process group is NCCL's."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from threading import current_thread
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tests.pretended.answers import Answers, current_device
from tests.pretended.kernels import Kernels
from tests.pretended.nccl import create
from tests.pretended.storages import on_device
from tp_planner.frontend.keras_internals import core

GPUS = 8


def start(store: dist.Store, rank: int, size: int) -> None:
    """Pretend for as long as the process lives, and make the process group of the ranks."""
    _pretend_cuda()
    dist.Backend.register_backend("pretended", create, devices=["cpu"])
    dist.init_process_group("pretended", store=store, rank=rank, world_size=size)
    dist.get_backend_config = lambda group=None: "cuda:nccl"
    current_device[0] = rank
    _look_on()


def _pretend_cuda() -> None:
    cuda, generator = torch.cuda, torch.Generator()
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.is_bf16_supported = lambda *args, **kwargs: True
    cuda.device_count = lambda: GPUS
    cuda.current_device = lambda: current_device[0]
    cuda.set_device = lambda device: current_device.__setitem__(0, torch.device("cuda", device).index)
    cuda.synchronize = lambda *args: None
    cuda.get_rng_state = lambda device="cuda": generator.get_state()
    cuda.set_rng_state = lambda state, device="cuda": generator.set_state(state)
    cuda.manual_seed = cuda.manual_seed_all = generator.manual_seed
    torch.Generator = _Generator  # type: ignore[misc]
    core.DEFAULT_DEVICE = "cuda"
    os.environ["KERAS_TORCH_DEVICE"] = "cuda"


class _Generator(torch._C.Generator):
    """A generator for any device, on the CPU."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")


def _look_on() -> None:
    """Let the modes see everything in this thread, and backward passes, which run on another one.

    ``Tensor.backward`` is a torch function itself, inside which the mode is off.
    """
    answers, run = Answers(), torch.autograd.graph._engine_run_backward
    of_device = ThreadPoolExecutor(1, "autograd")  # as autograd has one for each GPU

    def watched(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(map(on_device, tensors)) or current_thread().name.startswith("autograd"):
            with answers:
                return run(tensors, *args, **kwargs)
        modes = _get_current_dispatch_mode_stack()  # which autograd takes along

        def there() -> Any:
            with contextlib.ExitStack() as stack:
                for mode in (*modes, answers):
                    stack.enter_context(mode)
                return run(tensors, *args, **kwargs)

        return of_device.submit(there).result()

    # What runs again compares its tensors with those of the first run, where torch asked for devices out of our sight.
    torch.utils.checkpoint._allowed_determinism_checks_to_fns["default"] = lambda tensor: (tensor.shape, tensor.dtype)
    torch.autograd.graph._engine_run_backward = torch.autograd._engine_run_backward = watched
    Kernels().__enter__()
    answers.__enter__()
