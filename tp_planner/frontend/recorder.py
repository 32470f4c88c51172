"""The recorder: writes down every ATen op and every layer call of a running Keras model.

A block that is planned like one that has run already is not run. One op of the name ``REPEAT`` stands for all it
would do, and the graph says which block it repeats.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import keras
import torch
import torch.utils.checkpoint
from keras.src.backend.common.variables import get_autocast_scope
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_flatten

from tp_planner.frontend.block_ends import BlockEnds, BlockResult, MadeTensor, leaves_and_masks
from tp_planner.frontend.blocks import Blocks
from tp_planner.frontend.contractions import call_mode
from tp_planner.frontend.dispatch import WatchingMode, tensors_in, with_tensors_replaced
from tp_planner.frontend.failed_checkpoints import ending_what_failed
from tp_planner.frontend.layer_tree import named_layers, named_variables
from tp_planner.ir.graph import REPEAT, Call, Op, Repeat, TensorInfo, TensorRef
from tp_planner.patches import wrapped

CONSTANT_SIZE = 64  # how many values of a constant tensor are compared


class CapturedVariable(Exception):
    """The model uses a tensor that was computed from a variable before the call."""


class BlockNotAlone(Exception):
    """A block cannot stand for others, nor others for it.

    It is called twice, or again in the backward pass by what is around it, or used in parts from outside.

    The recorder's ``not_alone`` is its name; Keras makes errors anew on their way, with a message of its own.
    """


@dataclass
class _OpenCall:
    """A layer call that is running."""

    id: int
    layer: str
    parent: int | None
    mode: str
    inputs: tuple[tuple[int, int], ...]
    first_op: int
    core_output: int | None = None


@dataclass(frozen=True)
class _Ran:
    """A block that ran: its name, what it came to, and the ids of the tensors that it was given and that it made."""

    block: str
    result: BlockResult
    given: tuple[int, ...]
    made: tuple[int, ...]


class Recorder(WatchingMode):
    """Sees every ATen op and every layer call of a model and writes them down.

    Args:
        model: the model that is going to run.
        blocks: which of its layers are equal; by default each is run.
        trainable: keys of the variables that are trained now.
        repeats: calls that repeat another, from an earlier recording: just these do so again.
        left_out: layers that are not run, by name, from an earlier recording.
    """

    def __init__(
        self,
        model: keras.Model,
        blocks: Blocks | None = None,
        trainable: frozenset[str] = frozenset(),
        repeats: Mapping[int, Repeat] | None = None,
        left_out: Set[str] = frozenset(),
    ) -> None:
        super().__init__()
        self._blocks = blocks if blocks is not None else Blocks.none()
        self._known_repeats = repeats
        self._inside: dict[str, tuple[str, ...]] = {  # by block: it and all layers below it
            block: self._blocks.layers[block] for block in self._blocks.signatures
        }
        for repeat in (repeats or {}).values():
            self._inside.update((names[0], names) for names in zip(*repeat.layers, strict=True))
        self.not_called = frozenset(left_out - self._inside.keys())  # layers inside of those that are not run
        self._twins: dict[Any, int] = {}  # by all that has to be equal: the call
        self._ran: dict[int, _Ran] = {}  # by call: blocks that others may repeat
        self._takers: dict[int, dict[int, Any]] = {}  # by tensor with a gradient: who took it, by call
        self.repeats: dict[int, Repeat] = {}
        self._bases: dict[MadeTensor, torch.Tensor] = {}  # what the outputs of blocks that do not run are views of
        # Called with the keys of the variables of a block that is about to run.
        self.prepare: Callable[[list[str]], None] = lambda keys: None
        self._trainable = trainable
        self._layers = named_layers(model)
        self._names = {id(layer): name for name, layer in self._layers.items()}
        self._variables = named_variables(model)
        self.ops: list[Op] = []
        self._without_grad: set[int] = set()  # ops that autograd did not record
        self.calls: dict[int, Call] = {}
        self.tensors: dict[int, TensorInfo] = {}
        self._alive: list[torch.Tensor] = []
        self._ids: dict[int, int] = {}
        self.with_grad: set[int] = set()
        self.trained: set[int] = set()
        self._called: set[str] = set()  # blocks
        self.not_alone = ""
        self._constants: dict[int, Any] = {}
        self._stack: list[_OpenCall] = []
        self._paused = 0
        self._recomputable = 0  # functions that are running, and that the backward pass runs again
        self._keys = {id(variable): key for key, variable in self._variables.items()}
        self._variable_of: dict[int, str] = {}
        self.know(self._variables)

    # --- tensors ---------------------------------------------------------------------------------------

    def know(self, keys: Iterable[str]) -> None:
        """Recognise the variables of these keys by the tensors that they hold now."""
        self._variable_of.update({id(self._variables[key]._value): key for key in keys})

    def tensor_id(self, tensor: torch.Tensor) -> int:
        """Return the id of a tensor, a new one where it was not met before."""
        known = self._ids.get(id(tensor))
        if known is None:
            known = self._add(tensor, self._variable_of.get(id(tensor)))
            if not isinstance(tensor, FakeTensor) and self.tensors[known].variable is None:
                self._constants[known] = self._constant(tensor)
        variable = self.tensors[known].variable
        if variable is not None:
            self._must_be_inside(self._blocks.home_of_variable.get(variable))
        if tensor.requires_grad:
            self.with_grad.add(known)
        return known

    def known_id(self, leaf: Any) -> int | None:
        """Return the id of a tensor that an op or a layer call was seen with; None for anything else."""
        return self._ids.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None

    def _must_be_inside(self, block: str | None) -> None:
        if block is not None and all(call.layer != block for call in self._stack):
            self.not_alone = block
            raise BlockNotAlone

    def _constant(self, tensor: torch.Tensor) -> Any:
        """Return the value of a real tensor that the model's code made or kept."""
        if tensor.requires_grad:
            raise CapturedVariable(
                f"layer {self.running_layer!r} uses a tensor of shape {tuple(tensor.shape)} that was computed from a "
                f"variable when the model was built and does not follow it; compute it in a layer's call instead"
            )
        if tensor.is_meta:  # made while the model was built on the meta device
            return "unknown"
        with no_dispatch():
            return tuple(tensor.reshape(-1)[:CONSTANT_SIZE].tolist())

    def _add(self, tensor: torch.Tensor, variable: str | None = None) -> int:
        number = len(self.tensors)
        self._alive.append(tensor)  # keeps id(tensor) from being used again
        self._ids[id(tensor)] = number
        self.tensors[number] = TensorInfo(
            id=number,
            shape=tuple(tensor.shape),
            stride=tuple(tensor.stride()) if tensor.layout == torch.strided else (),
            dtype=str(tensor.dtype).removeprefix("torch."),
            itemsize=tensor.element_size(),
            requires_grad=False,
            has_gradient=False,
            variable=variable,
        )
        if variable in self._trainable:
            self.trained.add(number)
        return number

    # --- ops -------------------------------------------------------------------------------------------

    def watch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if self._paused or not self._stack or func.namespace == "prim":
            return func(*args, **kwargs)
        inputs: list[int] = []

        def reference(tensor: torch.Tensor) -> TensorRef:
            inputs.append(self.tensor_id(tensor))
            return TensorRef(len(inputs) - 1)

        arguments = with_tensors_replaced((args, kwargs), reference)
        result = func(*args, **kwargs)
        # A variable that an op assigns remains that variable.
        made = list(tensors_in(result))
        outputs = [self._add(leaf, self._variable_of.get(id(leaf))) for leaf in made]
        constants = tuple(self._constants[number] for number in inputs if number in self._constants)
        is_constant = 0 < len(inputs) == len(constants) and all(type(leaf) is torch.Tensor for leaf in made)
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if not (torch.is_grad_enabled() or self._recomputable):
            self._without_grad.add(len(self.ops))
        if is_constant:
            self._constants.update(zip(outputs, map(self._constant, made), strict=True))
        self._write(str(func), arguments, tuple(inputs), tuple(outputs), is_random, constants, is_constant)
        return result

    def _write(
        self,
        name: str,
        arguments: Any,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        is_random: bool = False,
        constants: tuple[Any, ...] = (),
        is_constant: bool = False,
    ) -> None:
        call = self._stack[-1].id
        self.ops.append(Op(len(self.ops), name, call, arguments, inputs, outputs, is_random, constants, is_constant))
        if not self.trained.isdisjoint(inputs):
            self.trained.update(outputs)

    def own_gradients(self) -> Iterator[int]:
        """Yield the ops inside functions that say themselves what their gradient is, run after run.

        Autograd records none of their ops, and yet what they make has a gradient.
        """
        runs = itertools.groupby(self.ops, key=lambda op: (op.id in self._without_grad, op.call))
        for (without_grad, _), run in runs:
            ops = list(run)
            if without_grad and any(tensor in self.with_grad for op in ops for tensor in op.outputs):
                yield from (op.id for op in ops)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ops inside are not recorded."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    @property
    def running_layer(self) -> str:
        """The layer whose call is running, or was when the model failed."""
        return self._stack[-1].layer

    @property
    def running_call(self) -> int | None:
        """The call whose ops are recorded at this moment."""
        return self._stack[-1].id if self._stack and not self._paused else None

    # --- layer calls -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watching_layers(self) -> Iterator[None]:
        """Hook every layer of the model; the hooks are gone afterwards, whatever happens."""
        with contextlib.ExitStack() as stack:
            why = "what runs again in the backward pass is noted"
            stack.enter_context(wrapped(torch.utils.checkpoint, "checkpoint", self._watching_checkpoint, why))
            for name, layer in self._layers.items():
                if name in self.not_called:
                    continue
                handles = (
                    layer.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
                    layer.register_forward_hook(self._leave, with_kwargs=True),
                )
                for handle in handles:
                    stack.callback(handle.remove)
                if callable(layer.__dict__.get("activation")):
                    stack.callback(layer.__dict__.__setitem__, "activation", layer.activation)
                    layer.__dict__["activation"] = self._watching_activation(name, layer.activation)
            for name in sorted(self._inside):
                layer = self._layers[name]
                layer.__dict__["forward"] = functools.partial(self._forward, name, layer.forward)
                stack.callback(layer.__dict__.pop, "forward")
            yield

    def _enter(self, layer: keras.Layer, args: Any, kwargs: Any) -> None:
        name = self._names[id(layer)]
        self._must_be_inside(self._blocks.home_of_layer.get(name))
        if name in self._blocks.signatures:
            if name in self._called or self._recomputable:
                self.not_alone = name
                raise BlockNotAlone
            self._called.add(name)
        leaves = keras.tree.flatten((args, kwargs))
        inputs = tuple(
            (position, self.tensor_id(leaf)) for position, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)
        )
        parent = self._stack[-1].id if self._stack else None
        mode = call_mode(layer, args, kwargs)
        call = _OpenCall(len(self.calls), name, parent, mode, inputs, len(self.ops))
        self.calls[call.id] = Call(call.id, call.layer, parent, call.mode, inputs, (), (call.first_op, -1), None)
        self._stack.append(call)
        self._take(call)

    def _take(self, call: _OpenCall) -> None:
        """Note who took which tensors; inside a block that took a tensor, the block is the one."""
        outer = self._stack[:-1]
        for _, number in call.inputs:
            within = any(
                each.layer in self._blocks.signatures and number in dict(each.inputs).values() for each in outer
            )
            if number in self.with_grad and not within:
                self._takers.setdefault(number, {})[call.id] = self._blocks.signatures.get(call.layer, call.layer)

    def _leave(self, layer: keras.Layer, args: Any, kwargs: Any, outputs: Any) -> None:
        call = self._stack.pop()
        ids = tuple(self.tensor_id(leaf) for leaf in tree_flatten(outputs)[0] if isinstance(leaf, torch.Tensor))
        span = (call.first_op, len(self.ops))
        self.calls[call.id] = Call(
            call.id, call.layer, call.parent, call.mode, call.inputs, ids, span, call.core_output
        )

    def _watching_activation(self, layer: str, activation: Callable[..., Any]) -> Callable[..., Any]:
        def watched(x: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(x, torch.Tensor) and self._stack and self._stack[-1].layer == layer:
                self._stack[-1].core_output = self.tensor_id(x)
            return activation(x, *args, **kwargs)

        return watched

    def _watching_checkpoint(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(self._checkpoint, plain)

    def _checkpoint(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._recomputable += 1
        try:
            with ending_what_failed():
                return plain(*args, **kwargs)
        finally:
            self._recomputable -= 1

    # --- equal blocks ----------------------------------------------------------------------------------

    def _forward(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block, or let one op stand for all that an equal block did."""
        call, layers = self._stack[-1].id, [self._layers[each] for each in self._inside[name]]
        ends = BlockEnds(layers, (args, kwargs))
        key = None
        if self._known_repeats is None and not self._paused:
            key = self._blocks.signatures[name], self._inputs_signature((args, kwargs))
        known = self._known_repeats.get(call) if self._known_repeats is not None else None
        twin = self._twins.get(key) if known is None else known.twin
        if twin is not None:
            return self._repeat(name, twin, ends, layers)
        self._make_ready(name)
        result = forward(*args, **kwargs)
        self._ran[call] = _Ran(name, ends.close(result), *map(self._ids_of, (ends.given, ends.made)))
        if key is not None:
            self._twins[key] = call
        return result

    def _make_ready(self, name: str) -> None:
        with self.paused():
            self.prepare(list(self._blocks.variables.get(name, ())))

    def _ids_of(self, tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
        return tuple(map(self.tensor_id, tensors))

    def _inputs_signature(self, arguments: Any) -> Any:
        """Return what of a block's inputs its plan depends on.

        A tensor that has a gradient and was taken before is itself part of it, with who took it: crossing into one
        region after the other, it is converted once.
        """
        leaves, structure = leaves_and_masks(arguments), tree_flatten(arguments)[1]
        running = {call.id for call in self._stack}
        scope = get_autocast_scope()
        ids = [self.tensor_id(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]

        def described(leaf: Any, number: int | None) -> Any:
            if number is None:
                return repr(leaf)
            takers = {who for call, who in self._takers.get(number, {}).items() if call not in running}
            shared = (number, frozenset(takers)) if takers else None
            kind = (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad, number in self.trained)
            return (*kind, ids.index(number), shared)

        described_leaves = tuple(described(leaf, number) for leaf, number in zip(leaves, ids, strict=True))
        return str(structure), None if scope is None else scope.dtype, described_leaves

    def _repeat(self, name: str, twin: int, ends: BlockEnds, layers: Sequence[keras.Layer]) -> Any:
        """Write down one op for the whole block and return outputs like those of the block it repeats."""
        call, ran = self._stack[-1].id, self._ran[twin]
        with self.paused():
            made = [_empty(each, self._bases) for each in ran.result.made]
        inputs, outputs = self._ids_of(ends.given), self._ids_of(made)
        self._write(REPEAT, (tuple(map(TensorRef, range(len(inputs)))), {}), inputs, outputs)
        self.trained.update(tensor for tensor, other in zip(outputs, ran.made, strict=True) if other in self.trained)
        self.repeats[call] = Repeat(
            name,
            call,
            twin,
            tuple(zip(self._inside[ran.block], self._inside[name], strict=True)),
            tuple(zip(*(self._blocks.variables.get(block, ()) for block in (ran.block, name)), strict=True)),
            tuple(zip(ran.given, inputs, strict=True)),
            tuple(zip(ran.made, outputs, strict=True)),
        )
        ran.result.add_losses(ends.given, made, layers)
        return ran.result.returned(ends.given, made)


def _empty(made: MadeTensor, bases: dict[MadeTensor, torch.Tensor]) -> torch.Tensor:
    """Return an empty tensor like the one that was made; a view of one in ``bases``, which grows."""
    if made not in bases:
        base = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="cpu")
        bases[made] = base.requires_grad_(made.requires_grad)
    return bases[made].view_as(bases[made])
