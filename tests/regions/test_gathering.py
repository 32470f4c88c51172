"""What a block reads in parts is put together in one collective, and its gradients are added and cut in one."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import keras
import keras_hub
import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import tp_planner
from tests.replicas import MODELS, Shape, layout, share
from tests.workers import Pools
from tp_planner import planner
from tp_planner.dryrun import simulate
from tp_planner.frontend.blocks import Blocks
from tp_planner.frontend.hardware_file import find_hardware_file, read_hardware_file
from tp_planner.ir.layout import Layout, LayoutRule
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.placement import PackedShard, Shard, local_shape
from tp_planner.ir.plan import Gathering, Plan
from tp_planner.ir.step_log import Early
from tp_planner.job.axes import Axis
from tp_planner.layers import apply
from tp_planner.passes.estimate_time import estimate_time
from tp_planner.planner import make_plan
from tp_planner.regions.buffers import Cut, Gathered, Reduced
from tp_planner.regions.calls import running
from tp_planner.storage.sharding import own_shard
from tp_planner.storage.variables import local_tensor

# The plan


def plan_of(name: str, rules: str, shape: Shape) -> Plan:
    return tp_planner.plan(MODELS[name].build(), layout(name, rules, shape), batch_axis="batch")


def over_batch(plan: Plan) -> Counter[tuple[str, str]]:
    return Counter((each.phase, each.kind) for each in plan.collectives if each.axis == "batch")


@pytest.mark.parametrize(
    ("name", "rules", "forward", "backward"),
    [
        ("llama", "KerasHub's", 1 + 2, 2),  # the embedding, and two blocks; the embedding's gradient needs no weight
        ("gemma", "KerasHub's", 1 + 2 + 1, 2 + 1),  # of which the embedding is read again at the end
        ("gpt", "both axes", 1 + 3 * 2 + 1, 3 * 2 + 1),  # no blocks, but attention, and layers after one another
        ("stacked", "stacked", 4 + 4 + 1, 4 + 4 + 1),  # blocks, one of which is frozen in part, and a shared layer
        ("entangled", "stacked", 4 + 4 + 1, 4 + 4 + 1),  # the same with the shared layer inside of the blocks
    ],
)
def test_blocks_gather_once_forward_and_once_backward(name: str, rules: str, forward: int, backward: int) -> None:
    """And they add their gradients once; what is sent is what the parts are long, short ones filled up."""
    plan = plan_of(name, rules, (2, 2))
    found = over_batch(plan)
    assert found["forward", "all_gather"] == found["backward", "reduce_scatter"] == forward
    assert found["backward", "all_gather"] == backward
    sent = {(g.layer, g.place): bytes_of(g, plan) for g in plan.gatherings}
    ran = {(c.layer, c.place): c.bytes for c in plan.collectives if c.kind == "all_gather" and c.phase == "forward"}
    assert {key: ran[key] for key in sent} == sent
    assert tp_planner.Plan.from_json(plan.to_json()) == plan


@pytest.mark.slow
def test_blocks_of_a_large_model_gather_once() -> None:
    """A Llama of 8 billion parameters on 8 x 8 devices, by KerasHub's map: 101 collectives over the batch axis."""
    sizes = {"num_query_heads": 32, "num_key_value_heads": 8, "hidden_dim": 4096, "intermediate_dim": 14336}
    keras.config.set_dtype_policy("mixed_bfloat16")
    with keras.device("meta"):
        model = keras_hub.models.LlamaBackbone(vocabulary_size=128256, num_layers=32, **sizes)
    inputs = {name: keras.InputSpec(shape=(1, 4096), dtype="int32") for name in ("token_ids", "padding_mask")}
    plan = make_plan(model, layout("llama", "KerasHub's", (8, 8)), inputs, keras.optimizers.AdamW())
    assert over_batch(plan) == {
        ("forward", "all_gather"): 33,  # the embedding, and a block each
        ("backward", "all_gather"): 32,
        ("backward", "reduce_scatter"): 33,
        ("backward", "all_reduce"): 3,  # samples, and two buckets of what is whole
    }


def bytes_of(gathering: Gathering, plan: Plan) -> int:
    variables = {each.key: each for each in plan.variables}
    return sum(
        math.prod(variables[read.variable].local_shape) * getattr(torch, read.dtype).itemsize
        for read in gathering.reads
    )


class Inner(keras.layers.Layer):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.up = keras.layers.Dense(16, name="up", dtype="mixed_bfloat16")
        self.down = keras.layers.Dense(8, name="down")

    def build(self, shape: Any) -> None:
        self.up.build(shape)
        self.down.build((*shape[:-1], 16))

    def call(self, x: Any) -> Any:
        return self.down(self.up(x))


class Tower(keras.layers.Layer):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.first = keras.layers.Dense(8, name="first")
        self.inner = [Inner(name=f"inner_{number}") for number in range(2)]

    def build(self, shape: Any) -> None:
        for each in (self.first, *self.inner):
            each.build(shape)

    def call(self, x: Any) -> Any:
        x = self.first(x)
        for each in self.inner:
            x = each(x)
        return x


def test_towers_of_blocks_are_taken_block_by_block() -> None:
    """No rank holds a tower: its blocks are units, and layers around them; weights travel as they are computed with."""
    inputs = keras.Input((8,))
    towers = [Tower(name=name) for name in ("left", "right")]
    outputs = keras.layers.Add()([tower(inputs) for tower in towers])
    mesh = Mesh((("batch", 2), ("model", 1)))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(outputs))
    plan = tp_planner.plan(model, Layout(mesh, (LayoutRule(".*kernel", ("batch", None)),)), batch_axis="batch")
    assert [(each.layer, len(each.reads)) for each in plan.gatherings] == [
        ("left/first", 1),
        ("left/inner_0", 2),
        ("left/inner_1", 2),
        ("right/first", 1),
        ("right/inner_0", 2),
        ("right/inner_1", 2),
        ("head", 1),
    ]
    assert [read.dtype for read in plan.gatherings[1].reads] == ["bfloat16", "float32"]
    assert bytes_of(plan.gatherings[1], plan) == 8 * 16 * (2 + 4) // 2


def model_of_a_block(name: str) -> keras.Model:
    inputs = keras.Input((8,))
    outputs = Inner(name=f"{name}_inner")(keras.layers.Dense(8, "relu", name=f"{name}_dense")(inputs))
    return keras.Model(inputs, outputs, name=name)


def test_models_in_a_model_are_blocks_if_they_read_alike() -> None:
    """Of what kind one is says not its class, but what is inside; equal layers of it are no blocks to be planned alone.

    For the one that ran would not gather what all do.
    """
    inputs = keras.Input((4,))
    x = keras.Sequential([keras.layers.Dense(8, name="first"), keras.layers.Dense(8, name="second")])(inputs)
    for name in ("left", "right"):
        x = model_of_a_block(name)(x)
    layout = Layout(Mesh((("batch", 2), ("model", 1))), (LayoutRule(".*kernel", ("batch", None)),))
    plan = tp_planner.plan(keras.Model(inputs, x), layout, batch_axis="batch")
    found = [(each.layer.partition("/")[0], len(each.reads)) for each in plan.gatherings]
    assert found == [("sequential", 2), ("left", 3), ("right", 3)]
    ran = [(c.layer, c.place) for c in plan.collectives if c.kind == "all_gather" and c.phase == "forward"]
    assert ran == [(each.layer, each.place) for each in plan.gatherings]


# What runs meanwhile


class Started(TorchDispatchMode):
    """Counts the matrix products between the start of each gather and the first wait for it, in order of starts."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[int] = []
        self._open: dict[int, int] = {}  # by storage, the place of what is not waited for

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.__name__.partition(".")[0]
        assert name != "all_gather_into_tensor", "of which two at a time damage gloo's memory"
        if name == "all_gather_into_tensor_out":
            self._open[result.untyped_storage()._cdata] = len(self.products)
            self.products.append(0)
        elif name == "wait_tensor":
            self._open.pop(args[0].untyped_storage()._cdata, None)
        elif name in ("mm", "addmm", "bmm"):
            for place in self._open.values():
                self.products[place] += 1
        return result


def step_that_runs_again() -> tuple[list[int], int]:
    """Return the products behind the gathers of a backward pass in which blocks run again, and what is left begun."""
    model = build_for("recomputed")
    x, _ = MODELS["recomputed"].batch(np.random.default_rng(0), 4)
    tp_planner.parallelize(model, layout("llama", "KerasHub's", (4, 1)), x)
    loss = model(x, training=True).sum()
    with Started() as backward:
        loss.backward()
    return backward.products, len(running.started)


@pytest.mark.slow
def test_gathers_of_blocks_that_run_again_run_while_the_block_before_does(pools: Pools) -> None:
    """Of four blocks the last begins its gather when it needs it; the others' run behind what is computed."""
    products, left = pools(4).run(step_that_runs_again)[0]
    assert [bool(each) for each in products] == [False, True, True, True]
    assert left == 0


def step_with_gathers(ahead: int) -> tuple[list[int], list[int], int, int]:
    """Return the products behind the gathers of a forward and a backward pass, and of a call without gradients."""
    case = MODELS["stacked"]
    model = case.build("float32")
    x, _ = case.batch(np.random.default_rng(0), 4)
    tp_planner.parallelize(model, layout("stacked", "stacked", (4, 1)), gathers_ahead=ahead)
    with Started() as forward:
        loss = model(x, training=True).sum()
    with Started() as backward:
        loss.backward()
    with Started() as alone, torch.no_grad():
        model(x)
    return forward.products, backward.products, sum(alone.products), len(running.started)


def test_gathers_run_while_the_block_before_computes(pools: Pools) -> None:
    """Between start and wait of a gather the products of a block run, or of two; without, none do.

    A block has two products, and four backward but for the first, whose input needs no gradient; the shared layer has
    one, two backward, and is not gathered early.
    """
    none, one, two = (pools(4).run(step_with_gathers, ahead)[0] for ahead in range(3))
    assert none == ([0] * 9, [0] * 9, 0, 0)
    forward, backward, alone, left = one
    # block 0, block 1, common, block 2, common, block 3, common, head, common
    assert forward == [0, 3, 0, 3, 0, 3, 0, 3, 0]
    assert [bool(each) for each in backward] == [False, True, False, True, False, True, False, True, False]
    assert alone == sum(forward)
    assert two[0] == [0, 3, 6, 0, 6, 0, 6, 0, 0]
    assert left == two[3] == 0


def bits_after_fifty_steps(ahead: int) -> dict[str, tuple[bool, bytes]]:
    """Return what this rank stores of each variable and slot after 50 steps of uneven batches.

    Of each: whether it is cut over the model axis, and its bits.
    """
    case = MODELS["stacked"]
    model = case.build("float32")
    tp_planner.parallelize(model, layout("stacked", "stacked", (2, 2)), gathers_ahead=ahead)
    model.compile(keras.optimizers.AdamW(0.01), case.make_loss(), jit_compile=False)
    rng = np.random.default_rng(0)
    for size in rng.integers(1, 8, 50):
        x, y = case.batch(rng, int(size))
        replica = torch.distributed.get_rank() // 2
        model.train_on_batch(share(x, replica, 2), share(y, replica, 2))
    stored = {v.path: v for v in (*model.variables, *model.optimizer.variables)}
    return {path: (is_cut_over_model(v), local_tensor(v).numpy().tobytes()) for path, v in stored.items()}


def is_cut_over_model(variable: Any) -> bool:
    value = variable._value
    names = getattr(getattr(value, "device_mesh", None), "mesh_dim_names", None) or ()
    placements = getattr(value, "placements", ())
    return any(name == "model" and placed.is_shard() for name, placed in zip(names, placements, strict=True))


@pytest.mark.slow
def test_fifty_steps_give_the_same_bits_whatever_is_ahead(pools: Pools) -> None:
    """And so they do on the ranks of one replica, of what is not cut over them."""
    ranks, *others = (pools(4).run(bits_after_fifty_steps, ahead) for ahead in range(3))
    for other in others:
        for one, another in zip(ranks, other, strict=True):
            assert [path for path in one if one[path] != another[path]] == []
    for first, second in zip(ranks[0::2], ranks[1::2], strict=True):
        whole = [path for path, (is_cut, _) in first.items() if not is_cut]
        assert len(whole) > 10
        assert [path for path in whole if first[path] != second[path]] == []


def test_early_gathers_take_memory_and_hide_time() -> None:
    """The buffers of as many gathers as are ahead are in the plan's memory; at best their time is not seen."""
    plans = [make_plan(MODELS["stacked"].build(), layout("stacked", f"stacked, {n} ahead", (4, 1))) for n in range(3)]
    block = max(bytes_of(each, plans[0]) for each in plans[0].gatherings) * 4
    peaks = [plan.step.memory.largest.temporaries for plan in plans]
    assert [sum(each.early for each in plan.collectives) for plan in plans] == [0, 10 + 9, 10 + 9]
    assert 0.5 * block < peaks[1] - peaks[0] <= 1.5 * block
    assert 0.5 * block < peaks[2] - peaks[1] <= 1.5 * block
    seen = [
        estimate_time(plan, read_hardware_file(find_hardware_file("h100"))).phases[0].communication for plan in plans
    ]
    assert seen[1].low < seen[0].low
    assert seen[1].high == seen[0].high


@pytest.mark.parametrize(
    ("name", "rules"),
    [("stacked", "stacked, 1 ahead"), ("stacked", "stacked, 2 ahead"), ("recomputed", "KerasHub's, 1 ahead")],
)
def test_plans_have_collectives_where_they_start(name: str, rules: str) -> None:
    """A plan has the order and the memory, to the byte, of the same step in which each block starts them for others."""
    model, given = build_for(name), layout(name.replace("recomputed", "llama"), rules, (4, 1)).across("batch")
    inputs = keras.InputSpec(shape=(8, 10), dtype="float32") if name == "stacked" else None
    planned = make_plan(model, given, inputs, keras.optimizers.AdamW())
    with (
        mock.patch.object(planner, "find_blocks", return_value=Blocks.none()),
        mock.patch.object(simulate, "start_early", lambda events, ahead: without_marks(events)),
        mock.patch.object(apply, "apply_layers", functools.partial(apply_layers_starting, apply.apply_layers)),
    ):
        executed = make_plan(model, given, inputs, keras.optimizers.AdamW())
    assert planned.collectives == executed.collectives
    number = 8 * (name == "recomputed")  # the share of samples may be there at the peak, or not any more
    assert planned.step.memory.largest.temporaries == pytest.approx(
        executed.step.memory.largest.temporaries, rel=0, abs=number
    )
    assert planned.step.memory.peak.total == pytest.approx(executed.step.memory.peak.total, rel=0, abs=number)


def build_for(name: str) -> keras.Model:
    """Build a model of the zoo; of blocks that run again there are four."""
    return MODELS[name].build(**({"blocks": 4} if name == "recomputed" else {}))


def without_marks(events: list[Any]) -> list[Any]:
    return [event for event in events if not isinstance(event, Early)]


def apply_layers_starting(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return plain(*args, **{**kwargs, "starting": True})


@pytest.mark.parametrize("ahead", [-1, True, 1.5])
@pytest.mark.parametrize("call", [tp_planner.plan, tp_planner.parallelize])
def test_only_numbers_of_gathers_are_taken(call: Callable[..., Any], ahead: Any) -> None:
    with pytest.raises(tp_planner.PlanError) as refusal:
        call(MODELS["mlp"].build(), layout("mlp", "both axes", (2, 1)), gathers_ahead=ahead)
    assert str(refusal.value) == f"gathers_ahead is {ahead!r}; it is a number of gathers, 0 for none"


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (
            "a plan",
            {"gathers_ahead": 0, "gather_again": False},
            "a plan has decided gather_again and gathers_ahead; say it to tp_planner.plan",
        ),
        (
            "auto",
            {"batch_axis": "batch", "gathers_ahead": 2},
            "layout 'auto' is found for one axis, with what is cheapest; find a layout with tp_planner.find_layout, "
            "and give that with batch_axis and gathers_ahead",
        ),
    ],
)
def test_what_is_decided_already_is_not_asked_for(given: str, options: dict[str, Any], message: str) -> None:
    model = MODELS["mlp"].build()
    layout_or_plan = plan_of("mlp", "both axes", (2, 1)) if given == "a plan" else given
    with pytest.raises(tp_planner.PlanError) as refusal:
        tp_planner.parallelize(model, layout_or_plan, **options)
    assert str(refusal.value) == message


# What travels

CUTS = [
    (Cut((8, 3), Shard(0)), torch.float32),
    (Cut((3, 7), Shard(1)), torch.float64),  # chunks of 2, 2, 2 and 1
    (Cut((5,), Shard(0)), torch.bfloat16),  # of 2, 2, 1 and 0
    (Cut((3, 2, 1), Shard(2)), torch.int8),  # of 1, 0, 0 and 0
    (Cut((2, 8), PackedShard(1, (4, 4))), torch.float32),
]


def travel() -> tuple[list[bool], list[bool]]:
    """Return whether wholes and sums are those of the tensors that were cut, together, one dtype alone, and alone."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("batch",))
    axis, weight = Axis.of(mesh), torch.tensor(0.5, dtype=torch.float64)
    gathered, reduced = [], []
    for chosen in (CUTS, [CUTS[0], CUTS[4]], *([each] for each in CUTS)):
        cuts, dtypes = [cut for cut, _ in chosen], [dtype for _, dtype in chosen]
        wholes = [
            torch.arange(math.prod(cut.shape)).reshape(cut.shape).to(dtype)
            for cut, dtype in zip(cuts, dtypes, strict=True)
        ]
        parts = [own_shard(whole, cut.placement, axis) for whole, cut in zip(wholes, cuts, strict=True)]
        arriving = Gathered(parts, cuts, axis)
        gathered += [torch.equal(arriving.whole(number), whole) for number, whole in enumerate(wholes)]
        floats = [number for number, dtype in enumerate(dtypes) if dtype.is_floating_point]
        for given, factor in ((weight, 2.0), (None, 0.0)):  # the sum of four halves
            sums = Reduced([wholes[n] for n in floats], [cuts[n] for n in floats], axis, given).parts()
            reduced += [torch.equal(own, factor * parts[n]) for n, own in zip(floats, sums, strict=True)]
        assert all(
            local_shape(cut.shape, cut.placement, 4, axis.rank) == p.shape for cut, p in zip(cuts, parts, strict=True)
        )
    return gathered, reduced


def test_parts_of_any_dtype_travel_in_one_buffer(pools: Pools) -> None:
    """Wholes and sums are to the bit those of the tensors that were cut: unequal parts, empty ones, packed dims."""
    for gathered, reduced in pools(4).run(travel):
        assert all(gathered)
        assert len(gathered) == 5 + 2 + 5
        assert all(reduced)
        assert len(reduced) == 2 * (4 + 2 + 4)
