"""Make again: in which layers the backward pass makes again what their code has made element by element.

Code that computes in another dtype than it is given keeps copies for the backward pass: a norm three in float32 of what
it is given in bfloat16, attention its mask as numbers. To make these again costs a few passes over memory.
"""

from __future__ import annotations

from collections.abc import Iterable

from tp_planner.ir.graph import FunctionCall, ModelGraph

# Of a smaller tensor memory is no matter, but the time is that Python takes to note how to make it: 20 to 30 us a call.
LEAST_BYTES = 2**23


def make_again(graph: ModelGraph) -> frozenset[tuple[str, str]]:
    """Return the layers, with the modes of their calls, that make tensors which need not be kept.

    There are none where code writes into tensors: what it has written into may be what another would be made of. So it
    is of a layer that computes with a variable which a call changes. Nor is the model itself one: of its own code's
    functions a tape, by which calls are replayed, knows before a plan does.

    Args:
        graph: the trace of a training call, with functions.
    """
    written = {graph.tensors[op.inputs[0]].variable for op in graph.ops if op.inputs and _writes(op.name)}
    if not graph.training or None in written:
        return frozenset()
    found = {function.call for function in graph.functions or () if _makes_much_of_little(function, graph)}
    read = {op.call for op in graph.ops if any(graph.tensors[each].variable in written for each in op.inputs)}
    calls = [graph.calls[each] for each in found - read]
    return frozenset((call.layer, call.mode) for call in calls if call.parent is not None)


def _makes_much_of_little(function: FunctionCall, graph: ModelGraph) -> bool:
    given = {tensor for _, tensor in function.inputs}
    if not function.elementwise or len(function.outputs) != 1 or given.intersection(function.outputs):
        return False
    made = graph.tensors[function.outputs[0]].bytes
    return made >= LEAST_BYTES and 2 * _bytes(given, graph) <= made


def _bytes(tensors: Iterable[int], graph: ModelGraph) -> int:
    return sum(graph.tensors[tensor].bytes for tensor in tensors if graph.tensors[tensor].shape)


def _writes(op: str) -> bool:
    return "." in op and op.split(".")[1].endswith("_")
