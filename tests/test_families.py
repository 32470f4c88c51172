"""KerasHub's families under their presets: the same function, what a block communicates, every published size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
import torch.distributed as dist

import tp_planner
from tests.families import EVERY, FAMILIES, PUBLISHED, plan_of, table_rows
from tests.models import Batch
from tests.test_parity import Arrays, Record, begin, differences, largest
from tests.workers import Pools
from tp_planner.frontend.layer_tree import named_variables
from tp_planner.frontend.survey import survey
from tp_planner.ir.plan import Plan
from tp_planner.passes.choose_styles import choose_styles
from tp_planner.passes.resolve_rules import resolve_rules
from tp_planner.planner import make_plan
from tp_planner.storage.variables import whole_tensor

TOLERANCE = 1e-5
OF_ITS_OWN = {
    "albert": 2e-5,  # twice what its gradients on one device differ by from those in float64; so do pali_gemma's
    "pali_gemma": 5e-5,
    "stable_diffusion_3": 2e-5,  # the gradient of its patches' bias is a sum over all of them
    "deberta": 3e-5,  # one rounding of its weights moves its third loss by 1.2e-5 on one device
}
STEPS = 3
BATCH_SIZE = 2
# Families that the usual run trains; `make sweep` trains the others, too.
ON_TWO = {"siglip"}
PLANNED = {*FAMILIES, "siglip"}  # those of which the usual run plans the collectives of a block


def usual(names: set[str]) -> list[Any]:
    """Return all families, those not among ``names`` marked as slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]


STACK = "(?:(?:en|de)coder|vision|text|double|single)"  # what tells the stacks of a family apart
KEY_BIAS = re.compile(r".*/key(_dense|_proj)?/bias")
README = Path(__file__).parent.parent / "plans" / "README.md"


@dataclass
class Trained:
    """Both trainings as one rank saw them. ``single`` is None but on rank 0."""

    single: Record | None
    sharded: Record


def batches(name: str) -> list[Batch]:
    """Return one batch for each step, the same in every process."""
    rng = np.random.default_rng(1)
    return [EVERY[name].batch(rng, BATCH_SIZE) for _ in range(STEPS)]


# On the ranks


def train_both(name: str, plan: Plan) -> Trained:
    """Train the family alone on rank 0, then sharded by the plan."""
    return _train_both(name, {}, plan)


def train_variant(name: str, sizes: Mapping[str, Any]) -> Trained:
    """Do so with other sizes and the family's preset."""
    return _train_both(name, sizes, FAMILIES[name].layout(dist.get_world_size()))


def train_by_hub_map(name: str, backbone: str) -> Trained:
    """Do so with the layout map that a backbone of KerasHub gives for a mesh (1, ranks)."""
    size = dist.get_world_size()
    mesh = keras.distribution.DeviceMesh((1, size), ("batch", "model"), [f"cpu:{rank}" for rank in range(size)])
    return _train_both(name, {}, getattr(keras_hub.models, backbone).get_layout_map(mesh))


def _train_both(name: str, sizes: Mapping[str, Any], layout_or_plan: Any) -> Trained:
    single = None
    if dist.get_rank() == 0:
        single = train(EVERY[name].build(**sizes), name)
    model = EVERY[name].build(seed=dist.get_rank(), **sizes)  # rank 0's weights are the truth
    tp_planner.parallelize(model, layout_or_plan, inputs=batches(name)[0][0], check="first_step")
    return Trained(single, train(model, name))


def train(model: keras.Model, name: str) -> Record:
    """Record output, loss and gradients for one batch, then losses and weights of steps of AdamW."""
    case = EVERY[name].case
    record = begin(model, case, "float32", batches(name)[0])
    optimizer = keras.optimizers.AdamW(learning_rate=0.01, weight_decay=0.1, epsilon=1e-3, name="adamw")
    model.compile(optimizer, case.make_loss(), jit_compile=False)
    record.losses += [float(np.ravel(model.train_on_batch(x, y))[0]) for x, y in batches(name)]
    record.weights = {key: whole_tensor(variable).numpy().copy() for key, variable in named_variables(model).items()}
    return record


# In the parent


def assert_same_function(ranks: list[Trained], tolerance: float = TOLERANCE) -> None:
    """Output, loss, gradients, losses of the steps and weights after them are those of the single device."""
    single = ranks[0].single
    assert single is not None
    for each in ranks:
        assert differences(each.sharded.outputs, single.outputs, tolerance) == {}
        assert gradient_differences(each.sharded.gradients, single.gradients, tolerance) == {}
        assert each.sharded.losses == pytest.approx(single.losses, rel=tolerance)
        assert differences(each.sharded.weights, single.weights, tolerance) == {}


def gradient_differences(found: Arrays, expected: Arrays, tolerance: float) -> dict[str, float]:
    """Return the variables whose gradients differ, and by how much.

    The gradient of a key's bias is zero, because softmax subtracts what all keys share: what is left of it is
    rounding, which is only compared with the largest gradient of all.
    """
    zero = tolerance * largest(expected)
    return {
        key: error
        for key, error in differences(found, expected, tolerance).items()
        if not (KEY_BIAS.fullmatch(key) and np.max(np.abs((found[key], expected[key]))) <= zero)
    }


@pytest.mark.parametrize("name", usual(ON_TWO))
def test_same_function(pools: Pools, name: str) -> None:
    """A sharded family trains as on a single device, and its first step communicates what the plan says."""
    assert_same_function(pools(2).run(train_both, name, plan_of(name, 2)), OF_ITS_OWN.get(name, TOLERANCE))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_same_function_on_four_processes(pools: Pools, name: str) -> None:
    """So it does on more processes, where some dims do not divide any more."""
    assert_same_function(pools(4).run(train_both, name, plan_of(name, 4)), OF_ITS_OWN.get(name, TOLERANCE))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", EVERY)
def test_same_function_with_sequence_parallelism(pools: Pools, name: str, size: int) -> None:
    """So it does with the residual stream sharded over the sequence."""
    family = EVERY[name]
    layout = replace(family.layout(size), sequence_parallel=True)
    plan = make_plan(family.build(), layout, family.batch(np.random.default_rng(0), 2)[0])
    assert_same_function(pools(size).run(train_both, name, plan), OF_ITS_OWN.get(name, TOLERANCE))


VARIANTS = {
    "gemma with one key-value head": ("gemma", {"num_key_value_heads": 1}),
    "llama3 with tied embeddings": ("llama3", {"tie_word_embeddings": True}),
    "t5 without gate": ("t5", {"use_gated_activation": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), VARIANTS.values(), ids=VARIANTS)
def test_same_function_of_variants(pools: Pools, name: str, sizes: Mapping[str, Any]) -> None:
    """So do variants of a family, some without a variable that the preset names."""
    assert_same_function(pools(2).run(train_variant, name, sizes))


HUB_MAPS = {
    "gemma": "GemmaBackbone",
    "llama3": "Llama3Backbone",
    "qwen2.5": "QwenBackbone",
    "qwen3_moe": "Qwen3MoeBackbone",
}


@pytest.mark.parametrize(
    ("name", "backbone"),
    [pytest.param(*each, marks=[pytest.mark.slow] * (each[0] != "llama3")) for each in HUB_MAPS.items()],
)
def test_same_function_by_the_layout_maps_of_keras_hub(pools: Pools, name: str, backbone: str) -> None:
    """KerasHub's own LayoutMap, taken as it is on a mesh (1, 2), gives the same function too."""
    assert_same_function(pools(2).run(train_by_hub_map, name, backbone))


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", usual(PLANNED))
def test_collectives_of_a_block(name: str, ranks: int) -> None:
    """A block communicates what plans/README.md says, on any number of ranks, and nothing in a plan is implicit."""
    family, plan = EVERY[name], plan_of(name, ranks)
    rows = re.findall(rf"^\| {family.title}(?: {STACK})? \| `.*$", README.read_text(encoding="utf-8"), re.M)

    assert rows == list(table_rows(family, plan))
    assert [each for each in plan.collectives if not each.is_planned] == []


# Published sizes

RANKS = 8
WHOLE = re.compile(r".*/(sparse_feedforward_gate_dense|router_dense)/kernel")  # the router of a mixture of experts
BLOCK = re.compile(
    r"(.*/)?(transformer|decoder|inner|disentangled)_(\w+_)?(layer|block)_\d+/.*|.*self_attention/embeddings"
)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param(name, dict(zip(keys, dims, strict=True)), id=f"{name} {size}")
        for name, (keys, rows) in PUBLISHED.items()
        for size, dims in rows.items()
    ],
)
def test_published_size(name: str, sizes: dict[str, Any]) -> None:
    """The preset names every matrix in the blocks, no rule is left over, and what does not divide is gathered."""
    family = EVERY[name]
    with keras.device("meta"):
        model = family.make_backbone(**{"num_layers": 1, **sizes})
    layers, variables = survey(model)
    resolution = resolve_rules(family.layout(RANKS), variables, {key: layer.path for key, layer in layers.items()})
    stored = {key: resolved.placement for key, resolved in resolution.variables.items()}
    styles = choose_styles(layers, variables, stored, RANKS)

    assert resolution.notes == ()
    assert [
        variable.path
        for key, variable in variables.items()
        if BLOCK.fullmatch(variable.path)
        and len(variable.shape) > 1
        and resolution.variables[key].rule is None
        and not WHOLE.fullmatch(variable.path)
    ] == []
    gathered = {
        layer.rpartition("/")[2]: choice.reason for (layer, _), choice in styles.items() if choice.style == "gathered"
    }
    assert set(gathered) == uneven(name, sizes)
    assert all(reason.endswith(f" does not divide evenly by {RANKS}") for reason in gathered.values())


def uneven(name: str, sizes: Mapping[str, Any]) -> set[str]:
    """Return the layers whose heads, or tokens, do not divide by the ranks; widths all do.

    GPT-2's 50257 tokens do not: later passes compute its lookups and head in unequal parts.
    """
    heads = next(sizes[key] for key in ("num_heads", "num_query_heads", "num_attention_heads") if key in sizes)
    by_heads, by_kv_heads = {"query", "attention_output"}, {"key", "value"}
    if name == "t5":  # whose projections have heads and head size in one dim
        by_heads, by_kv_heads = {"self_attention"}, set()
    if name == "deberta":  # whose output projection has heads and head size in one dim
        by_heads = {"query"}
    too_few = set() if heads % RANKS == 0 else by_heads
    too_few = too_few | ({"token_embedding"} if name == "gpt2" else set())
    return too_few | (set() if sizes.get("num_key_value_heads", heads) % RANKS == 0 else by_kv_heads)
