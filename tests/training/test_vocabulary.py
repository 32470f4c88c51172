"""Logits in shards of the vocabulary, from the head into the loss: the same numbers, and no gather."""

from __future__ import annotations

import inspect
import logging.handlers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import keras
import keras_hub
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.models import CASES
from tests.training.test_training import Both, check_equal, variables_of
from tests.workers import Pools, layout_map
from tp_planner.ir.mesh import Mesh
from tp_planner.ir.placement import Replicate, Shard
from tp_planner.ir.plan import Boundary, Transition
from tp_planner.job.process_group import job_axes
from tp_planner.regions.calls import Site, in_a_step_of
from tp_planner.regions.logits import Logits
from tp_planner.storage.log import logger
from tp_planner.training import cross_entropy, vocabulary
from tp_planner.training.model import applied_to
from tp_planner.training.vocabulary import follow_logits

VOCABULARY = 64
UNEVEN = 65  # of what is tested on losses alone
Losses, Metrics = keras.losses, keras.metrics
SPARSE: dict[str, dict[str, Any]] = {
    "plain": {},
    "ignored class": {"ignore_class": 3},
    "sum": {"reduction": "sum"},
    "mean of weights": {"reduction": "mean_with_sample_weight", "ignore_class": 3},
}
if "label_smoothing" in inspect.signature(Losses.sparse_categorical_crossentropy).parameters:  # from Keras 3.16 on
    SPARSE |= {
        "smoothed indices": {"label_smoothing": 0.125},
        "smoothed indices, an ignored class": {"label_smoothing": 0.25, "ignore_class": 3},
    }
DENSE: dict[str, dict[str, Any]] = {"distributions": {}, "smoothed": {"label_smoothing": 0.1}}
METRICS: dict[str, Callable[[], Any]] = {
    "accuracy": lambda: "accuracy",
    "crossentropy": lambda: Metrics.SparseCategoricalCrossentropy(from_logits=True, dtype="float64"),
    "perplexity": lambda: keras_hub.metrics.Perplexity(from_logits=True, mask_token_id=0),
    "top five": lambda: Metrics.SparseTopKCategoricalAccuracy(5),
}


def loss_named(name: str, dtype: str = "float64") -> Losses.Loss:
    if name in SPARSE:
        return Losses.SparseCategoricalCrossentropy(from_logits=True, dtype=dtype, **SPARSE[name])
    return Losses.CategoricalCrossentropy(from_logits=True, dtype=dtype, **DENSE[name])


def targets_for(name: str, shape: tuple[int, ...], rng: np.random.Generator, classes: int = VOCABULARY) -> np.ndarray:
    if name in DENSE:
        return rng.dirichlet(np.ones(classes), shape)
    return rng.integers(0, classes, shape)


@dataclass(frozen=True)
class Way:
    """A model that is trained, with which loss, and how."""

    case: str = "gpt"
    sizes: Mapping[str, Any] = field(default_factory=dict)
    loss: str = "plain"
    dtype: str = "float64"
    sequence_parallel: bool = False
    jit_compile: bool = False


WAYS = {
    "as it is": Way(),
    "computed again on the stream": Way(
        "llama", {"tied": True, "recomputed": True}, "mean of weights", sequence_parallel=True
    ),
    "replayed with dropout on the stream": Way("gpt", {"dropout": 0.2}, "smoothed", "float64", True, True),
    "in bfloat16": Way(dtype="mixed_bfloat16", loss="ignored class"),
    "in unequal parts": Way("llama", {"vocabulary": 65, "tied": True}, "ignored class", sequence_parallel=True),
}
ELSEWHERE = {"as it is", "computed again on the stream", "in bfloat16"}  # which others do as well, and `make sweep`


# On the ranks


@dataclass
class InChunks:
    """While it is entered, losses go through few tokens at a time."""

    def __enter__(self) -> None:
        self._before, cross_entropy.CHUNK_BYTES = cross_entropy.CHUNK_BYTES, 7 * VOCABULARY * 4

    def __exit__(self, *_: object) -> None:
        cross_entropy.CHUNK_BYTES = self._before


def losses_and_metrics(dtype: str) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """Return, of whole logits and of shards: losses of every kind, their gradients, and what metrics make of them."""
    follow_logits()
    axis = job_axes(Mesh((("model", dist.get_world_size()),))).model
    with InChunks():
        return {name: _of_both(name, dtype, axis) for name in [*SPARSE, *DENSE]}


def _of_both(name: str, dtype: str, axis: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    logits, shard, in_shards = _logits(dtype, axis, rng)
    y = torch.as_tensor(targets_for(name, (3, 5), rng, UNEVEN))
    weights, results = torch.as_tensor(rng.uniform(0.5, 1.5, (3, 5))), []
    for given, leaf in ((logits, logits), (in_shards, shard)):
        loss = loss_named(name, dtype)(y, given, weights)
        loss.backward()
        gradient = leaf.grad if leaf is logits else torch.cat([*_of_all(leaf.grad, axis)], 2)
        found = [loss.detach(), gradient]
        sparse = "Sparse" if name in SPARSE else ""
        for kind, options in ((f"{sparse}CategoricalAccuracy", {}), (f"{sparse}TopKCategoricalAccuracy", {"k": 3})):
            metric = getattr(Metrics, kind)(**options)
            metric.update_state(y, given.detach() if given is logits else given, weights)
            found.append(torch.as_tensor(metric.result()))
        assert not getattr(given, "was_gathered", False)
        results.append([each.double().numpy() for each in found])
    return results[0], results[1]


def _logits(dtype: str, axis: Any, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, Logits]:
    """Return logits of 3 x 5 tokens, the same ones' shard of this rank, and what a model returns that has this."""
    whole, last = Replicate(), Shard(2)
    values = np.round(3 * rng.standard_normal((3, 5, UNEVEN)), 1)
    logits = torch.tensor(values, dtype=getattr(torch, dtype), requires_grad=True)
    shard = logits.detach().chunk(axis.size, 2)[axis.rank].clone().requires_grad_()
    boundary = Boundary("x", tuple(logits.shape), dtype, 8, Transition(last, whole), Transition(whole, last), True)
    return logits, shard, Logits(shard, boundary, axis, Site("head", "output"))


def smoothed_indices() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return what torch makes of whole logits and indices with smoothing, and what is made of shards; gradients too."""
    axis, rng = job_axes(Mesh((("model", dist.get_world_size()),))).model, np.random.default_rng(1)
    whole, shard, in_shards = _logits("float64", axis, rng)
    y, weights = torch.as_tensor(rng.integers(0, UNEVEN, (3, 5))), torch.as_tensor(rng.uniform(0.5, 1.5, (3, 5)))
    with InChunks():
        expected = torch.nn.functional.cross_entropy(whole.movedim(2, 1), y, reduction="none", label_smoothing=0.3)
        found = cross_entropy.cross_entropy(in_shards, y, 0.3)
        (expected * weights).sum().backward()
        (found * weights).sum().backward()
    gradient = torch.cat(_of_all(shard.grad, axis), 2)
    return [each.detach().numpy() for each in (expected, whole.grad)], [found.detach().numpy(), gradient.numpy()]


def of_an_unknown_option() -> tuple[bool, list[float]]:
    """Return whether logits are gathered for a loss with an option that no reader knows; it, and Keras's."""
    follow_logits()
    axis, rng = job_axes(Mesh((("model", dist.get_world_size()),))).model, np.random.default_rng(2)
    whole, _, in_shards = _logits("float64", axis, rng)
    y, loss = torch.as_tensor(rng.integers(0, UNEVEN, (3, 5))), loss_named("ignored class")
    knows_less: Any = {Losses.sparse_categorical_crossentropy: lambda y_true, logits, from_logits, axis: 0 * logits}
    with mock.patch.dict(vocabulary._LOSSES, knows_less):
        values = [loss(y, each).item() for each in (in_shards, whole)]
    return in_shards.was_gathered, values


def _of_all(part: torch.Tensor, axis: Any) -> list[torch.Tensor]:
    parts: list[Any] = [None] * axis.size
    dist.all_gather_object(parts, part)
    return parts


def train(way: Way) -> Both:
    """Train with a loss and metrics, in chunks of few tokens; no step may gather logits, as planned."""
    with InChunks():
        results = [_train(way, sharded) for sharded in (False, True)]
    return Both(*results)


def _train(way: Way, sharded: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x, y = CASES[way.case].batch(rng, 4)
    y = targets_for(way.loss, y.shape, rng)
    weights = rng.uniform(0.5, 1.5, y.shape[:2])
    model = CASES[way.case].build(way.dtype, **way.sizes)
    metrics = [each() for each in METRICS.values()] if way.loss in SPARSE else ["accuracy"]
    loss = loss_named(way.loss, "float64" if way.dtype == "float64" else "float32")
    jit_compile = sharded and way.jit_compile  # for a plain model Keras takes torch.compile, which takes a minute
    model.compile(keras.optimizers.AdamW(0.01, epsilon=1e-3), loss, weighted_metrics=metrics, jit_compile=jit_compile)
    if sharded:
        plan = tp_planner.plan(model, layout_map(CASES[way.case].rules), x, sequence_parallel=way.sequence_parallel)
        (head,) = (each for each in plan.layers if each.into_loss)
        assert head.output is not None
        sent = {(each.place, each.phase, each.kind) for each in plan.collectives if each.layer == head.layer}
        assert (f"loss ({head.output.tensor})", "forward", "all_reduce") in sent
        assert (f"output ({head.output.tensor})", "forward", "all_gather") not in sent
        tp_planner.parallelize(model, plan)
    logs, gradients = [], {}
    for step in range(5):
        recorded = sharded and step == 1  # in the first step Keras may call a model once more, to see what it returns
        with tp_planner.record(model) if recorded else torch.enable_grad() as recorder:
            logs.append(model.train_on_batch(x, y, weights))
        if recorded:
            plan.check(recorder.recording)
        if not step:
            gradients = {f"gradient {v.path}": _whole(v.value.grad) for v in model.trainable_variables}
    logs.append(model.test_on_batch(x, y, weights))
    return {
        "logs": np.array(logs),
        "predicted": model.predict(x, verbose=0),
        **gradients,
        **variables_of(model),
    }


def _whole(gradient: torch.Tensor) -> np.ndarray:
    whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return whole.detach().double().numpy().copy()


class OwnStep(keras.Model):
    """Its step computes the loss as Keras does, and reads the logits besides."""

    def train_step(self, data: Any) -> Any:
        x, y, *_ = data
        logits = self(x, training=True)
        self.kept_in_shards = isinstance(logits, Logits)
        self.zero_grad()
        loss = self.compute_loss(y=y, y_pred=logits) + 0.1 * (logits * logits).mean() * self.penalty
        loss.backward()
        self.optimizer.apply([v.value.grad for v in self.trainable_variables], self.trainable_variables)
        return {"loss": loss, "largest": logits.max()}


def own_step(penalty: float) -> Both:
    x, y = CASES["gpt"].batch(np.random.default_rng(0), 4)
    results = []
    for sharded in (False, True):
        inner = CASES["gpt"].build("float64", blocks=1)
        model = OwnStep(inner.inputs, inner.outputs, name="gpt")
        model.penalty = penalty
        model.compile(keras.optimizers.AdamW(0.01, epsilon=1e-3), loss_named("plain"))
        if sharded:
            tp_planner.parallelize(model, layout_map(CASES["gpt"].rules))
        logs = [list(model.train_on_batch(x, y, return_dict=True).values()) for _ in range(2)]
        assert model.kept_in_shards == sharded
        results.append({"logs": np.array(logs)} | variables_of(model))
    return Both(*results)


def unknown_targets() -> list[float]:
    """Return losses of targets that are ignored, or outside of the vocabulary."""
    model = CASES["gpt"].build("float64", blocks=1)
    model.compile("sgd", Losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none"))
    tp_planner.parallelize(model, layout_map(CASES["gpt"].rules))
    x, y = CASES["gpt"].batch(np.random.default_rng(0), 4)
    y = torch.as_tensor(y.astype("int64"))
    y[0, :3] = torch.tensor([-100, VOCABULARY, -1])
    with in_a_step_of(model):
        losses: list[float] = model.loss(y, model(torch.as_tensor(x)))[0, :4].tolist()
    return losses


def of_whole_logits() -> tuple[list[float], list[str]]:
    """Return a metric that no rank can compute of shards, single and sharded, and what was said of it."""
    x, y = CASES["gpt"].batch(np.random.default_rng(0), 4)
    handler, values = logging.handlers.BufferingHandler(100), []
    logger.addHandler(handler)
    for sharded in (False, True):
        model = CASES["gpt"].build("float32", blocks=1)
        model.compile("sgd", loss_named("plain", "float32"), metrics=["accuracy", largest])
        if sharded:
            tp_planner.parallelize(model, layout_map(CASES["gpt"].rules))
        values += [model.test_on_batch(x, y)[2] for _ in range(3)][-1:]
    logger.removeHandler(handler)
    return values, [record.getMessage() for record in handler.buffer if "metric" in record.getMessage()]


def largest(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.max(y_pred, -1)


def under_keras_distribution() -> tuple[bool, Both]:
    """Train alone, and under ``keras.distribution`` as replicas; return whether logits stay in shards, and both."""
    x, y = CASES["gpt"].batch(np.random.default_rng(0), 4)
    results = []
    for shape in (None, (2, dist.get_world_size() // 2)):
        if shape is not None:
            mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), [f"cpu:{n}" for n in range(np.prod(shape))])
            layouts = keras.distribution.LayoutMap(mesh)
            for pattern, axes in CASES["gpt"].rules.items():
                layouts[pattern] = axes
            tp_planner.enable_keras_distribution()
            keras.distribution.set_distribution(
                keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
            )
        model = CASES["gpt"].build("float64", blocks=1)
        model.compile(keras.optimizers.AdamW(0.01, epsilon=1e-3), loss_named("mean of weights"), metrics=["accuracy"])
        history = model.fit(x, y, batch_size=4, epochs=3, verbose=0).history
        results.append({name: np.array(each) for name, each in history.items()} | variables_of(model))
    applied = applied_to(model)
    kept = applied is not None and any(each.into_loss for each in applied.plan.layers)
    keras.distribution.set_distribution(None)
    tp_planner.disable_keras_distribution()
    return kept, Both(*results)


def in_one_run() -> dict[str, Any]:
    """Return all that two processes are asked: what starts processes, or builds models, takes the time here."""
    return {
        "losses": {dtype: losses_and_metrics(dtype) for dtype in ("float64", "float32")},
        "own steps": [own_step(0.0), own_step(1.0)],
        "smoothed indices": smoothed_indices(),
        "unknown option": of_an_unknown_option(),
        "unknown": unknown_targets(),
        "metrics": of_whole_logits(),
    }


# In the parent


def check_losses(found: Mapping[str, Any], tolerance: float) -> None:
    for name, (single, sharded) in found.items():
        smoothed = "label_smoothing" in SPARSE.get(name, {})
        within = 1e-5 if smoothed else tolerance  # Keras smooths indices in float32
        for expected, given in zip(single, sharded, strict=True):
            np.testing.assert_allclose(given, expected, rtol=within, atol=within / 10, err_msg=name)


def test_losses_metrics_and_steps_of_ones_own(pools: Pools) -> None:
    """Losses and metrics of shards are those of whole logits; logits that a step's code reads are whole.

    An ignored target has no loss, an impossible one no number: nobody takes it for a loss.
    """
    ranks = pools(2).run(in_one_run)
    for found in ranks:
        check_losses(found["losses"]["float64"], 1e-12)
        check_losses(found["losses"]["float32"], 1e-5)
        check_losses({"beside torch": found["smoothed indices"]}, 1e-12)
        was_gathered, (given, expected) = found["unknown option"]
        assert was_gathered
        assert given == pytest.approx(expected, rel=1e-12)
        for both in found["own steps"]:
            check_equal(both, 1e-12, floor=1e-3)
        ignored, high, low, known = found["unknown"]
        assert ignored == 0.0
        assert np.isnan([high, low]).all()
        assert known > 0.0
        single, sharded = found["metrics"][0]
        assert single == pytest.approx(sharded, rel=1e-5)
    said = "[ModelParallel] metric 'largest' of model 'gpt' reads whole logits: every rank gathers 0.0 MiB for it in "
    assert [each["metrics"][1] for each in ranks] == [[f"{said}each step"], []]


@pytest.mark.slow
def test_losses_on_four(pools: Pools) -> None:
    for found in pools(4).run(losses_and_metrics, "float64"):
        check_losses(found, 1e-12)


def test_what_a_head_looks_up_is_gathered() -> None:
    """An embedding of another mode than the logits' keeps nothing in shards for the loss."""
    model = CASES["llama"].build()
    model.compile("sgd", CASES["llama"].make_loss())
    mesh = keras.distribution.DeviceMesh((2,), ("model",), ["cpu:0", "cpu:1"])
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["token_embedding/embeddings"] = (None, "model")
    plan = tp_planner.plan(model, layouts)
    assert [(each.layer, each.mode) for each in plan.layers if each.into_loss] == []
    layouts["token_embedding/reverse_embeddings"] = (None, "model")
    plan = tp_planner.plan(model, layouts)
    assert [each.mode for each in plan.layers if each.into_loss] == ["reverse"]


def check_training(pools: Pools, ranks: int, way: Way) -> None:
    tolerance, floor = (1e-12, 1e-2) if way.dtype == "float64" else (5e-2, 1.0)
    for both in pools(ranks).run(train, way):
        for each in ("logs", "predicted"):
            found, expected = both.sharded.pop(each), both.single.pop(each)
            exactly = 1e-6 if way.dtype == "float64" else 0.15
            np.testing.assert_allclose(found, expected, rtol=exactly, atol=exactly, err_msg=each)
        check_equal(both, tolerance, floor)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow) if way in ELSEWHERE else way for way in WAYS]
)
def test_training(pools: Pools, way: str) -> None:
    """Losses, metrics, gradients and five steps of AdamW are those of a single device; the contract is kept."""
    check_training(pools, 2, WAYS[way])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_training_on_four(pools: Pools, way: str) -> None:
    check_training(pools, 4, WAYS[way])


@pytest.mark.slow
def test_replicas_under_keras_distribution(pools: Pools) -> None:
    """Losses of shares, each of logits in shards, add up to that of the whole batch."""
    for kept, both in pools(4).run(under_keras_distribution):
        assert kept
        for name in ("loss", "accuracy"):
            np.testing.assert_allclose(both.sharded.pop(name), both.single.pop(name), rtol=1e-6)
        check_equal(both, 1e-12, floor=1e-2)
