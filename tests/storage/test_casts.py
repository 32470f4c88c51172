"""In mixed precision casts of weights are not kept for the backward pass: the same numbers, from less memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np
import pytest
import torch

import tp_planner
from tests.dryrun.test_simulation import Measured, measure
from tests.models import CASES
from tests.workers import Pools, layout_map
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.regions.left_out import watching
from tp_planner.storage.casts import cast_again

Arrays = dict[str, np.ndarray]
Around = Callable[[], AbstractContextManager[Any]]
DTYPE = "mixed_bfloat16"


def kept_by_somebody() -> AbstractContextManager[Any]:
    """Return a context in which somebody else says what autograd keeps: all of it, elsewhere."""
    return torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept)


# On the ranks


def prepared(jit_compile: bool = False, sequence_parallel: bool = False) -> tuple[keras.Model, torch.Tensor]:
    case = CASES["gpt"]
    x, _ = case.batch(np.random.default_rng(2), 4)
    model = case.build(DTYPE)
    model.compile("sgd", case.make_loss(), jit_compile=jit_compile)
    tp_planner.parallelize(model, layout_map(case.rules), x, sequence_parallel=sequence_parallel)
    return model, torch.as_tensor(x)


def gradients(around: Around, jit_compile: bool, sequence_parallel: bool) -> Arrays:
    """Return the gradients of a call inside a context, after others outside of it."""
    model, x = prepared(jit_compile, sequence_parallel)
    for context in (nullcontext, nullcontext, nullcontext, around):
        model.zero_grad()
        with context():
            output = model(x, training=True)
        output.float().square().mean().backward()
    values = {key: variable.value.grad for key, variable in named_variables(model).items()}
    found = {key: each.full_tensor() if hasattr(each, "full_tensor") else each for key, each in values.items()}
    return {key: each.float().numpy() for key, each in found.items()}


def changed_in_between() -> str:
    """Return what is said where a weight is changed before the backward pass that needs it."""
    model, x = prepared()
    output = model(x, training=True)
    for variable in model.trainable_variables:
        variable.assign(variable.numpy() + 1)
    with pytest.raises(tp_planner.ParallelRuntimeError) as error:
        output.float().sum().backward()
    return str(error.value)


def written_into() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of an input of a product with a cast that was written into, and what it is to be."""
    stored = torch.nn.Parameter(torch.randn(4, 3))
    x, cast = torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True), stored.to(torch.bfloat16)
    cast_again(cast, stored, "kernel")
    with watching():
        cast.mul_(2)
        (x @ cast).sum().backward()
    assert x.grad is not None
    return x.grad, cast.detach().sum(1).expand(2, 4)


def measured() -> Measured:
    return measure("gpt", DTYPE, "AdamW")


# In the parent


@pytest.mark.parametrize(("jit_compile", "sequence_parallel"), [(False, False), (True, False), (True, True)])
def test_gradients_are_those_of_casts_that_are_kept(pools: Pools, jit_compile: bool, sequence_parallel: bool) -> None:
    """To the bit, also where somebody else's hooks keep what autograd saves."""
    again, kept = (
        pools(2).run(gradients, around, jit_compile, sequence_parallel) for around in (nullcontext, kept_by_somebody)
    )
    for found, expected in zip(again, kept, strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_no_cast_of_a_sharded_weight_is_kept(pools: Pools) -> None:
    """Neither in the plan nor in a real step, which are the same to the byte."""
    for each in pools(2).run(measured):
        assert each.same.memory == each.planned.memory
        kept = [holder for holder in each.planned.holders if holder.kind == "activations"]
        assert kept
        assert not [holder for holder in kept if holder.op == "to_copy" and len(holder.shape) == 2]  # those have 3 dims


def test_a_cast_that_code_writes_into_is_kept() -> None:
    """Made again it would be without what was written."""
    gradient, expected = written_into()
    torch.testing.assert_close(gradient, expected)


def test_a_weight_that_is_changed_before_its_backward_pass(pools: Pools) -> None:
    """It would have other gradients then, silently; plain torch refuses that of a weight that is not cast."""
    for said in pools(2).run(changed_in_between):
        assert "was changed between the forward pass and the backward pass" in said
