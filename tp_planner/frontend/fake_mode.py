"""The mode in which models run without arithmetic: torch's FakeTensorMode on the CPU, and a short way for views."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.distributed.tensor import DTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils.weak import WeakTensorKeyDictionary

from tp_planner.frontend.dispatch import tensors_in, with_tensors_replaced

# Updates of whole lists in place. Torch has no rule for fake ones, and would run them on real tensors of these sizes.
_UPDATES = {
    getattr(getattr(torch.ops.aten, name), overload)
    for name in ("_fused_adam_", "_fused_sgd_")
    for overload in ("default", "tensor_lr")
}
CONSTANT_SIZE = 64  # how many whole numbers are few
_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
_GATHER = torch.ops._c10d_functional.all_gather_into_tensor_out.default  # by torch's rule it makes another tensor
_CPU = torch.device("cpu")
_VALUES = frozenset(
    (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
)
_DEVICE_OF = torch.ops.prim.device.default
_NAMESPACES = ("aten", "_c10d_functional")
MOST_ANSWERS = 20_000  # a plan asks some hundred questions; a process that plans all day goes on asking others
# What ops make: shape, strides, dtype and device, by all that these depend on. The oldest go.
_ANSWERS: dict[Hashable, tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]] = {}


class _NotDescribed(Exception):
    """What an op makes may depend on more than the sizes and types of its arguments."""


class FakeCpuMode(FakeTensorMode):
    """Runs ops on fake CPU tensors.

    Tensors that a model made while it was built on the meta device are taken for fake CPU tensors. Other real
    tensors are refused unless ``allow_non_fake_inputs``. Then what is made of a few whole numbers alone is computed:
    Keras's ops turn indices and sizes into tensors, and read what they made of them.
    """

    # No device but the CPU is met here. Where torch is built for CUDA and finds no GPU, FakeTensorMode would set up
    # eight in its place, for good: autograd then starts a thread for each, and no process is to be forked after that.
    avoid_device_init = False

    def __init__(self, *, allow_non_fake_inputs: bool = False) -> None:
        super().__init__(allow_non_fake_inputs=allow_non_fake_inputs)
        self._computed: Any = WeakTensorKeyDictionary()  # those that may be written to, for nobody else has them
        self._attributes: dict[torch.device, dict[str, Any]] = {}  # of a new fake tensor, but for its mode, by device

    def fake(self, meta: torch.Tensor, device: torch.device) -> FakeTensor:
        """Return what ``FakeTensor(self, meta, device)`` does, without its constructor from the second one on.

        That is for all of torch's ways to make one, and sets some fifteen attributes that are those of the first.
        """
        known = self._attributes.get(device)
        if known is None:
            first = FakeTensor(self, meta, device)
            self._attributes[device] = {name: value for name, value in vars(first).items() if name != "fake_mode"}
            return first
        made: FakeTensor = torch.Tensor._make_subclass(
            FakeTensor, meta, meta.requires_grad, dispatch_device=True, device_for_backend_keys=device
        )
        if self._allow_unsafe_data_ptr_access:
            torch._C._set_warn_deprecated_on_mutable_data_ptr(made)
        else:
            torch._C._set_throw_on_mutable_data_ptr(made)
        attributes = vars(made)
        attributes.update(known)
        attributes["fake_mode"] = self
        return made

    def another(self, tensor: FakeTensor) -> FakeTensor:
        """Return an empty fake tensor of the same kind; as ``torch.empty_strided`` would, without asking any mode."""
        with no_dispatch(), torch._C.DisableTorchFunction():
            meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return self.fake(meta, tensor.fake_device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF and type(args[0]) is FakeTensor:
            return args[0].fake_device
        if _is_plain_view(func) and not kwargs and self.is_our_fake(args[0]) and args[0].constant is None:
            view = self._view(func, args)
            if view is not None:
                return view
        if self.allow_non_fake_inputs and _is_of_numbers(func, args):
            return self._compute(func, args, kwargs or {})
        question = self._question(func, args, kwargs) if _makes_a_tensor(func) else None
        if question is not None:
            return self._answer(question, func, types, args, kwargs or {})
        if DTensor in types:
            return NotImplemented  # DTensor runs the op on local tensors, and that is asked here again
        if func in _UPDATES:
            return None
        if func is _GATHER:
            return (kwargs or {})["out"]
        if any(map(_is_real, args)):
            if self.allow_non_fake_inputs and self._is_of_constants(func, tuple(tensors_in((args, kwargs)))):
                return self._compute(func, args, kwargs or {})
            with self:
                args = with_tensors_replaced(args, _on_cpu)
        if self.allow_non_fake_inputs and _writes(func):
            # Of numbers and real tensors alone FakeTensorMode computes some ops, and writes to what the model keeps.
            args, kwargs = with_tensors_replaced((args, kwargs or {}), self._without_value)
        return self.dispatch(func, types, args, kwargs or {})

    def _question(self, func: Any, args: Any, kwargs: Any) -> Hashable | None:
        """Return all that what an op makes depends on; None where that is more than sizes, types and numbers."""
        values_last = not any(type(each) is FakeTensor and each.constant is None for each in args)
        try:
            taken = tuple([self._described(each, values_last) for each in args])
            named = tuple((name, self._described(each, values_last)) for name, each in kwargs.items()) if kwargs else ()
        except _NotDescribed:
            return None
        return func, taken, named, torch.get_default_dtype()

    def _described(self, argument: Any, values_last: bool) -> Hashable:
        """Return what an op's result depends on of an argument; beside a tensor without a value no value lasts."""
        kind = type(argument)
        if kind is FakeTensor and argument.fake_mode is self and (argument.constant is None or not values_last):
            return _kind_of(argument)
        if kind is torch.Tensor and self.allow_non_fake_inputs and not values_last and _is_few_whole_numbers(argument):
            return _kind_of(argument)
        if kind is tuple or kind is list:
            return kind, tuple([self._described(each, values_last) for each in argument])
        if kind in _VALUES:
            return kind, argument  # for 1, 1.0 and True are equal
        raise _NotDescribed

    def _answer(self, question: Hashable, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Return what an op makes; from the second time on as it was, where FakeTensorMode's own memory is slower."""
        known = _ANSWERS.get(question)
        if known is not None:
            shape, stride, dtype, device = known
            empty = torch.empty_strided(shape, stride, dtype=dtype, device="meta")  # no mode is left that sees it
            return self.fake(empty, device)
        made: Any = self._asked_once(func, types, args, kwargs)
        if type(made) is FakeTensor and made.constant is None:
            if len(_ANSWERS) >= MOST_ANSWERS:
                _ANSWERS.pop(next(iter(_ANSWERS)))
            _ANSWERS[question] = made.shape, made.stride(), made.dtype, made.fake_device
        return made

    def _asked_once(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Return what an op makes without FakeTensorMode's own memory: nobody asks that for it again."""
        before, self.cache_enabled = self.cache_enabled, False
        try:
            return self.dispatch(func, types, args, kwargs)
        finally:
            self.cache_enabled = before

    def _is_of_constants(self, func: Any, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether an op makes its result of a few whole numbers alone, and changes none that others may have."""
        if not isinstance(func, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in func.tags:
            return False
        if func._schema.name.startswith("aten::new_"):  # of any size
            return False
        if func._schema.is_mutable and not all(tensor in self._computed for tensor in tensors):
            return False
        return all(map(_is_few_whole_numbers, tensors))

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if not (func.is_view or func._schema.is_mutable):
            self._computed.update((tensor, True) for tensor in tensors_in(result))
        return result

    def _without_value(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the fake tensor that stands for a real one, always the same."""
        return self.from_tensor(tensor) if _is_real(tensor) else tensor

    def _view(self, func: Any, args: Any) -> FakeTensor | list[FakeTensor] | None:
        """Return a view, or several, as torch's own kernel makes it of a tensor without values; None if it refuses.

        Half of all ops are views. FakeTensorMode works them out in Python, and remembers them, which took five times
        as long. What it says of a view that cannot be is for people to read, so a refusal is left to it.
        """
        try:
            with in_kernel_invocation_manager(self):
                view = func(*args)
        except (RuntimeError, ValueError, IndexError):
            return None
        if type(view) is list:
            return [self.fake(each, args[0].fake_device) for each in view]
        return self.fake(view, args[0].fake_device)


@cache
def _makes_a_tensor(func: Any) -> bool:
    """Whether an op makes one new tensor, and its kind follows from those of its arguments."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace not in _NAMESPACES:
        return False
    if func in FakeTensorMode.lift_fns:
        return False
    depends_on_values = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    if func.is_view or func._schema.is_mutable or depends_on_values.intersection(func.tags):
        return False
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return False  # may return its argument
    return [str(each.type) for each in func._schema.returns] == ["Tensor"] and func is not _UNSAFE_VIEW


@cache
def _is_plain_view(func: Any) -> bool:
    """Whether an op makes views of its first argument, its only tensor."""
    if func is _UNSAFE_VIEW:  # a view to all but autograd
        return True
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten" or not func.is_view:
        return False
    if func in FakeTensorMode.lift_fns or torch.Tag.inplace_view in func.tags:
        return False
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return False  # may return its argument, or a copy
    taken, made = func._schema.arguments, func._schema.returns
    one_tensor = ["Tensor" in str(each.type) for each in taken] == [True] + [False] * (len(taken) - 1)
    return one_tensor and [str(each.type) for each in made] in (["Tensor"], ["List[Tensor]"])


def _kind_of(tensor: torch.Tensor) -> Hashable:
    if tensor.layout is not torch.strided or tensor.dtype.is_complex:
        raise _NotDescribed
    return tensor.shape, tensor.stride(), tensor.dtype


def _is_of_numbers(func: Any, args: Any) -> bool:
    """Whether an op that takes tensors is called on Python's whole numbers alone, as ``torch.floor_divide`` may be."""
    if not args or type(args[0]) is not int or not isinstance(func, torch._ops.OpOverload):
        return False
    taken = [str(each.type) for each in func._schema.arguments[: len(args)]]
    return taken[0] == "Tensor" and all(type(each) is int for each in args) and not _writes(func)


def _writes(func: Any) -> bool:
    return isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable


def _is_real(leaf: Any) -> bool:
    """Whether an argument is, or holds, a tensor that is not fake."""
    kind = type(leaf)
    return kind is torch.Tensor or kind is torch.nn.Parameter or (kind in (list, tuple) and any(map(_is_real, leaf)))


def _is_few_whole_numbers(tensor: torch.Tensor) -> bool:
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized)
    return type(tensor) is torch.Tensor and whole and tensor.device.type == "cpu" and tensor.numel() <= CONSTANT_SIZE


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, FakeTensor | DTensor) or not tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
