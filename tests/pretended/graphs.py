"""CUDA graphs on a machine without a GPU: what is captured are ops, which a replay runs again on the same memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tp_planner.patches import replaced
from tp_planner.replay.cuda_graphs import CudaGraphs

WHY = "CUDA graphs are pretended"


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``."""

    replays = 0  # of all graphs

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        """Run the ops again, with what they made where it was."""
        Graph.replays += 1
        with torch.no_grad():
            for func, args, kwargs, made in self.calls:
                for before, now in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(before, torch.Tensor) and before.data_ptr() != now.data_ptr():
                        before.copy_(now)


class _Capture(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._graph.calls.append((func, args, kwargs or {}, made))
        return made


@contextlib.contextmanager
def capturing(graph: Graph, pool: Any = None, **how: Any) -> Iterator[None]:
    """Stand for ``torch.cuda.graph``, whom later versions of torch tell how to capture."""
    with _Capture(graph):
        yield


@contextlib.contextmanager
def pretended_graphs() -> Iterator[None]:
    """Inside, programs on the CPU run by graphs, if they may on a GPU."""
    Graph.replays = 0
    with contextlib.ExitStack() as stack:
        for owner, name, new in (
            (torch.cuda, "CUDAGraph", Graph),
            (torch.cuda, "graph", capturing),
            (torch.cuda, "synchronize", lambda: None),
            (torch.cuda, "Stream", lambda: None),
            (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
            (torch.cuda.graphs, "graph_pool_handle", lambda: None),
            (CudaGraphs, "_why_not", lambda self, tensors: ""),
        ):
            stack.enter_context(replaced(owner, name, new, WHY))
        yield
