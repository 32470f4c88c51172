"""What is made element by element is made again in the backward pass: the same bits, from less memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
import torch

import tp_planner
from tests.dryrun.test_simulation import Measured, measure
from tests.models import CASES
from tests.workers import Pools, layout_map
from tp_planner.dryrun.repeats import saved_tensors
from tp_planner.frontend.functions import is_elementwise
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.ir.layout import Layout
from tp_planner.ir.mesh import Mesh
from tp_planner.passes import make_again
from tp_planner.regions.calls import looking_at_what_is_kept
from tp_planner.regions.left_out import watching
from tp_planner.regions.made_again import keep_what_is_returned, made_again

Arrays = dict[str, np.ndarray]
Around = Callable[[], AbstractContextManager[Any]]
Function = Callable[[torch.Tensor], torch.Tensor]
ONE_RANK = Layout(Mesh((("model", 1),)), ())


def however_small() -> AbstractContextManager[Any]:
    return mock.patch.object(make_again, "LEAST_BYTES", 0)


def kept_by_somebody() -> AbstractContextManager[Any]:
    """Return a context in which somebody else says what autograd keeps: all of it, elsewhere."""
    return torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept)


# Functions of a narrow tensor, as code in layers calls them


def again(name: str, *args: Any, **kwargs: Any) -> Any:
    assert is_elementwise(name)
    return made_again(getattr(torch, name, None) or getattr(torch.nn.functional, name), *args, **kwargs)


def wide(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = made_again(torch.Tensor.to, x, torch.float32)
    return result


def norm(x: torch.Tensor) -> torch.Tensor:
    scale = torch.linspace(0.5, 1.5, x.shape[-1])
    wider = wide(x)
    variance = again("pow", wider, torch.tensor(2.0)).mean(-1, keepdim=True)
    return again("mul", again("mul", wider, again("rsqrt", variance)), scale)


def activations(x: torch.Tensor) -> torch.Tensor:
    wider = wide(x)
    return again("sigmoid", wider) * again("silu", wider) + again("tanh", again("exp", wider))


def views(x: torch.Tensor) -> torch.Tensor:
    wider = wide(x).reshape(2, -1).T
    return again("mul", wider, wider[:, :1]) * again("pow", wider[1:].expand(2, *wider[1:].shape), 3)[:, :1]


def masked(x: torch.Tensor) -> torch.Tensor:
    numbers = again("where", x > 0, 0.0, torch.tensor(-3.0))
    return torch.nn.functional.softmax(wide(x) * numbers, -1)


def chain(x: torch.Tensor) -> torch.Tensor:
    """Many more functions than are called again for one tensor."""
    wider = wide(x)
    for _ in range(9):
        wider = again("sin", wider) * again("cos", wider)
    return wider


def in_place(x: torch.Tensor) -> torch.Tensor:
    """What was noted is written into, before anything of it is kept."""
    wider = wide(x)
    wider += 1
    return again("mul", wider, wider)


FUNCTIONS: list[Function] = [norm, activations, views, masked, chain, in_place]


def gradient_of(function: Function, times: int = 1) -> list[torch.Tensor]:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).requires_grad_()
    output = function(x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    gradients = []
    for _ in range(times):
        (gradient,) = torch.autograd.grad((output.float() * weights).sum(), x, retain_graph=True)
        gradients.append(gradient)
    return gradients


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_are_those_of_what_is_kept(function: Function) -> None:
    """To the bit, each time that the backward pass runs."""
    (expected,) = gradient_of(function)
    with watching():
        found = gradient_of(function, 3)
    for each in found:
        torch.testing.assert_close(each, expected, rtol=0, atol=0)
    assert expected.abs().max() > 0


def kept_of(function: Function) -> list[torch.Tensor]:
    """Return what is kept of more than a few numbers, of a function of 24."""
    x = torch.randn(4, 6).to(torch.bfloat16).requires_grad_()
    with watching():
        output = function(x)
    with looking_at_what_is_kept() as in_place_of_others:
        kept = [*saved_tensors([output], 0), *in_place_of_others]
    return [each for each in kept if each.numel() > 6 and each.data_ptr() != x.data_ptr()]


def test_of_a_norm_nothing_is_kept_but_its_input() -> None:
    """Nor what a function itself keeps of what it returns, as a power does."""
    assert not kept_of(norm)
    assert not kept_of(lambda x: again("exp", wide(x)))


def test_what_takes_too_much_to_be_made_again_is_kept() -> None:
    """Too many functions, or as much memory; what a call returns is there anyway."""
    assert any(each.dtype == torch.float32 for each in kept_of(chain))
    assert len(kept_of(lambda x: again("exp", again("mul", x, 2.0)))) == 1  # half of nothing less

    def returned(x: torch.Tensor) -> torch.Tensor:
        wider = wide(x)
        keep_what_is_returned((wider,))
        return wider.square()

    assert [each.dtype for each in kept_of(returned)] == [torch.float32]


def test_an_input_that_is_changed_in_place() -> None:
    """It cannot be made of that any more: an error, and no other gradient."""
    x = torch.randn(4, 6).to(torch.bfloat16).requires_grad_()
    with watching():
        given = x * 1
        output = again("sin", wide(given))
        given += 1
    with pytest.raises(tp_planner.ParallelRuntimeError, match="changed in place before the backward pass"):
        output.sum().backward()


def test_elementwise_functions() -> None:
    """Others draw random numbers, or write, or mix elements."""
    assert all(map(is_elementwise, ("to", "mul", "pow", "where", "silu", "__rsub__", "logical_and", "erf")))
    assert not any(
        map(is_elementwise, ("mul_", "dropout", "bernoulli", "softmax", "sum", "reshape", "matmul", "__get__"))
    )


# Plans


class Adding(keras.layers.Layer):  # type: ignore[misc]
    """Adds into what its norm was given, which torch lets it do."""

    def __init__(self, writes: bool) -> None:
        super().__init__(name="adding", dtype="mixed_bfloat16")
        self.writes, self.norm = writes, keras.layers.LayerNormalization(name="norm", dtype="mixed_bfloat16")

    def call(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1
        normed = self.norm(x)
        if self.writes:
            x += 1
        return x + normed


@pytest.mark.parametrize("writes", [False, True])
def test_where_code_writes_into_tensors_all_is_kept(writes: bool) -> None:
    """So that what trains on a single device does in parallel."""
    with however_small():
        plan = tp_planner.plan(keras.Sequential([keras.Input((8, 16)), Adding(writes)]), ONE_RANK)
    assert [layer.layer for layer in plan.layers if layer.makes_again] == ([] if writes else ["adding/norm"])


class Centering(keras.layers.Layer):  # type: ignore[misc]
    """Takes off a running mean, which it then changes."""

    def build(self, shape: Any) -> None:
        self.center = self.add_weight(shape=shape[-1:], trainable=False, name="center", autocast=False)

    def call(self, x: torch.Tensor) -> torch.Tensor:
        wider = keras.ops.cast(x, "float32") - self.center
        self.center.assign(0.9 * self.center)
        return keras.ops.cast(wider * wider, self.compute_dtype)


def test_what_is_made_of_a_variable_that_its_layer_changes_is_kept() -> None:
    """It would be made of another value: the layer trains on a single device, and is planned."""
    with however_small():
        stack = [keras.layers.Dense(16, dtype="mixed_bfloat16"), Centering(dtype="mixed_bfloat16")]
        plan = tp_planner.plan(keras.Sequential([keras.Input((8, 16)), *stack]), ONE_RANK)
    assert not any(layer.makes_again for layer in plan.layers)


# On the ranks


def gradients(around: Around, dtype: str, jit_compile: bool, sequence_parallel: bool) -> tuple[int, Arrays]:
    """Return how many layers make something again, and the gradients of a call inside a context, after others."""
    case = CASES["llama"]
    x, _ = case.batch(np.random.default_rng(2), 4)
    model = case.build(dtype)
    model.compile("sgd", case.make_loss(), jit_compile=jit_compile)
    with however_small():
        plan = tp_planner.plan(model, layout_map(case.rules), inputs=x, sequence_parallel=sequence_parallel)
    tp_planner.parallelize(model, plan)
    for context in (nullcontext, nullcontext, nullcontext, around):
        model.zero_grad()
        with context():
            output = model(keras.tree.map_structure(torch.as_tensor, x), training=True)
        output.float().square().mean().backward()
    values = {key: variable.value.grad for key, variable in named_variables(model).items()}
    found = {key: each.full_tensor() if hasattr(each, "full_tensor") else each for key, each in values.items()}
    return sum(layer.makes_again for layer in plan.layers), {key: each.float().numpy() for key, each in found.items()}


def measured(dtype: str, sequence_parallel: bool) -> Measured:
    with however_small():
        return measure("llama", dtype, "AdamW", sequence_parallel)


# In the parent


@pytest.mark.parametrize(
    ("jit_compile", "sequence_parallel"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_training(pools: Pools, jit_compile: bool, sequence_parallel: bool) -> None:
    """Gradients are those of what is kept, to the bit."""
    found, kept = (
        pools(2).run(gradients, around, "mixed_bfloat16", jit_compile, sequence_parallel)
        for around in (nullcontext, kept_by_somebody)
    )
    for (layers, again), (_, expected) in zip(found, kept, strict=True):
        assert layers
        assert again.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(again[key], value, err_msg=key)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16"])
def test_memory(pools: Pools, dtype: str, sequence_parallel: bool) -> None:
    """No norm keeps a copy in float32: neither in the plan nor in a real step, which are the same to the byte."""
    for each in pools(2).run(measured, dtype, sequence_parallel):
        assert each.same.memory.peak.total == each.planned.memory.peak.total
        assert each.same.memory.largest.activations == each.planned.memory.largest.activations
        wide = [holder for holder in each.planned.holders if holder.kind == "activations" and holder.dtype == "float32"]
        assert not [
            holder for holder in wide if holder.shape[-1] > 1 and any("norm" in layer for layer in holder.layers)
        ]
