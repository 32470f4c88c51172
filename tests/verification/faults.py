"""Faults: what goes wrong in tensor parallelism, put into a right plan or into the code that runs it.

Each is a context in which processes are forked, so that ranks have the fault and the test's own process has not, or
a plan that is wrong. The layers are those of the zoo's GPT.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import keras
import torch
import torch.distributed as dist

from tp_planner.ir.placement import Partial, Replicate, Shard
from tp_planner.ir.plan import LayerPlan, Plan, Transition
from tp_planner.layers import styles
from tp_planner.regions import boundaries, summands
from tp_planner.regions.calls import running
from tp_planner.storage import local_shards, sharding
from tp_planner.training import buckets

MODEL_AXIS, BATCH_AXIS = {"batch": 1, "model": 2}, {"batch": 2, "model": 1}


@dataclass(frozen=True)
class Fault:
    """One fault. ``layers`` are those at one of which a model with it begins to differ; none: anywhere.

    ``fails`` says that ranks fail with it.
    """

    name: str
    layers: tuple[str, ...]
    plan: Callable[[Plan], Plan] = lambda plan: plan
    code: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    mesh: dict[str, int] = field(default_factory=lambda: dict(MODEL_AXIS))
    sequence_parallel: bool = False
    fails: bool = False


# In plans


def changed(*layers: str, **changes: Any) -> Callable[[Plan], Plan]:
    def change(plan: Plan) -> Plan:
        assert set(layers) <= {each.layer for each in plan.layers}
        return replace(
            plan, layers=tuple(_changed(each, changes) if each.layer in layers else each for each in plan.layers)
        )

    return change


def _changed(layer: LayerPlan, changes: dict[str, Any]) -> LayerPlan:
    return replace(layer, **{key: value(layer) if callable(value) else value for key, value in changes.items()})


def output(**transitions: Transition) -> Callable[[LayerPlan], Any]:
    return lambda layer: replace(layer.output, **transitions)


def first_input(**transitions: Transition) -> Callable[[LayerPlan], Any]:
    return lambda layer: tuple((position, replace(boundary, **transitions)) for position, boundary in layer.inputs)


# In what a boundary does


Change = Callable[[torch.Tensor, Transition, Any], torch.Tensor]


def at(layer: str, source: type, target: type, wrong: Callable[[Change, Any, Any, Any], torch.Tensor]) -> Any:
    """Return a context in which one change of placement at one layer goes wrong."""
    right = boundaries._change

    def change(tensor: torch.Tensor, transition: Transition, axis: Any, *rest: Any) -> torch.Tensor:
        here = running.site is not None and running.site.layer == layer
        if here and isinstance(transition.source, source) and isinstance(transition.target, target):
            return wrong(lambda *given: right(*given, *rest), tensor, transition, axis)
        return right(tensor, transition, axis, *rest)

    return lambda: mock.patch.object(boundaries, "_change", change)


def dropped(right: Change, tensor: torch.Tensor, transition: Transition, axis: Any) -> torch.Tensor:
    return tensor.clone()


def doubled(right: Change, tensor: torch.Tensor, transition: Transition, axis: Any) -> torch.Tensor:
    return right(right(tensor, transition, axis), transition, axis)


def mean(right: Change, tensor: torch.Tensor, transition: Transition, axis: Any) -> torch.Tensor:
    return right(tensor, transition, axis) / axis.size


def on_one_rank(right: Change, tensor: torch.Tensor, transition: Transition, axis: Any) -> torch.Tensor:
    result = right(tensor, transition, axis)
    return result if axis.rank == 0 else tensor.clone()


def late(right: Change, tensor: torch.Tensor, transition: Transition, axis: Any) -> torch.Tensor:
    """What is read before all of it has arrived."""
    result = right(tensor, transition, axis).clone()
    result.view(-1)[-3:] = tensor.reshape(-1)[-3:]
    return result


def rounded(right: Change, tensor: torch.Tensor, transition: Transition, axis: Any) -> torch.Tensor:
    return right(tensor.bfloat16(), transition, axis).to(tensor.dtype)


def other_order(right: Change, tensor: torch.Tensor, transition: Transition, axis: Any) -> torch.Tensor:
    dim = transition.source.dim if isinstance(transition.source, Shard) else transition.target.dim
    return torch.cat(right(tensor, transition, axis).chunk(axis.size, dim)[::-1], dim)


def wrong_rank(right: Change, tensor: torch.Tensor, transition: Transition, axis: Any) -> torch.Tensor:
    return right(tensor, transition, replace(axis, rank=(axis.rank + 1) % axis.size))


def shifted(right: Change, tensor: torch.Tensor, transition: Transition, axis: Any) -> torch.Tensor:
    return right(tensor, transition, axis).roll(1, 1)


def negated(right: Change, tensor: torch.Tensor, transition: Transition, axis: Any) -> torch.Tensor:
    return -right(tensor, transition, axis)


def not_a_number(right: Change, tensor: torch.Tensor, transition: Transition, axis: Any) -> torch.Tensor:
    result = right(tensor, transition, axis).clone()
    result.view(-1)[0] = float("nan")
    return result


def slightly_off(right: Change, tensor: torch.Tensor, transition: Transition, axis: Any) -> torch.Tensor:
    return right(tensor, transition, axis) * (1 + 1e-7)


def stale() -> Callable[..., torch.Tensor]:
    """What a change gave the first time, every time."""
    kept: list[torch.Tensor] = []

    def wrong(right: Change, tensor: torch.Tensor, transition: Transition, axis: Any) -> torch.Tensor:
        kept.append(right(tensor, transition, axis).clone())
        return kept[0].clone()

    return wrong


def own_slice(right: Change, tensor: torch.Tensor, transition: Transition, axis: Any) -> torch.Tensor:
    return tensor.chunk(axis.size, transition.target.dim)[axis.rank].contiguous()


# In what ranks store, draw and send


@contextlib.contextmanager
def patched(owner: Any, name: str, wrong: Callable[[Any], Any]) -> Iterator[None]:
    with mock.patch.object(owner, name, wrong(getattr(owner, name))):
        yield


def shards(path: str, rank_of: Callable[[Any], int]) -> Any:
    """Return a context in which a rank takes another one's shard of a variable of this shape, given as its name."""

    def wrong(right: Any) -> Any:
        def own(self: Any, value: Any) -> Any:
            if tuple(value.shape) == SHAPES[path]:
                return own_of(value, self.cuts, rank_of)
            return right(self, value)

        return own

    def own_of(value: Any, cuts: Any, rank_of: Callable[[Any], int]) -> Any:
        for placement, axis in cuts:
            value = sharding.own_shard(value, placement, replace(axis, rank=rank_of(axis)))
        return value

    return lambda: patched(sharding.Sharding, "own", wrong)


SHAPES = {"up": (32, 128), "down": (128, 32), "head": (32, 64), "query": (32, 4, 8)}


def gradients_of_shards_doubled() -> Any:
    def wrong(right: Any) -> Any:
        return staticmethod(lambda ctx, gradient: right(ctx, 2 * gradient))

    return patched(local_shards.LocalShard, "backward", wrong)


def rows_off_by_one() -> Any:
    def wrong(right: Any) -> Any:
        def own_rows(self: Any, layer: Any, args: Any) -> Any:
            return right(self, layer, ((args[0] + 1) % layer.input_dim, *args[1:]))

        return own_rows

    return patched(styles.LayerCalls, "_own_rows", wrong)


def rows_of_others_kept() -> Any:
    def wrong(right: Any) -> Any:
        def own_rows(self: Any, layer: Any, args: Any) -> Any:
            ids, elsewhere = right(self, layer, args)
            return ids, torch.zeros_like(elsewhere)

        return own_rows

    return patched(styles.LayerCalls, "_own_rows", wrong)


def masks_of_own() -> Any:
    """Each rank takes the first part of the whole mask of a dropout on shards."""
    return patched(styles, "own_shard", lambda right: lambda value, at, axis: right(value, at, replace(axis, rank=0)))


def seeds_of_own() -> Any:
    def wrong(right: Any) -> Any:
        def next(self: Any, ordered: bool = True) -> torch.Tensor:
            seed = right(self, ordered)
            return seed + dist.get_rank() if dist.is_initialized() else seed

        return next

    return patched(keras.random.SeedGenerator, "next", wrong)


def _not_sent(tensor: torch.Tensor, axis: Any, site: Any) -> None:
    pass


def no_summands() -> Any:
    return mock.patch.object(summands, "add_in_place", _not_sent)


def gradients_not_averaged() -> Any:
    return mock.patch.object(buckets, "add_in_place", _not_sent)


def gradients_averaged_twice() -> Any:
    def wrong(right: Any) -> Any:
        def fill(self: Any, replicas: Any) -> torch.Tensor:
            return right(self, replicas).mul_(0.5)

        return fill

    return patched(buckets.Bucket, "_fill", wrong)


@contextlib.contextmanager
def one_gradient_left_out() -> Iterator[None]:
    own = {}

    def keep(right: Any) -> Any:
        def fill(self: Any, replicas: Any) -> torch.Tensor:
            flat = right(self, replicas)
            own[self] = self._view(0).clone()
            return flat

        return fill

    def wrong(right: Any) -> Any:
        def finish(self: Any) -> None:
            right(self)
            if self in own:
                buckets.local_gradient(self.variables[0]._value.grad).copy_(own.pop(self))

        return finish

    with patched(buckets.Bucket, "_fill", keep), patched(buckets.Bucket, "finish", wrong):
        yield


SUM, WHOLE = Transition(Partial(), Replicate()), Transition(Replicate(), Replicate())
QUERY_KEY_VALUE = tuple(f"block_1_attention/{name}" for name in ("query", "key", "value"))

FAULTS: Sequence[Fault] = (
    Fault(
        "no sum after attention",
        ("block_0_attention/attention_output",),
        changed("block_0_attention/attention_output", output=None),
    ),
    Fault("no sum after the feed-forward part", ("block_1_down",), changed("block_1_down", output=None)),
    Fault("no sum after the lookup", ("token_embedding",), changed("token_embedding", output=None)),
    Fault("no sum of the gradient before q, k and v", QUERY_KEY_VALUE, changed(*QUERY_KEY_VALUE, inputs=())),
    Fault("no sum of the gradient before the feed-forward part", ("block_0_up",), changed("block_0_up", inputs=())),
    Fault("no sum of the gradient before the head", ("head",), changed("head", inputs=())),
    Fault("a bias on each rank, before the sum", ("block_0_down",), changed("block_0_down", epilogue_after_output="")),
    Fault(
        "a bias on each rank, after attention",
        ("block_1_attention/attention_output",),
        changed("block_1_attention/attention_output", epilogue_after_output=""),
    ),
    Fault("a seed of its own on each rank", ("block_0_attention/dropout",), code=seeds_of_own),
    Fault("a sum where all have the whole", ("block_0_up",), changed("block_0_up", inputs=first_input(forward=SUM))),
    Fault(
        "a gradient that is summed and cut",
        ("head",),
        changed("head", output=output(backward=Transition(Partial(), Shard(2)))),
    ),
    Fault(
        "gathered along another dim",
        ("head",),
        changed("head", output=output(forward=Transition(Shard(1), Replicate()))),
        fails=True,
    ),
    Fault("a gradient that is not cut", (), changed("head", output=output(backward=WHOLE)), fails=True),
    Fault(
        "a sum that is dropped",
        ("block_1_attention/attention_output",),
        code=at("block_1_attention/attention_output", Partial, Replicate, dropped),
    ),
    Fault("a sum that is made twice", ("block_0_down",), code=at("block_0_down", Partial, Replicate, doubled)),
    Fault("a mean for a sum", ("block_1_down",), code=at("block_1_down", Partial, Replicate, mean)),
    Fault("a sum on one rank alone", ("block_0_down",), code=at("block_0_down", Partial, Replicate, on_one_rank)),
    Fault(
        "a sum that is read too early",
        ("block_0_attention/attention_output",),
        code=at("block_0_attention/attention_output", Partial, Replicate, late),
    ),
    Fault("a sum that is rounded", ("block_0_down",), code=at("block_0_down", Partial, Replicate, rounded)),
    Fault("a sum that is off by 1e-7", ("block_1_down",), code=at("block_1_down", Partial, Replicate, slightly_off)),
    Fault("a sum with another sign", ("token_embedding",), code=at("token_embedding", Partial, Replicate, negated)),
    Fault(
        "a sum that is shifted by a position", ("block_0_down",), code=at("block_0_down", Partial, Replicate, shifted)
    ),
    Fault("a sum from an earlier call", ("block_1_down",), code=at("block_1_down", Partial, Replicate, stale())),
    Fault(
        "a sum with a number that is none", ("block_1_down",), code=at("block_1_down", Partial, Replicate, not_a_number)
    ),
    Fault("shards in another order", ("head",), code=at("head", Shard, Replicate, other_order)),
    Fault("another rank's part of a gradient", ("head",), code=at("head", Replicate, Shard, wrong_rank)),
    Fault("a gradient's sum that is dropped", ("block_0_up",), code=at("block_0_up", Partial, Replicate, dropped)),
    Fault(
        "a gradient's sum that is made twice",
        ("block_1_attention/query",),
        code=at("block_1_attention/query", Partial, Replicate, doubled),
    ),
    Fault("a gradient's mean for its sum", ("head",), code=at("head", Partial, Replicate, mean)),
    Fault("a gradient's sum on one rank", ("block_1_up",), code=at("block_1_up", Partial, Replicate, on_one_rank)),
    Fault(
        "heads in another order",
        ("block_0_attention/query",),
        code=shards("query", lambda axis: axis.size - 1 - axis.rank),
    ),
    Fault("one shard on all ranks", ("block_0_up",), code=shards("up", lambda axis: 0)),
    Fault(
        "shards of a row-parallel kernel in another order",
        ("block_0_down",),
        code=shards("down", lambda axis: axis.size - 1 - axis.rank),
    ),
    Fault(
        "shards of the head in another order", ("head",), code=shards("head", lambda axis: axis.size - 1 - axis.rank)
    ),
    Fault("gradients of shards that are counted twice", (), code=gradients_of_shards_doubled),
    Fault("rows of the vocabulary that are off by one", ("token_embedding",), code=rows_off_by_one),
    Fault("rows of others that are looked up, too", ("token_embedding",), code=rows_of_others_kept),
    Fault("one part of the mask on all ranks", ("block_0_attention/dropout",), code=masks_of_own),
    Fault("gradients that are not averaged", (), code=gradients_not_averaged, mesh=BATCH_AXIS),
    Fault("gradients that are averaged twice", (), code=gradients_averaged_twice, mesh=BATCH_AXIS),
    Fault("a gradient that is left out of the average", (), code=one_gradient_left_out, mesh=BATCH_AXIS),
    Fault(
        "a share of the stream that is not summed",
        ("block_0_down",),
        code=at("block_0_down", Partial, Shard, own_slice),
        sequence_parallel=True,
    ),
    Fault(
        "the stream gathered in another order",
        ("block_0_up",),
        code=at("block_0_up", Shard, Replicate, other_order),
        sequence_parallel=True,
    ),
    Fault("norms whose gradients are not summed", (), code=no_summands, sequence_parallel=True),
)
