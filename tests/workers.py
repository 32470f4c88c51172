"""A pool of worker processes, so that tests run functions on every rank of one gloo process group.

Importing torch and Keras takes longer than most tests: one process does it for all ranks, which are forked from it.
They live as long as the pool, and every run begins in the same state. Functions and what they return travel by pickle,
so a function is one at the top of a module, and returns arrays rather than tensors of its model.

To test a refusal, catch it in the function and return its message: an error that leaves the function may have
left the ranks at different points, so it costs the pool its processes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import torch.distributed as dist
from keras.src.backend.common import dtypes
from keras.src.models.model import Trainer
from keras_hub.src.models.gemma import rms_normalization
from keras_hub.src.models.llama import llama_decoder, llama_layernorm

from tp_planner.training.model import applied_to

TIMEOUT_S = 300.0  # for one run, on a machine that does much else
START_S = 180.0  # for the processes to import everything and to find each other
GRACE_S = 5.0  # for the other ranks, once one has failed
STOP_S = 10.0  # for a process to end by itself


Start = Callable[[dist.Store, int, int], None]


class RankTraceback(Exception):
    """What happened on the ranks, as text; the cause of an error that ``WorkerPool.run`` raises."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


@dataclass(frozen=True, slots=True)
class Answer:
    """What one run gave on one rank: ``value``, or ``error`` with its traceback as text."""

    value: Any = None
    error: BaseException | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Rank:
    """One process as the parent sees it. ``dump`` is the file into which it writes its stacks: at SIGUSR1, or dying."""

    number: int
    process: ForkServerProcess
    pipe: Connection
    dump: Path

    def doing(self) -> str:
        """Return the stacks of all its threads, as text."""
        before = self.dump.stat().st_size
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 2
        while self.dump.stat().st_size == before and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)  # the rest of the file
        return self.dump.read_text()[before:] or "no answer, not even to a signal\n"


class WorkerPool:
    """``size`` processes that are the ranks of one gloo process group. They start with the first run.

    Args:
        size: number of ranks.
        timeout_s: how long one run may take before it is cut off.
        start: makes the process group of a worker, from the store, its rank and the number of ranks.
    """

    def __init__(self, size: int, timeout_s: float = TIMEOUT_S, start: Start | None = None) -> None:
        self.size, self.timeout_s, self.start = size, timeout_s, start or start_gloo
        self._ranks: list[Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._store: dist.TCPStore | None = None

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what ``function(*args)`` returned on every rank, by rank.

        Keras' session and dtypes are fresh in each run; random generators are seeded with the rank's number, so
        that ranks that have to agree do not do so by chance.

        Raises:
            Exception: what the function raised on the first rank that failed, with the traceback of every
                failed rank, and the stacks of those that were still running ``GRACE_S`` seconds later.
            TimeoutError: if a rank takes longer than ``timeout_s``, with what each such rank was doing.

        After an error the next run starts new processes.
        """
        if not self._ranks:
            self._start()
        task = pickle.dumps((function, args))
        for rank in self._ranks:
            with contextlib.suppress(ConnectionError):  # of a process that is dead; its answer says so
                rank.pipe.send_bytes(task)
        return self._values(function.__name__, self.timeout_s)

    def stop(self) -> None:
        """End the processes; those that do not end by themselves are killed."""
        for rank in self._ranks:
            rank.pipe.close()
        for rank in self._ranks:
            rank.process.join(STOP_S)
        self._kill()

    def _start(self) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory()
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["tests.preloaded"])  # which imports all that most ranks need
        for number in range(self.size):
            here, there = server.Pipe()
            dump = Path(self._folder.name) / f"rank_{number}.txt"
            dump.touch()
            args = (number, self.size, self._store.port, there, dump, self.start)
            process = server.Process(target=_work, args=args, daemon=True)
            with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):  # gloo ranks compute on the CPU
                process.start()
            there.close()
            self._ranks.append(Rank(number, process, here, dump))
        self._values("the start of a pool", START_S)

    def _values(self, what: str, timeout_s: float) -> list[Any]:
        """Return what every rank answers, by rank; if one fails or is late, kill the processes and say why."""
        answers = self._answers(time.monotonic() + timeout_s)
        if len(answers) < self.size or any(answer.error for answer in answers.values()):
            self._fail(what, answers, timeout_s)
        return [answers[number].value for number in range(self.size)]

    def _answers(self, deadline: float) -> dict[int, Answer]:
        """Return the answers that come in time, by rank; not long after the first error, the waiting ends."""
        waiting = {rank.pipe: rank for rank in self._ranks}
        answers: dict[int, Answer] = {}
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]  # pipes are all it waits for
                answers[rank.number] = _receive(rank)
                if answers[rank.number].error is not None:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def _fail(self, what: str, answers: Mapping[int, Answer], timeout_s: float) -> None:
        failed = {number: answer for number, answer in answers.items() if answer.error is not None}
        stuck = [rank for rank in self._ranks if rank.number not in answers]
        texts = [f"rank {number} raised:\n{answer.text}" for number, answer in sorted(failed.items())]
        texts += [f"rank {rank.number} was still running:\n{rank.doing()}" for rank in stuck]
        self._kill()
        report = RankTraceback("\n".join(texts))
        if failed:
            error = next(iter(failed.values())).error
            assert error is not None
            raise error from report
        late = ", ".join(str(rank.number) for rank in stuck)
        raise TimeoutError(f"{what} takes longer than {timeout_s:.0f} s on rank {late}") from report

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.process.kill()
            rank.process.join()
            rank.pipe.close()
        self._ranks = []
        self._store = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _receive(rank: Rank) -> Answer:
    try:
        answer: Answer = pickle.loads(rank.pipe.recv_bytes())
        return answer
    except (EOFError, ConnectionError):
        rank.process.join(STOP_S)
        text = f"the process of rank {rank.number} ended with exit code {rank.process.exitcode}"
        return Answer(error=ChildProcessError(text), text=f"{text}\n{rank.dump.read_text()}")


Pools = Callable[[int], WorkerPool]  # the pool of a number of processes


# In the worker process


def start_gloo(store: dist.Store, rank: int, size: int) -> None:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)


def _work(rank: int, size: int, port: int, pipe: Connection, dump: Path, start: Start) -> None:
    with dump.open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
        faulthandler.enable(stacks, all_threads=True)  # for a process that dies of a signal, such as SIGSEGV
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        start(store, rank, size)
        _let_plain_models_train_alone()
        patched = _what_tests_patch()
        _count_frozen_objects_once()
        pipe.send_bytes(pickle.dumps(Answer()))
        while (task := _next_task(pipe)) is not None:
            _begin_afresh(rank, patched)
            pipe.send_bytes(_answer(task))
        dist.destroy_process_group()


def _next_task(pipe: Connection) -> bytes | None:
    try:
        return pipe.recv_bytes()
    except EOFError:
        return None


def _answer(task: bytes) -> bytes:
    try:
        function, args = pickle.loads(task)
        return pickle.dumps(Answer(value=function(*args)))
    except BaseException as error:  # pytest's own failures are no Exceptions
        return pickle.dumps(Answer(error=_picklable(error), text=traceback.format_exc()))


def _picklable(error: BaseException) -> BaseException:
    try:
        same: BaseException = pickle.loads(pickle.dumps(error))
        return same
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


Entry = tuple[MutableMapping[str, Any], str, Any]


def _what_tests_patch() -> list[Entry]:
    """Return what ``tests.models`` replaces for models in float64, so that one process serves all dtypes."""
    places = (
        (dtypes.BIT64_TO_BIT32_DTYPE, "float64"),
        (vars(llama_decoder), "ops"),
        (vars(llama_layernorm), "ops"),
        (vars(rms_normalization), "ops"),
    )
    return [(namespace, name, namespace[name]) for namespace, name in places]


def _let_plain_models_train_alone() -> None:
    """Keep Keras 3.16 from replicating plain models over the ranks: they are what parallel ones are compared with."""
    if not hasattr(Trainer, "_initialize_ddp"):
        return
    initialize, results = Trainer._initialize_ddp, Trainer.get_metrics_result

    def is_alone(model: keras.Model) -> bool:
        return applied_to(model) is None and keras.distribution.distribution() is None

    Trainer._initialize_ddp = lambda self: None if is_alone(self) else initialize(self)
    Trainer.get_metrics_result = lambda self: (
        super(Trainer, self).get_metrics_result() if is_alone(self) else results(self)
    )


def _count_frozen_objects_once() -> None:
    """Let ``gc.get_freeze_count`` answer at once: it goes through all of them, and planning asks each time."""
    count = gc.get_freeze_count()
    gc.get_freeze_count = lambda: count


def _begin_afresh(rank: int, patched: list[Entry]) -> None:
    """Put the process into the state in which every run begins."""
    keras.utils.clear_session()
    gc.freeze()  # what former runs have left alive; the next collection goes through this run's objects alone
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(rank)
    for namespace, name, value in patched:
        namespace[name] = value


# For functions that run on the ranks


def layout_map(rules: Mapping[str, tuple[str | None, ...]]) -> keras.distribution.LayoutMap:
    """Return the rules as a LayoutMap on a mesh of all ranks, its axes "batch" (of size 1) and "model"."""
    size = dist.get_world_size()
    mesh = keras.distribution.DeviceMesh((1, size), ("batch", "model"), [f"cpu:{rank}" for rank in range(size)])
    layouts = keras.distribution.LayoutMap(mesh)
    for pattern, axes in rules.items():
        layouts[pattern] = axes
    return layouts
