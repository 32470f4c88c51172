"""Kernels of CUDA on fake CPU tensors: which attention is chosen, what it keeps, and plans that count them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from keras import ops
from torch.nn.functional import dropout, rms_norm
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.utils.checkpoint import checkpoint

from tests.families import FAMILIES, plan_of
from tests.models import CASES
from tp_planner import plan
from tp_planner.frontend.cuda_kernels import Attention, choose_attention, kernels_of
from tp_planner.frontend.dispatch import WatchingMode
from tp_planner.frontend.fake_mode import FakeCpuMode
from tp_planner.ir.errors import PlanError
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.plan_json import plan_from_json
from tp_planner.planner import make_plan

BFLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float32, torch.float64
CHOICES: dict[str, tuple[torch.dtype, tuple[int, ...], tuple[int, ...], dict[str, Any], Attention]] = {
    "half": (BFLOAT16, (2, 4, 8, 16), (2, 4, 8, 16), {}, "flash"),
    "half, odd head": (BFLOAT16, (2, 4, 8, 10), (2, 4, 8, 10), {}, "flash"),
    "half, causal": (BFLOAT16, (2, 4, 8, 16), (2, 4, 8, 16), {"is_causal": True}, "flash"),
    "half, causal, more keys": (BFLOAT16, (2, 4, 8, 16), (2, 4, 9, 16), {"is_causal": True}, "efficient"),
    "half, mask": (BFLOAT16, (2, 4, 8, 16), (2, 4, 8, 16), {"mask": True}, "efficient"),
    "half, mask, odd head": (BFLOAT16, (2, 4, 8, 12), (2, 4, 8, 12), {"mask": True}, "math"),
    "half, largest head": (BFLOAT16, (2, 4, 8, 256), (2, 4, 8, 256), {}, "flash"),
    "half, larger head": (BFLOAT16, (2, 4, 8, 264), (2, 4, 8, 264), {}, "efficient"),
    "half, grouped": (BFLOAT16, (2, 4, 8, 16), (2, 2, 8, 16), {"enable_gqa": True}, "flash"),
    "single": (FLOAT32, (2, 4, 8, 12), (2, 4, 8, 12), {}, "efficient"),
    "single, odd head": (FLOAT32, (2, 4, 8, 10), (2, 4, 8, 10), {}, "math"),
    "single, grouped": (FLOAT32, (2, 4, 8, 16), (2, 2, 8, 16), {"enable_gqa": True}, "math"),
    "double": (FLOAT64, (2, 4, 8, 16), (2, 4, 8, 16), {}, "math"),
    "three dims": (BFLOAT16, (4, 8, 16), (4, 8, 16), {}, "math"),
}


@pytest.mark.parametrize(("dtype", "query", "key", "options", "expected"), CHOICES.values(), ids=CHOICES)
def test_choice_of_attention(
    dtype: torch.dtype, query: tuple[int, ...], key: tuple[int, ...], options: dict[str, Any], expected: Attention
) -> None:
    """Torch's documented conditions; the op that runs is the chosen one, and what comes out has the query's shape."""
    options = dict(options)
    with FakeCpuMode():
        q = torch.empty(query, dtype=dtype, requires_grad=True)
        k, v = torch.empty(key, dtype=dtype), torch.empty(key, dtype=dtype)
        if options.pop("mask", False):
            options["attn_mask"] = torch.empty(query[-2], key[-2], dtype=torch.bool)
        assert choose_attention(q, k, v, **options) == expected
        with kernels_of("cuda"), _Names() as seen:
            made = attention(q, k, v, **options)
            made.sum().backward()
    assert (made.shape, q.grad.shape) == (q.shape, q.shape)
    fused = {name.split("_attention")[0].rpartition("_")[2] for name in seen.names if "scaled_dot" in name}
    assert fused == (set() if expected == "math" else {expected})


class _Names(WatchingMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def watch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        self.names.append(func.__name__)
        return func(*args, **kwargs)


def test_dropout_keeps_a_byte_of_each_element() -> None:
    with FakeCpuMode(), kernels_of("cuda"), _Names() as seen:
        x = torch.empty(4, 8, requires_grad=True)
        kept = dropout(x, 0.5).grad_fn._saved_result1  # type: ignore[union-attr]
        dropout(x, 0.5, training=False)
    assert (kept.shape, kept.dtype) == (x.shape, torch.bool)
    assert [name for name in seen.names if "dropout" in name] == ["native_dropout.default"]


def test_what_runs_again_takes_the_same_kernels() -> None:
    """A checkpointed function is called a second time in the backward pass, by whichever way in."""
    with FakeCpuMode(), kernels_of("cuda"), _Names() as seen:
        query = torch.empty(2, 4, 8, 16, requires_grad=True)
        checkpoint(attention, query, query, query, use_reentrant=False).sum().backward()
        torch.autograd.grad(checkpoint(attention, query, query, query, use_reentrant=False).sum(), query)
    assert seen.names.count("_scaled_dot_product_efficient_attention.default") == 4


def test_real_tensors_meet_their_own_kernels() -> None:
    tensors = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    with kernels_of("cuda"):
        found = attention(*tensors)
    torch.testing.assert_close(found, attention(*tensors), rtol=0, atol=0)


BRANCHING = {"gemma": {"CachedGemmaAttention"}, "gemma3": {"CachedGemma3Attention"}}


@pytest.mark.parametrize(
    "name", [name if name in ("gpt2", "gemma") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_layers_and_collectives_are_those_of_the_cpu(name: str) -> None:
    """Kernels change what a step holds and computes, and nothing else in the plan.

    Gemma's attention takes another branch on GPUs, in which no layer has to be told the sizes of shards.
    """
    family, on_cpu = FAMILIES[name], plan_of(name, 2)
    inputs, _ = family.batch(np.random.default_rng(0), 2)
    on_cuda = make_plan(family.build(), replace(family.layout(2), devices="cuda"), inputs)
    assert on_cuda.device == "cuda"
    told = [each for each in on_cpu.layers if each.functions and each not in on_cuda.layers]
    assert {each.class_name for each in told} == BRANCHING.get(name, set())
    layers = tuple(each for each in on_cpu.layers if each not in told)
    assert replace(on_cuda, device="cpu", step=on_cpu.step) == replace(on_cpu, layers=layers)
    assert on_cuda.step.memory.peak.parameters % 512 == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_norms_keep_their_input_and_a_number_of_each_row(dtype: str) -> None:
    """The composite that the CPU runs keeps a product and a sum more; a weight of another dtype is no fused norm's."""
    with FakeCpuMode(), kernels_of("cuda"), _Names() as seen:
        x = torch.empty(4, 8, dtype=getattr(torch, dtype), requires_grad=True)
        made = rms_norm(x, (8,), torch.empty(8, dtype=x.dtype))
        made.sum().backward()
    assert (made.shape, made.dtype) == (x.shape, x.dtype)
    assert [name for name in seen.names if "norm" in name] == [
        "native_layer_norm.default",
        "native_layer_norm_backward.default",
    ]
    with FakeCpuMode(), kernels_of("cuda"), _Names() as seen:
        rms_norm(torch.empty(4, 8), (8,), torch.empty(8, dtype=torch.float64))
    assert "native_layer_norm.default" not in seen.names


BRANCHES = {
    "softmax of float16": (lambda x: ops.softmax(x), "float16", torch.float16),
    "product of float16": (lambda x: ops.matmul(x, ops.transpose(x)), "float16", torch.float16),
    "product of integers": (lambda x: ops.matmul(x, ops.transpose(x)), "int32", torch.float32),
}


@pytest.mark.parametrize(("function", "dtype", "on_cuda"), BRANCHES.values(), ids=BRANCHES)
def test_branches_of_keras(function: Any, dtype: str, on_cuda: torch.dtype) -> None:
    """Keras computes in float32 on the CPU what CUDA computes in float16, and the other way round with integers."""
    with FakeCpuMode():
        x = torch.empty(4, 8, dtype=getattr(torch, dtype))
        computed = []
        for device in ("cpu", "cuda"):
            with kernels_of(device), _Dtypes() as seen:  # type: ignore[arg-type]
                function(x)
            computed.append(seen.dtypes)
    assert on_cuda in computed[1]
    assert on_cuda not in computed[0]


class _Dtypes(WatchingMode):
    """Notes the dtypes in which products and softmax compute."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def watch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        made = func(*args, **kwargs)
        if func.__name__.partition(".")[0] in ("mm", "_softmax"):
            self.dtypes.add(made.dtype)
        return made


def test_nothing_is_copied_for_flash_attention() -> None:
    """Keras copies what other kernels of attention read."""
    clones = []
    with FakeCpuMode():
        x = torch.empty(2, 8, 4, 16, dtype=BFLOAT16)
        for device in ("cpu", "cuda"):
            with kernels_of(device), _Names() as seen:  # type: ignore[arg-type]
                ops.dot_product_attention(x, x, x)
            clones.append(sum("clone" in name for name in seen.names))
    assert clones == [3, 0]


PAIR = Layout(Mesh((("model", 2),)), (LayoutRule("up/kernel", (None, "model")),))


def test_device_of_a_plan_is_named() -> None:
    """It is given, or the mesh's; what neither names counts the CPU's kernels, and JSON with another is refused."""
    case = CASES["mlp"]
    with pytest.raises(PlanError) as caught:
        plan(case.build(), PAIR, device="gpu")  # type: ignore[arg-type]
    assert str(caught.value) == "device is 'gpu'; it is 'cpu' or 'cuda', or None for that of the mesh"
    found = plan(case.build(), PAIR, device="cuda")
    assert found.device == "cuda"
    assert ", CUDA's kernels: " in str(found)
    assert plan(case.build(), replace(PAIR, devices="cuda")) == found
    assert plan(case.build(), replace(PAIR, devices="cuda"), device="cpu").device == "cpu"
    with pytest.raises(PlanError) as caught:
        plan_from_json(found.to_json().replace('"device": "cuda"', '"device": "tpu"'))
    assert str(caught.value) == (
        "plan is damaged (ValueError: device 'tpu' is neither 'cpu' nor 'cuda'); plan the model again"
    )
