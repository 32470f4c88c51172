"""Trace: run a built Keras model once on fake tensors and record its graph.

Nothing is computed and nothing is allocated: torch's FakeTensorMode propagates shapes and dtypes, a dispatch
mode below autograd sees every ATen op, and module hooks see every layer call. The model is left as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import keras
import torch
from keras.src.backend.torch import random as keras_random
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten

from tp_planner.frontend.blocks import Blocks
from tp_planner.frontend.fake_mode import FakeCpuMode
from tp_planner.frontend.functions import FunctionRecorder
from tp_planner.frontend.inputs import CallArguments, describe_inputs, fake_inputs
from tp_planner.frontend.kept_tensors import no_fakes_left
from tp_planner.frontend.keras_internals import core
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.frontend.quiet import quiet_torch
from tp_planner.frontend.recorder import BlockNotAlone, CapturedVariable, Recorder
from tp_planner.frontend.survey import survey
from tp_planner.ir.errors import PlanError, in_one_line
from tp_planner.ir.graph import LayerInfo, ModelGraph, VariableInfo
from tp_planner.patches import replaced


def trace(
    model: keras.Model,
    inputs: Any = None,
    *,
    training: bool = False,
    blocks: Blocks | None = None,
    functions: bool = False,
    surveyed: tuple[dict[str, LayerInfo], dict[str, VariableInfo]] | None = None,
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
        surveyed: the model's layers and variables as ``survey`` returns them, where that has been asked.

    Raises:
        PlanError: if the model is not built, its inputs are unknown, or it cannot run on fake tensors.
    """
    require_built(model)
    with fake_tensors():
        arguments = fake_inputs(model, inputs)
        try:
            layers, variables = surveyed or survey(model)
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
            known = layers, variables
            return trace(model, inputs, training=training, blocks=others, functions=functions, surveyed=known)
        except CapturedVariable as error:
            raise PlanError(
                f"model {model.name!r} cannot be planned: {in_one_line(error).partition(': ')[2]}"
            ) from error
        except Exception as error:
            remedy = "call model(inputs) on them to see whether it accepts them"
            if inputs is None or CallArguments.of(inputs).are_declared:
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
        stack.enter_context(torch.autograd.set_detect_anomaly(False))  # it looks at values
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
        self._first: dict[Any, Any] = {}  # fake tensors by shape and dtype

    def __enter__(self) -> FakeVariables:
        return self

    def make(self, keys: Iterable[str]) -> list[str]:
        """Give the variables of these keys fake values, if they have none; return the keys of those that had none."""
        new = [key for key in keys if key not in self._values]
        for key in new:
            variable = self._variables[key]
            self._values[key] = variable._value
            fake = self._fake(tuple(variable.shape), variable._value.dtype)
            fake._is_param = True  # all that makes a parameter of a tensor nobody else has
            variable._value = fake.requires_grad_(fake.is_floating_point())
        return new

    def _fake(self, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        first: Any = self._first.get((shape, dtype))
        if first is None:
            first = self._first[shape, dtype] = torch.empty(shape, dtype=dtype, device="cpu")
        return first.fake_mode.another(first)

    def __exit__(self, *error: object) -> None:
        for key, value in self._values.items():
            self._variables[key]._value = value


def run_recorded(
    model: keras.Model, arguments: CallArguments, recorder: Recorder, training: bool
) -> list[torch.Tensor]:
    """Call the model under the recorder and return its flattened outputs, and the losses that layers added.

    Layers keep afterwards what they kept before, so that the next call finds the same.
    """
    with no_fakes_left(model, recorder.not_called), recorder.watching_layers(), recorder:
        outputs = arguments.call(model, training)
        losing = [layer for layer in model._flatten_layers() if layer._losses]
        losses = [loss for layer in losing for loss in layer._losses]
    for layer in losing:
        layer._clear_losses()
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
