"""Trace: run a built Keras model once on fake tensors and record its graph.

Nothing is computed and nothing is allocated: torch's FakeTensorMode propagates shapes and dtypes, a dispatch
mode below autograd sees every ATen op, and module hooks see every layer call. The model is left as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import torch
from keras.src.backend.torch import random as keras_random
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten

from tp_planner.frontend.blocks import Blocks
from tp_planner.frontend.fake_mode import FakeCpuMode
from tp_planner.frontend.functions import FunctionRecorder
from tp_planner.frontend.kept_tensors import no_fakes_left
from tp_planner.frontend.keras_internals import core, to_torch_dtype
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.frontend.quiet import quiet_torch
from tp_planner.frontend.recorder import BlockNotAlone, CapturedVariable, Recorder
from tp_planner.frontend.survey import survey
from tp_planner.ir.errors import PlanError, in_one_line
from tp_planner.ir.graph import LayerInfo, ModelGraph, VariableInfo
from tp_planner.patches import replaced

BATCH_SIZE = 2  # size given to an open batch dim
OPEN_DIM = 16  # size given to any other open dim


@dataclass(frozen=True, slots=True)
class CallArguments:
    """What a model is called with: the call's first argument, nested as the model takes it, and others by name.

    Arguments that are no tensors, and have no shape, are passed on as they are.
    """

    first: Any
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Any) -> CallArguments:
        """Return the arguments where ``inputs`` are these, or the first of them."""
        return inputs if isinstance(inputs, CallArguments) else cls(inputs)

    def map(self, function: Callable[[Any], Any]) -> CallArguments:
        """Return the arguments with the function's results in place of all that have a shape."""
        first, others = keras.tree.map_structure(
            lambda leaf: function(leaf) if hasattr(leaf, "shape") else leaf, (self.first, dict(self.others))
        )
        return CallArguments(first, others)

    @property
    def tensors(self) -> list[Any]:
        """All that have a shape, in order."""
        return [leaf for leaf in keras.tree.flatten((self.first, dict(self.others))) if hasattr(leaf, "shape")]

    def call(self, model: keras.Model, training: bool) -> Any:
        """Return what the model makes of the arguments."""
        options = {"training": training} if model._call_has_training_arg else {}
        return model(self.first, **self.others, **options)


def trace(
    model: keras.Model,
    inputs: Any = None,
    *,
    training: bool = False,
    blocks: Blocks | None = None,
    functions: bool = False,
) -> ModelGraph:
    """Return the graph of one call of ``model``.

    Args:
        model: a built Keras model (Functional, Sequential or subclassed), on any device, "meta" included.
        inputs: example inputs: arrays, tensors, ``keras.KerasTensor`` or ``keras.InputSpec``, nested as the
            model takes them, or ``CallArguments`` of these. Only shapes and dtypes are read. By default the model's
            own input specification.
        training: trace the call with ``training=True``.
        blocks: which layers are planned alike; of equal ones only the first is run.
        functions: record the calls of torch functions too.

    Raises:
        PlanError: if the model is not built, its inputs are unknown, or it cannot run on fake tensors.
    """
    require_built(model)
    with fake_tensors():
        arguments = fake_inputs(model, inputs)
        try:
            layers, variables = survey(model)
            trainable = frozenset(key for key, variable in variables.items() if variable.trainable)
            # Made before the variables are fake: a torch module inside the model reads its own parameters.
            recorder = Recorder(model, blocks, trainable)
            with FakeVariables(model) as fakes:
                inside = set() if blocks is None else set(blocks.home_of_variable)
                recorder.prepare = lambda keys: recorder.know(fakes.make(keys))
                recorder.prepare([key for key in variables if key not in inside])
                seen = FunctionRecorder(recorder) if functions else None
                with seen or contextlib.nullcontext():
                    outputs = run_recorded(model, arguments, recorder, training)
        except BlockNotAlone:
            assert blocks is not None
            others = blocks.without(recorder.not_alone)
            return trace(model, inputs, training=training, blocks=others, functions=functions)
        except CapturedVariable as error:
            raise PlanError(
                f"model {model.name!r} cannot be planned: {in_one_line(error).partition(': ')[2]}"
            ) from error
        except Exception as error:
            remedy = "call model(inputs) on them to see whether it accepts them"
            if inputs is None:
                remedy = "pass plan(..., inputs=) with inputs that model(inputs) accepts"
            raise PlanError(
                f"model {model.name!r} cannot be traced with inputs {describe_inputs(arguments)}: "
                f"{in_one_line(error)}; "
                f"{remedy}"
            ) from error
    graph = _build_graph(model, layers, variables, recorder, training, outputs)
    return replace(graph, functions=tuple(seen.functions)) if seen else graph


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
    no_generator = replaced(keras_random, "torch_seed_generator", lambda seed: None, "fake tensors draw nothing")
    # Fake views then work out strides by arithmetic, not by the walk over prims that symbolic shapes need.
    plain_views = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    no_values = replaced(core, "cond", _cond_without_values, "fake tensors have no values")
    with contextlib.ExitStack() as stack:
        for context in (keras.device("cpu"), no_generator, no_values, quiet_torch(), torch.enable_grad(), plain_views):
            stack.enter_context(context)
        stack.enter_context(FakeCpuMode(allow_non_fake_inputs=True))
        yield


_cond = core.cond


@contextlib.contextmanager
def conditions_need_values() -> Iterator[None]:
    """Inside fake_tensors, a condition on a fake tensor fails, as on any tensor without a value."""
    with replaced(core, "cond", _cond, "code that needs a value is refused"):
        yield


def _cond_without_values(pred: Any, true_fn: Any, false_fn: Any) -> Any:
    """Take the branch for False where the condition is a fake tensor, which has no value.

    Of Keras's layers only SpectralNormalization asks: whether its kernel is all zero, which no trained one is.
    """
    return false_fn() if isinstance(pred, FakeTensor) else _cond(pred, true_fn, false_fn)


class FakeVariables:
    """Gives variables fake CPU values, and their own again on exit; inside fake_tensors.

    So a model on any device gives the same trace. Gradients flow to all variables, because a frozen layer can be
    trained later under the same plan.
    """

    def __init__(self, model: keras.Model) -> None:
        self._variables = named_variables(model)
        self._values: dict[str, Any] = {}

    def __enter__(self) -> FakeVariables:
        return self

    def make(self, keys: Iterable[str]) -> list[str]:
        """Give the variables of these keys fake values, if they have none; return the keys of those that had none."""
        new = [key for key in keys if key not in self._values]
        for key in new:
            variable = self._variables[key]
            self._values[key] = variable._value
            fake = torch.empty(tuple(variable.shape), dtype=variable._value.dtype, device="cpu")
            variable._value = torch.nn.Parameter(fake, requires_grad=fake.is_floating_point())
        return new

    def __exit__(self, *error: object) -> None:
        for key, value in self._values.items():
            self._variables[key]._value = value


def fake_inputs(model: keras.Model, inputs: Any) -> CallArguments:
    """Return fake tensors nested as the model takes its inputs."""
    return CallArguments.of(_declared_inputs(model) if inputs is None else inputs).map(_fake_tensor)


def batched_inputs(model: keras.Model, batch: int) -> Any:
    """Return the model's own input specification with ``batch`` as the size of the open batch dims.

    Raises PlanError if a batch dim is of another size, or the inputs are unknown.
    """

    def batched(spec: Any) -> keras.InputSpec:
        shape = tuple(spec.shape)
        if shape and shape[0] not in (None, batch):
            raise PlanError(
                f"an input of model {model.name!r} has batch size {shape[0]}, not {batch}; build it with an open one"
            )
        return keras.InputSpec(shape=(batch, *shape[1:]) if shape else shape, dtype=spec.dtype)

    return keras.tree.map_structure(batched, _declared_inputs(model))


def _fake_tensor(spec: Any) -> torch.Tensor:
    sizes = [OPEN_DIM if size is None else size for size in spec.shape]
    if sizes and spec.shape[0] is None:
        sizes[0] = BATCH_SIZE
    dtype = keras.backend.standardize_dtype(spec.dtype or keras.config.floatx())
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


def describe_inputs(arguments: CallArguments) -> str:
    """Return shapes and dtypes of the inputs, for errors."""
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in arguments.tensors)


def run_recorded(
    model: keras.Model, arguments: CallArguments, recorder: Recorder, training: bool
) -> list[torch.Tensor]:
    """Call the model under the recorder and return its flattened outputs, and the losses that layers added.

    Layers keep afterwards what they kept before, so that the next call finds the same.
    """
    with no_fakes_left(model), recorder.watching_layers(), recorder:
        outputs = arguments.call(model, training)
        losses = [loss for layer in model._flatten_layers() for loss in layer._losses]
    model._clear_losses()
    return [leaf for leaf in tree_flatten((outputs, losses))[0] if isinstance(leaf, torch.Tensor)]


def _build_graph(
    model: keras.Model,
    layers: dict[str, LayerInfo],
    variables: dict[str, VariableInfo],
    recorder: Recorder,
    training: bool,
    outputs: list[torch.Tensor],
) -> ModelGraph:
    """Return what the recorder saw as a ModelGraph."""
    output_ids = tuple(recorder.tensor_id(leaf) for leaf in outputs)
    with_grad, trained = recorder.with_grad, recorder.with_grad & recorder.trained
    tensors = {
        number: replace(info, requires_grad=number in with_grad, has_gradient=number in trained)
        for number, info in recorder.tensors.items()
    }
    return ModelGraph(
        model_name=model.name,
        training=training,
        layers=layers,
        variables=variables,
        tensors=tensors,
        calls=recorder.calls,
        ops=tuple(recorder.ops),
        inputs=tuple(tensor for _, tensor in recorder.calls[0].inputs),
        outputs=output_ids,
        repeats=recorder.repeats,
        own_gradients=frozenset(recorder.own_gradients()),
    )
