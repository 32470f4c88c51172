"""Updates of elementwise optimizers on this rank's shards, with next to no memory beyond their variables and slots.

Adam, and SGD with momentum, are one pass of torch's fused kernels. All others run Keras's own code, on slices of one
large variable after the other, because it makes several temporaries of a variable's size. Adagrad is among them: Keras
adds epsilon inside of the root, torch's kernel outside.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import torch
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from tp_planner.regions.calls import running
from tp_planner.storage.variables import BackendVariable, ParallelVariable, local_tensor

SLICE_BYTES = 8 * 2**20  # Keras's updates hold seven temporaries of it at most
SMALL = 2**14  # elements; variables up to here are updated together
FUSED_DEVICES = ("cpu", "cuda")
_SGD_WRITES_IN_PLACE = keras.__version__.startswith("3.15.")  # later ones make a temporary for each gradient first

Gradients = Sequence[torch.Tensor]
Update = Callable[[Gradients, Sequence[Any]], None]


def update_elementwise(
    optimizer: Any, gradients: Gradients, variables: Sequence[Any], learning_rate: Any, by_keras: Update
) -> None:
    """Update the variables, as Keras's own code ``by_keras`` would update all of them at once.

    Args:
        optimizer: an elementwise optimizer of Keras.
        gradients: local gradients.
        variables: their variables.
        learning_rate: the rate of this update.
        by_keras: updates some of the variables, with their gradients.
    """
    fused = _FUSED.get(next((base for base in _FUSED if isinstance(optimizer, base)), None))
    if isinstance(optimizer, keras.optimizers.SGD) and (optimizer.nesterov or not optimizer.momentum):
        if _SGD_WRITES_IN_PLACE:
            by_keras(gradients, variables)
            return
        fused = None
    indices = [optimizer._get_variable_index(variable) for variable in variables]
    lists = {name: getattr(optimizer, name) for name in _names_of_slots(optimizer)}
    slots = {name: [each[index] for index in indices] for name, each in lists.items()}
    rows = list(zip(*map(_changed_in_place, (variables, *slots.values())), gradients, strict=True))
    groups: dict[Any, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        groups[_kind(row) if fused else None].append(number)
    others = groups.pop(None, [])
    for numbers in groups.values():
        assert fused is not None
        columns = map(list, zip(*map(rows.__getitem__, numbers), strict=True))
        with torch.no_grad():
            fused(optimizer, dict(zip(("values", *slots, "gradients"), columns, strict=True)), learning_rate)
    parts = [_Part(variables[each], [own[each] for own in slots.values()], rows[each]) for each in others]
    _update_in_slices(optimizer, parts, by_keras)


def _kind(row: Sequence[torch.Tensor | None]) -> tuple[torch.device, torch.dtype] | None:
    """Return what tensors have in common that one kernel may change: it does not ask, and goes through memory."""
    assert row[0] is not None
    device, dtype = row[0].device, row[0].dtype
    for each in row:
        if each is not None and (each.dtype is not dtype or each.device != device or not each.is_contiguous()):
            return None
    return (device, dtype) if device.type in FUSED_DEVICES else None


class _Part:
    """What one variable's update by Keras's code takes: the variable, its slots, its gradient."""

    def __init__(self, variable: Any, slots: Sequence[Any], row: Sequence[Any]) -> None:
        self.variable, self.slots = variable, [each for each in slots if each is not None]
        self.value, self.gradient = row[0], row[-1]


def _names_of_slots(optimizer: Any) -> list[str]:
    """Return the names of the optimizer's lists of slots, which have one entry, or None, for each variable."""
    lists = {name: each for name, each in vars(optimizer).items() if isinstance(each, list)}
    return [name for name, each in lists.items() if _are_slots(each, optimizer._trainable_variables)]


def _are_slots(candidates: list[Any], variables: list[Any]) -> bool:
    if len(candidates) != len(variables):
        return False
    first = next((pair for pair in zip(candidates, variables, strict=True) if pair[0] is not None), None)
    if first is None or first[0] is first[1]:
        return False
    if not isinstance(first[0], BackendVariable):
        return False
    slot, variable = _changed_in_place(first)
    return bool(slot.shape == variable.shape)


def _changed_in_place(variables: Sequence[Any]) -> list[Any]:
    """Return the tensors that this rank stores; to find a variable's ``value`` takes as long as a small update."""
    values = [None if each is None else each._value for each in variables]
    return [each._local_tensor if isinstance(each, DTensor) else each for each in values]


Columns = Mapping[str, list[torch.Tensor]]  # "values" of variables, their "gradients", and slots by the lists' names


def _fused_adam(optimizer: Any, columns: Columns, learning_rate: Any) -> None:
    """Make Adam's update by Keras's formula, in which epsilon is added to a root that is not corrected for bias.

    So the kernel corrects nothing: its step is infinite, and all corrections are in the rate. That stays on the device,
    but where a kernel would read it as float32.
    """
    value = columns["values"][0]
    step = keras.ops.cast(optimizer.iterations + 1, value.dtype)
    rate = keras.ops.cast(learning_rate, value.dtype)
    rate = rate * torch.sqrt(1 - optimizer.beta_2**step) / (1 - optimizer.beta_1**step)
    if value.is_cuda:
        rate = rate.item() if value.dtype == torch.float64 else rate.float()
    infinite = torch.full((), torch.inf, device=value.device)
    torch._fused_adam_(
        columns["values"],
        columns["gradients"],
        columns["_momentums"],
        columns["_velocities"],
        columns["_velocity_hats"] if optimizer.amsgrad else [],
        [infinite] * len(columns["values"]),
        lr=rate,
        beta1=optimizer.beta_1,
        beta2=optimizer.beta_2,
        weight_decay=0.0,
        eps=optimizer.epsilon,
        amsgrad=optimizer.amsgrad,
        maximize=False,
    )


def _fused_sgd(optimizer: Any, columns: Columns, learning_rate: Any) -> None:
    """Make the update of SGD with momentum; Keras's momentums have the rate in them, and are added as they are."""
    lists = columns["values"], columns["gradients"], columns["momentums"]
    running.run(_fused_sgd_at, *lists, optimizer.momentum, learning_rate)  # a step of its own: it looks at the rate


def _fused_sgd_at(values: Any, gradients: Any, momentums: Any, momentum: float, learning_rate: Any) -> None:
    torch._fused_sgd_(
        values,
        gradients,
        momentums,
        lr=-1.0,
        momentum=momentum,
        dampening=1.0 + _number(learning_rate),
        weight_decay=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def _number(rate: Any) -> float:
    """Return a rate as a number; the host waits for a device only where the rate has changed, as by schedules."""
    tensor = getattr(rate, "_value", rate)
    if not isinstance(tensor, torch.Tensor):
        return float(tensor)
    known: tuple[int, float] | None = _NUMBERS.get(tensor)
    if known is None or known[0] != tensor._version:
        known = _NUMBERS[tensor] = tensor._version, float(tensor)
    return known[1]


_NUMBERS = WeakTensorKeyDictionary()  # rates: the version of the tensor, and what it holds


_FUSED: dict[Any, Callable[[Any, Columns, Any], None]] = {
    keras.optimizers.Adam: _fused_adam,
    keras.optimizers.SGD: _fused_sgd,
}


def _update_in_slices(optimizer: Any, parts: Sequence[_Part], by_keras: Update) -> None:
    product: Any = getattr(optimizer, "_u_product", None)  # of Nadam, which multiplies it in each of its calls
    before = None if product is None else product.value.clone()
    small = [each for each in parts if each.value.numel() <= SMALL]
    if small:
        by_keras([each.gradient for each in small], [each.variable for each in small])
    for part in parts:
        if part.value.numel() > SMALL:
            with _alone(part.value):
                for gradient in _slices(part):
                    if before is not None:
                        product.assign(before)
                    by_keras([gradient], [part.variable])


@contextlib.contextmanager
def _alone(tensor: torch.Tensor) -> Iterator[None]:
    """Inside, an update works on this variable alone."""
    running.updated_alone = tensor
    try:
        yield
    finally:
        running.updated_alone = None


def _slices(part: _Part) -> Iterator[torch.Tensor]:
    """Yield slices of the gradient; meanwhile the variable and its slots are slices too, as vectors."""
    length = SLICE_BYTES // part.value.element_size()
    changed = [part.variable, *part.slots]
    tensors = [local_tensor(each) for each in changed]
    if part.value.numel() <= length or not all(each.is_contiguous() for each in tensors):
        yield part.gradient
        return
    kept = [(each._value, each._shape) for each in changed]
    gradient, vectors = part.gradient.reshape(-1), [each.view(-1) for each in tensors]
    try:
        for start in range(0, len(gradient), length):
            for each, vector in zip(changed, vectors, strict=True):
                each._value = vector[start : start + length]
                if not isinstance(each, ParallelVariable):  # which takes what is as long as its shard
                    each._shape = tuple(each._value.shape)
            yield gradient[start : start + length]
    finally:
        for each, (value, shape) in zip(changed, kept, strict=True):
            each._value, each._shape = value, shape
