"""The trace sees every layer call, op and tensor of a model, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import keras
import networkx as nx
import numpy as np
import pytest
import torch

from tests.models import CASES, usual
from tp_planner.frontend.layer_tree import named_layers, named_variables
from tp_planner.frontend.trace import trace
from tp_planner.ir.graph import ModelGraph
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.planner import make_plan


def calls_of(graph: ModelGraph, layer: str) -> list[Any]:
    return [call for call in graph.calls.values() if call.layer == layer]


def test_ops_form_one_graph_in_order() -> None:
    """Every op comes after those whose tensors it reads, and the output depends on every input."""
    graph = trace(CASES["gpt"].build())
    assert nx.is_directed_acyclic_graph(graph.flow)
    assert all(source < target for source, target in graph.flow.edges())
    producer = {tensor: op.id for op in graph.ops for tensor in op.outputs}
    before = nx.ancestors(graph.flow, producer[graph.outputs[0]])
    readers = {op.id for op in graph.ops if graph.inputs[0] in op.inputs}
    assert readers & before


def test_calls_nest_as_the_model_does() -> None:
    """Query, key and value run inside attention, which runs inside the model."""
    graph = trace(CASES["gpt"].build())
    attention = calls_of(graph, "block_0_attention")[0]
    for name in ("query", "key", "value", "attention_output"):
        (call,) = calls_of(graph, f"block_0_attention/{name}")
        assert call.parent == attention.id
        assert attention.ops[0] <= call.ops[0] < call.ops[1] <= attention.ops[1]
    assert graph.calls[attention.parent].layer == "gpt"


def test_a_layer_called_twice_has_two_calls() -> None:
    graph = trace(CASES["tied"].build())
    assert len(calls_of(graph, "up")) == 2
    assert [call.mode for call in calls_of(graph, "token_embedding")] == ["", "reverse"]
    assert sum(info.variable == "token_embedding/embeddings" for info in graph.tensors.values()) == 1


def test_gradients_are_known() -> None:
    """Gradients flow to what depends on trainable variables, and may flow later to what depends on frozen ones."""
    model = CASES["gpt"].build()
    graph = trace(model)
    assert not graph.tensors[graph.inputs[0]].requires_grad
    assert graph.tensors[graph.outputs[0]].has_gradient
    model.trainable = False
    frozen = trace(model)
    assert not any(info.has_gradient for info in frozen.tensors.values())
    assert frozen.tensors[frozen.outputs[0]].requires_grad


# Gemma keeps a number as a tensor, which Keras moves off the meta device: more ops.
@pytest.mark.parametrize("name", usual(sorted(set(CASES) - {"gemma"})))
def test_any_device_gives_the_same_graph(name: str) -> None:
    """A model on the meta device traces like one with values."""
    with keras.device("meta"):
        meta = CASES[name].build()
    graphs = [trace(model, training=True) for model in (CASES[name].build(), meta)]
    assert graphs[0].tensors == graphs[1].tensors
    assert [(op.name, op.inputs, op.outputs) for op in graphs[0].ops] == [
        (op.name, op.inputs, op.outputs) for op in graphs[1].ops
    ]
    assert all(variable._value.is_meta for variable in named_variables(meta).values())


def test_tensors_made_on_the_meta_device_are_traced() -> None:
    """A model that made a constant while it was built on the meta device makes the calls of any other."""
    with keras.device("meta"):
        meta = CASES["gemma"].build()
    graphs = [trace(model) for model in (CASES["gemma"].build(), meta)]
    calls = [[(call.layer, call.mode) for call in graph.calls.values()] for graph in graphs]
    assert calls[0] == calls[1]
    assert graphs[0].tensors[graphs[0].outputs[0]].shape == graphs[1].tensors[graphs[1].outputs[0]].shape


def test_the_model_is_left_as_it_was() -> None:
    """Values, batch statistics, seeds, losses, hooks and attributes are those from before."""
    inputs = keras.Input((8,))
    hidden = keras.layers.Dense(8, "relu", name="dense", kernel_regularizer="l2")(inputs)
    hidden = keras.layers.BatchNormalization(name="norm")(hidden)
    hidden = keras.layers.Dropout(0.5, seed=3, name="dropout")(hidden)
    model = keras.Model(inputs, keras.layers.ActivityRegularization(0.1, name="activity")(hidden))
    values = {key: variable._value for key, variable in named_variables(model).items()}
    arrays = {key: variable.numpy() for key, variable in named_variables(model).items()}
    activations = {name: getattr(layer, "activation", None) for name, layer in named_layers(model).items()}
    state = torch.get_rng_state()
    trace(model, training=True)
    for key, variable in named_variables(model).items():
        assert variable._value is values[key]
        np.testing.assert_array_equal(variable.numpy(), arrays[key])
    for name, layer in named_layers(model).items():
        assert getattr(layer, "activation", None) is activations[name]
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks
        assert "forward" not in layer.__dict__
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not isinstance(loss, torch._subclasses.FakeTensor) for loss in model.losses)


def test_inputs_and_outputs_of_any_structure() -> None:
    """Several inputs by name and several outputs are all seen."""
    left, right = keras.Input((4,), name="left"), keras.Input((6,), name="right")
    both = keras.layers.Concatenate(name="both")([left, right])
    outputs = {"sum": keras.layers.Dense(3, name="sum")(both), "pair": [both, keras.layers.Dense(2, name="p")(both)]}
    graph = trace(keras.Model({"left": left, "right": right}, outputs))
    assert sorted(graph.tensors[tensor].shape for tensor in graph.inputs) == [(2, 4), (2, 6)]
    assert sorted(graph.tensors[tensor].shape for tensor in graph.outputs) == [(2, 2), (2, 3), (2, 10)]


@pytest.mark.parametrize(
    "inputs", [np.zeros((3, 5, 4), "float32"), keras.InputSpec(shape=(3, 5, 4)), torch.zeros(3, 5, 4)]
)
def test_example_inputs_give_the_shapes(inputs: Any) -> None:
    dense = keras.layers.Dense(2, name="dense")
    model = keras.Sequential([dense], name="open")
    model.build((None, None, 4))
    graph = trace(model, inputs)
    assert graph.tensors[graph.outputs[0]].shape == (3, 5, 2)


class Keeps(keras.layers.Layer):
    """Keeps what it has made: in an attribute, in a container that was there, and in a new one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.last, self.known = None, {"first": 1.0, "all": []}

    def call(self, x: Any) -> Any:
        y = x * 2
        self.last, self.known["last"] = y, y
        self.known["all"].append(y)
        self.new = (y,)
        return y


class Buffered(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = self.mean + x.mean(0).detach()
        return x + self.mean


def test_planning_leaves_no_fake_tensors() -> None:
    """What layers keep in attributes, containers and buffers is as it was before the model was planned."""
    inputs = keras.Input((4,))
    x = keras.layers.TorchModuleWrapper(Buffered(), output_shape=(None, 4), name="torch")(Keeps(name="keeps")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(4, name="up")(x))
    keeps, module = model.get_layer("keeps"), model.get_layer("torch").module
    keeps.last, keeps.known = None, {"first": 1.0, "all": []}
    vars(keeps).pop("new", None)
    buffer = module.mean = torch.ones(4)
    make_plan(model, Layout(Mesh((("model", 2),)), (LayoutRule("up/kernel", (None, "model")),)))
    assert (keeps.last, keeps.known) == (None, {"first": 1.0, "all": []})
    assert "new" not in vars(keeps)
    assert module.mean is buffer
