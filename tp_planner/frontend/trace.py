"""Trace: run a built Keras model once on fake tensors and record its graph.

Nothing is computed and nothing is allocated: torch's FakeTensorMode propagates shapes and dtypes, a dispatch
mode below autograd sees every ATen op, and module hooks see every layer call. The model is left as it was.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import keras
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tp_planner.frontend.blocks import layer_signature
from tp_planner.frontend.contractions import call_mode
from tp_planner.frontend.layer_tree import named_layers, named_variables, own_variables
from tp_planner.frontend.quiet import quiet_torch
from tp_planner.frontend.survey import survey
from tp_planner.ir.errors import PlanError, in_one_line
from tp_planner.ir.graph import Call, ModelGraph, Op, TensorInfo, TensorRef, VariableInfo

BATCH_SIZE = 2  # size given to an open batch dim
CONSTANT_SIZE = 64  # how many values of a constant tensor are compared
OPEN_DIM = 16  # size given to any other open dim


def trace(model: keras.Model, inputs: Any = None, *, training: bool = False) -> ModelGraph:
    """Return the graph of one call of ``model``.

    Args:
        model: a built Keras model (Functional, Sequential or subclassed), on any device, "meta" included.
        inputs: example inputs: arrays, tensors, ``keras.KerasTensor`` or ``keras.InputSpec``, nested as the
            model takes them. Only shapes and dtypes are read. By default the model's own input specification.
        training: trace the call with ``training=True``.

    Raises:
        PlanError: if the model is not built, its inputs are unknown, or it cannot run on fake tensors.
    """
    require_built(model)
    with fake_tensors():
        arguments = fake_inputs(model, inputs)
        try:
            originals = {id(variable._value): key for key, variable in named_variables(model).items()}
            with fake_variables(model):
                recorder = Recorder(model)
                recorder.also_known_as(originals)
                outputs = run_recorded(model, arguments, recorder, training)
        except CapturedVariable as error:
            raise PlanError(
                f"model {model.name!r} cannot be planned: {in_one_line(error).partition(': ')[2]}"
            ) from error
        except Exception as error:
            raise PlanError(
                f"model {model.name!r} cannot be traced with inputs {describe_inputs(arguments)}: "
                f"{in_one_line(error)}; "
                f"pass plan(..., inputs=) with inputs that model(inputs) accepts"
            ) from error
    return build_graph(model, recorder, training, outputs)


def require_built(model: Any) -> None:
    """Raise PlanError unless ``model`` is a built Keras model on the torch backend."""
    if keras.backend.backend() != "torch":
        raise PlanError(
            f"Keras runs on the {keras.backend.backend()!r} backend; set KERAS_BACKEND=torch before importing keras"
        )
    if not isinstance(model, keras.Model):
        raise PlanError(f"expected a keras.Model, got {type(model).__name__}")
    if not model.built or not named_variables(model):
        raise PlanError(
            f"model {model.name!r} is not built, so it has no variables to plan; "
            f"call it once on data or call model.build(input_shape)"
        )


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Run Keras on fake CPU tensors: no arithmetic, no memory, no random numbers drawn."""
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    no_generator = mock.patch("keras.src.backend.torch.random.torch_seed_generator", lambda seed: None)
    with keras.device("cpu"), no_generator, quiet_torch(), torch.enable_grad(), fake_mode:
        yield


@contextlib.contextmanager
def fake_variables(model: keras.Model) -> Iterator[None]:
    """Give every variable a fake CPU value; inside fake_tensors.

    So a model on any device gives the same trace. Gradients flow to all variables, because a frozen layer can be
    trained later under the same plan.
    """
    values = {key: variable._value for key, variable in named_variables(model).items()}
    try:
        for key, variable in named_variables(model).items():
            fake = torch.empty(tuple(variable.shape), dtype=values[key].dtype, device="cpu")
            variable._value = torch.nn.Parameter(fake, requires_grad=fake.is_floating_point())
        yield
    finally:
        for key, variable in named_variables(model).items():
            variable._value = values[key]


def fake_inputs(model: keras.Model, inputs: Any) -> Any:
    """Return fake tensors nested as the model takes its inputs."""
    if inputs is None:
        inputs = _declared_inputs(model)
    return keras.tree.map_structure(_fake_tensor, inputs)


def _fake_tensor(spec: Any) -> torch.Tensor:
    sizes = [OPEN_DIM if size is None else size for size in spec.shape]
    if sizes and spec.shape[0] is None:
        sizes[0] = BATCH_SIZE
    dtype = keras.backend.standardize_dtype(spec.dtype or keras.config.floatx())
    from keras.src.backend.torch.core import to_torch_dtype

    return torch.empty(sizes, dtype=to_torch_dtype(dtype), device="cpu")


def _declared_inputs(model: keras.Model) -> Any:
    if isinstance(model, keras.Sequential) and model._functional is not None:
        return model._functional._inputs_struct
    if hasattr(model, "_inputs_struct"):
        return model._inputs_struct
    shapes = list((getattr(model, "_build_shapes_dict", None) or {}).values())
    if len(shapes) != 1:
        raise PlanError(
            f"the inputs of subclassed model {model.name!r} are not known; "
            f"pass plan(..., inputs=) with an example batch or keras.InputSpec"
        )
    shape = shapes[0]
    if isinstance(shape, dict):
        return {name: keras.InputSpec(shape=tuple(sizes)) for name, sizes in shape.items()}
    if shape and isinstance(shape[0], list | tuple):
        return [keras.InputSpec(shape=tuple(sizes)) for sizes in shape]
    return keras.InputSpec(shape=tuple(shape))


def describe_inputs(arguments: Any) -> str:
    """Return shapes and dtypes of the inputs, for errors."""
    tensors = keras.tree.flatten(arguments)
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)


def run_recorded(model: keras.Model, arguments: Any, recorder: Recorder, training: bool) -> list[torch.Tensor]:
    """Call the model under the recorder and return its flattened outputs, and the losses that layers added."""
    options = {"training": training} if model._call_has_training_arg else {}
    with recorder.watching_layers(), recorder:
        outputs = model(arguments, **options)
    losses = [loss for layer in model._flatten_layers() for loss in layer._losses]
    model._clear_losses()
    return [leaf for leaf in tree_flatten((outputs, losses))[0] if isinstance(leaf, torch.Tensor)]


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


class CapturedVariable(Exception):
    """The model uses a tensor that was computed from a variable before the call."""


@dataclass(frozen=True)
class _Block:
    """A recorded run of a layer with inner layers: which ops, calls and tensors it made, for running it again."""

    layers: tuple[str, ...]
    variables: tuple[str, ...]
    first_op: int
    first_call: int
    first_tensor: int
    end: tuple[int, int, int]  # of ops, calls and tensors
    call: int
    inputs: tuple[int, ...]
    outputs: tuple[tuple[bool, Any], ...]  # leaves: (True, id of a tensor) or (False, any other value)
    structure: Any


class Recorder(TorchDispatchMode):
    """Sees every ATen op and every layer call of a model and writes them down.

    A layer equal to one that has run already, on inputs of the same shapes, is not run: what its twin did is
    written down for it. ``distinguish`` returns what else has to be equal, by the layer's name.
    """

    def __init__(self, model: keras.Model, distinguish: Callable[[str], Hashable] = lambda name: None) -> None:
        super().__init__()
        self._distinguish = distinguish
        self._signatures: dict[int, Hashable] = {}
        self._blocks: dict[Hashable, _Block] = {}
        self._layers = named_layers(model)
        self._names = {id(layer): name for name, layer in self._layers.items()}
        variables = named_variables(model)
        self.ops: list[Op] = []
        self.calls: dict[int, Call] = {}
        self.tensors: dict[int, TensorInfo] = {}
        self._alive: list[torch.Tensor] = []
        self._ids: dict[int, int] = {}
        self.with_grad: set[int] = set()
        self._constants: dict[int, Any] = {}
        self._stack: list[_OpenCall] = []
        self._paused = 0
        self._variables = variables
        self._keys = {id(variable): key for key, variable in variables.items()}
        self._variable_of = {id(variable._value): key for key, variable in variables.items()}

    # --- tensors ---------------------------------------------------------------------------------------

    def also_known_as(self, keys: dict[int, str]) -> None:
        """Know the variables by other tensors too, given by ``id``: a torch module reads its own parameters."""
        self._variable_of = keys | self._variable_of

    def tensor_id(self, tensor: torch.Tensor) -> int:
        """Return the id of a tensor, a new one where it was not met before."""
        known = self._ids.get(id(tensor))
        if known is None:
            known = self._add(tensor, self._variable_of.get(id(tensor)))
            if not isinstance(tensor, FakeTensor) and self.tensors[known].variable is None:
                self._constants[known] = self._constant(tensor)
        if tensor.requires_grad:
            self.with_grad.add(known)
        return known

    def _constant(self, tensor: torch.Tensor) -> Any:
        """Return the value of a real tensor that the model's code made or kept."""
        if tensor.requires_grad:
            raise CapturedVariable(
                f"layer {self.running_layer!r} uses a tensor of shape {tuple(tensor.shape)} that was computed from a "
                f"variable when the model was built and does not follow it; compute it in a layer's call instead"
            )
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
        return number

    # --- ops -------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused or not self._stack or func.namespace == "prim":
            return func(*args, **kwargs)
        inputs: list[int] = []

        def reference(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            inputs.append(self.tensor_id(leaf))
            return TensorRef(len(inputs) - 1)

        arguments = tree_map(reference, (args, kwargs))
        result = func(*args, **kwargs)
        outputs = [self._add(leaf) for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]
        self.ops.append(
            Op(
                id=len(self.ops),
                name=str(func),
                call=self._stack[-1].id,
                arguments=arguments,
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                random=torch.Tag.nondeterministic_seeded in func.tags,
                constants=tuple(self._constants[number] for number in inputs if number in self._constants),
            )
        )
        return result

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

    # --- layer calls -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watching_layers(self) -> Iterator[None]:
        """Hook every layer of the model; the hooks are gone afterwards, whatever happens."""
        repeated = self._repeated_layers()  # compares attributes, so before any is replaced
        with contextlib.ExitStack() as stack:
            for layer in self._layers.values():
                handles = (
                    layer.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
                    layer.register_forward_hook(self._leave, with_kwargs=True),
                )
                for handle in handles:
                    stack.callback(handle.remove)
                if callable(getattr(layer, "activation", None)):
                    stack.enter_context(self._watching_activation(layer))
            for layer in repeated:
                layer.__dict__["forward"] = functools.partial(self._forward, layer, layer.forward)
                stack.callback(layer.__dict__.pop, "forward")
            yield

    # --- equal blocks ----------------------------------------------------------------------------------

    def _repeated_layers(self) -> list[keras.Layer]:
        """Return the layers with inner layers that have an equal somewhere in the model."""
        composite = [layer for layer in list(self._layers.values())[1:] if layer._layers]
        counts = Counter(layer_signature(layer, self._signatures) for layer in composite)
        return [layer for layer in composite if counts[self._signatures[id(layer)]] > 1]

    def _forward(self, layer: keras.Layer, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the layer, or write down what an equal one did."""
        leaves, structure = tree_flatten((args, kwargs))
        if self._paused or any(hasattr(leaf, "_keras_mask") for leaf in leaves):
            return forward(*args, **kwargs)
        names = self._names_below(layer)
        key = (
            self._signatures[id(layer)],
            tuple(self._distinguish(name) for name in names),
            str(structure),
            self._inputs_signature(leaves),
        )
        variables = tuple(self._keys[id(v)] for name in names for v in own_variables(self._layers[name]))
        inputs = tuple(self.tensor_id(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))
        if key in self._blocks:
            return self._again(self._blocks[key], names, variables, inputs)
        start = (len(self.ops), len(self.calls), len(self.tensors))
        outputs = forward(*args, **kwargs)
        given, output_structure = tree_flatten(outputs)
        if not any(hasattr(leaf, "_keras_mask") for leaf in given):
            self._blocks[key] = _Block(
                layers=names,
                variables=variables,
                first_op=start[0],
                first_call=start[1],
                first_tensor=start[2],
                end=(len(self.ops), len(self.calls), len(self.tensors)),
                call=self._stack[-1].id,
                inputs=inputs,
                outputs=tuple((True, self.tensor_id(x)) if isinstance(x, torch.Tensor) else (False, x) for x in given),
                structure=output_structure,
            )
        return outputs

    def _names_below(self, layer: keras.Layer) -> tuple[str, ...]:
        names, seen = [], set()

        def walk(each: keras.Layer) -> None:
            if id(each) not in seen:
                seen.add(id(each))
                names.append(self._names[id(each)])
                for child in each._layers:
                    walk(child)

        walk(layer)
        return tuple(names)

    def _inputs_signature(self, leaves: list[Any]) -> Hashable:
        scope = keras.src.backend.get_autocast_scope()
        ids = [self.tensor_id(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
        return (
            None if scope is None else scope.dtype,
            tuple(
                (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad, ids.index(number))
                if isinstance(leaf, torch.Tensor)
                else repr(leaf)
                for leaf, number in zip(leaves, ids, strict=True)
            ),
        )

    def _again(self, block: _Block, names: tuple[str, ...], variables: tuple[str, ...], inputs: tuple[int, ...]) -> Any:
        """Write down a block's ops and calls once more, for other layers, and return outputs of the same shapes."""
        layer_of = dict(zip(block.layers, names, strict=True))
        variable_of = dict(zip(block.variables, variables, strict=True))
        tensors = dict(zip(block.inputs, inputs, strict=True))
        for number in range(block.first_tensor, block.end[2]):
            info = self.tensors[number]
            if info.variable in variable_of:
                tensors[number] = self.tensor_id(self._variables[variable_of[info.variable]]._value)
            else:
                tensors[number] = len(self.tensors)
                self.tensors[tensors[number]] = replace(info, id=tensors[number])
            if number in self.with_grad:
                self.with_grad.add(tensors[number])
        op_shift, call_shift = len(self.ops) - block.first_op, len(self.calls) - block.first_call
        calls = {block.call: self._stack[-1].id}
        calls |= {number: number + call_shift for number in range(block.first_call, block.end[1])}
        for op in self.ops[block.first_op : block.end[0]]:
            self.ops.append(
                Op(
                    op.id + op_shift,
                    op.name,
                    calls[op.call],
                    op.arguments,
                    tuple(tensors.get(tensor, tensor) for tensor in op.inputs),
                    tuple(tensors[tensor] for tensor in op.outputs),
                    op.random,
                    op.constants,
                )
            )
        for number in range(block.first_call, block.end[1]):
            call = self.calls[number]
            self.calls[calls[number]] = Call(
                id=calls[number],
                layer=layer_of[call.layer],
                parent=None if call.parent is None else calls[call.parent],
                mode=call.mode,
                inputs=tuple((position, tensors.get(tensor, tensor)) for position, tensor in call.inputs),
                outputs=tuple(tensors.get(tensor, tensor) for tensor in call.outputs),
                ops=(call.ops[0] + op_shift, call.ops[1] + op_shift),
                core_output=None if call.core_output is None else tensors[call.core_output],
            )
        leaves = [self._stand_in(tensors.get(leaf, leaf)) if is_tensor else leaf for is_tensor, leaf in block.outputs]
        return tree_unflatten(leaves, block.structure)

    def _stand_in(self, number: int) -> torch.Tensor:
        """Return a fake tensor for a tensor that was only written down."""
        info = self.tensors[number]
        with self.paused():
            tensor = torch.empty_strided(info.shape, info.stride, dtype=getattr(torch, info.dtype), device="cpu")
            if number in self.with_grad:
                tensor = tensor.requires_grad_().view_as(tensor)
        self._alive.append(tensor)
        self._ids[id(tensor)] = number
        return tensor

    def _enter(self, layer: keras.Layer, args: Any, kwargs: Any) -> None:
        leaves = keras.tree.flatten((args, kwargs))
        inputs = tuple(
            (position, self.tensor_id(leaf)) for position, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)
        )
        parent = self._stack[-1].id if self._stack else None
        mode = call_mode(layer, args, kwargs)
        call = _OpenCall(len(self.calls), self._names[id(layer)], parent, mode, inputs, len(self.ops))
        self.calls[call.id] = Call(call.id, call.layer, parent, call.mode, inputs, (), (call.first_op, -1), None)
        self._stack.append(call)

    def _leave(self, layer: keras.Layer, args: Any, kwargs: Any, outputs: Any) -> None:
        call = self._stack.pop()
        ids = tuple(self.tensor_id(leaf) for leaf in tree_flatten(outputs)[0] if isinstance(leaf, torch.Tensor))
        span = (call.first_op, len(self.ops))
        self.calls[call.id] = Call(
            call.id, call.layer, call.parent, call.mode, call.inputs, ids, span, call.core_output
        )

    @contextlib.contextmanager
    def _watching_activation(self, layer: keras.Layer) -> Iterator[None]:
        activation = layer.activation

        def watched(x: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(x, torch.Tensor) and self._stack and self._stack[-1].layer == self._names[id(layer)]:
                self._stack[-1].core_output = self.tensor_id(x)
            return activation(x, *args, **kwargs)

        layer.__dict__["activation"] = watched
        try:
            yield
        finally:
            layer.__dict__["activation"] = activation


def build_graph(model: keras.Model, recorder: Recorder, training: bool, outputs: list[torch.Tensor]) -> ModelGraph:
    """Return what the recorder saw as a ModelGraph."""
    output_ids = tuple(recorder.tensor_id(leaf) for leaf in outputs)
    layers, variables = survey(model)
    return ModelGraph(
        model_name=model.name,
        training=training,
        layers=layers,
        variables=variables,
        tensors=_tensors(recorder, variables),
        calls=dict(recorder.calls),
        ops=tuple(recorder.ops),
        inputs=tuple(tensor for _, tensor in recorder.calls[0].inputs),
        outputs=output_ids,
    )


def _tensors(recorder: Recorder, variables: dict[str, VariableInfo]) -> dict[int, TensorInfo]:
    """Return the recorder's tensors with what is known of gradients, now that all ops were seen."""
    trained = {
        number for number, info in recorder.tensors.items() if info.variable and variables[info.variable].trainable
    }
    for op in recorder.ops:
        if any(tensor in trained for tensor in op.inputs):
            trained.update(op.outputs)
    with_grad = recorder.with_grad
    return {
        number: replace(info, requires_grad=number in with_grad, has_gradient=number in with_grad and number in trained)
        for number, info in recorder.tensors.items()
    }
