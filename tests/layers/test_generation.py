"""Generation of text by KerasHub's tasks: the tokens of one device, and caches of a rank's own heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tp_planner
from tests.families import EVERY, FAMILIES, LENGTH, VOCABULARY
from tests.family import causal_lm, language_batch
from tests.models import Axes
from tests.workers import Pools, WorkerPool, layout_map
from tp_planner.ir.errors import ParallelRuntimeError
from tp_planner.ir.step import Collective

GENERATING = [name for name, family in EVERY.items() if family.head is causal_lm and family.batch is language_batch]
USUAL = ("gpt2", "llama3")
STOP = 3


def prompts(seed: int = 0) -> dict[str, np.ndarray]:
    """Return two prompts of different lengths."""
    tokens = np.random.default_rng(seed).integers(1, VOCABULARY, (2, LENGTH)).astype("int32")
    mask = np.arange(LENGTH) < np.array([[3], [5]])
    return {"token_ids": tokens * mask, "padding_mask": mask.astype("int32")}


# On the ranks


def generated(model: keras.Model, sampler: Any, stop: Any = None, jit_compile: bool = False) -> np.ndarray:
    model.compile(sampler=sampler, jit_compile=jit_compile)
    if "Gemma3" in type(model).__name__:  # KerasHub's generate needs a preprocessor there
        inputs = {name: torch.from_numpy(array) for name, array in prompts().items()}
        return keras.ops.convert_to_numpy(model.make_generate_function()(inputs, stop)["token_ids"])
    tokens: np.ndarray = model.generate(prompts(), stop_token_ids=stop)["token_ids"]
    return tokens


def _sampler(name: str, seed: int) -> Any:
    match name:
        case "random":
            return keras_hub.samplers.RandomSampler(seed)
        case "top_k":
            return keras_hub.samplers.TopKSampler(9, seed)
    return name


def both(name: str, sampler: str, stop: Any = None, kv_heads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return what one device and all ranks generate, from seeds that differ until they agree."""
    keras.utils.set_random_seed(dist.get_rank())
    model = EVERY[name].build(**({} if kv_heads is None else {"num_key_value_heads": kv_heads}))
    seeds = (0, 0 if name == "gemma3" else dist.get_rank())
    samplers = [_sampler(sampler, seed) for seed in seeds]
    plain = generated(model, samplers[0], stop)
    tp_planner.parallelize(model, EVERY[name].layout(dist.get_world_size()), inputs=prompts())
    return plain, generated(model, samplers[1], stop)


def recorded(name: str) -> tuple[int, list[Collective], list[tuple[int, ...]], list[np.ndarray]]:
    """Return how many tokens were generated, what was communicated for them, and the shapes of the caches."""
    model = FAMILIES[name].build()
    tp_planner.parallelize(model, FAMILIES[name].layout(dist.get_world_size()), inputs=prompts())
    shapes: list[tuple[int, ...]] = []
    call = model.call_with_cache

    def watched(*args: Any) -> Any:
        logits, hidden, cache = call(*args)
        shapes.append(tuple(cache.shape))
        return logits, hidden, cache

    model.call_with_cache = watched
    with tp_planner.record(model) as recorder:
        generated(model, "greedy")
    del model.call_with_cache
    tp_planner.restore(model)
    return len(shapes), list(recorder.recording.collectives), shapes, [generated(model, "greedy")]


def replayed(name: str) -> tuple[np.ndarray, list[np.ndarray], list[int]]:
    """Return what one device and, replayed, all ranks generate, three times, and how often a layer is called."""
    model = FAMILIES[name].build()
    plain = generated(model, "greedy")
    tp_planner.parallelize(model, FAMILIES[name].layout(dist.get_world_size()), inputs=prompts())
    model.compile(sampler="greedy", jit_compile=True)
    called: list[bool] = []
    model.backbone.layers[-1].register_forward_pre_hook(lambda *_: called.append(True))
    found, counts = [], []
    for _ in range(3):
        called.clear()
        found.append(model.generate(prompts(), stop_token_ids=None)["token_ids"])
        counts.append(len(called))
    return plain, found, counts


def continued() -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of one more token after a cache of all heads that is full, on one device and on all ranks."""
    model = FAMILIES["llama3"].build()
    rng = np.random.default_rng(3)
    cache = torch.from_numpy(rng.standard_normal((2, 2, 2, LENGTH, 4, 4)).astype("float32"))
    token = torch.from_numpy(rng.integers(0, VOCABULARY, (2, 1)).astype("int32"))
    with torch.no_grad():
        plain = model.call_with_cache(token, cache, LENGTH - 1)[0].numpy()
        tp_planner.parallelize(model, FAMILIES["llama3"].layout(dist.get_world_size()), inputs=prompts())
        return plain, model.call_with_cache(token, cache, LENGTH - 1)[0].numpy()


def refusals() -> list[str]:
    """Return what is said where ranks have different prompts, and where weights are in parts and replicas may stop."""
    messages = []
    size = dist.get_world_size()
    for shape, axes, options in (
        ((1, size), (None, "model", None), None),
        ((size, 1), ("batch", None, None), (STOP,)),
    ):
        mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), [f"cpu:{rank}" for rank in range(size)])
        layout = keras.distribution.LayoutMap(mesh)
        layout[".*attention/query/kernel"] = axes
        model = FAMILIES["llama3"].build()
        model.compile(sampler="greedy")
        tp_planner.parallelize(model, layout, inputs=prompts(), batch_axis="batch")
        try:
            model.generate(prompts(dist.get_rank()), stop_token_ids=options)
        except ParallelRuntimeError as error:
            messages.append(str(error))
    return messages


def by_layout(rules: Mapping[str, Axes]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return what one device and all ranks generate under a layout of one's own, at last replayed."""
    model = FAMILIES["gpt2"].build()
    plain = generated(model, "greedy")
    tp_planner.parallelize(model, layout_map(rules), inputs=prompts())
    found = [generated(model, "greedy"), generated(model, "greedy", None, True)]
    return plain, [*found, model.generate(prompts(), stop_token_ids=None)["token_ids"]]


def in_parts() -> tuple[np.ndarray, list[np.ndarray]]:
    """Return what one device and replicas with weights in parts generate, at last replayed."""
    model, size = FAMILIES["llama3"].build(), dist.get_world_size()
    plain = generated(model, "greedy")
    mesh = keras.distribution.DeviceMesh((size, 1), ("batch", "model"), [f"cpu:{rank}" for rank in range(size)])
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*self_attention/.*kernel"] = ("batch", None, None)
    layout[".*feedforward_.*kernel"] = ("batch", None)
    tp_planner.parallelize(model, layout, inputs=prompts(), batch_axis="batch")
    found = [generated(model, "greedy"), generated(model, "greedy", None, True)]
    return plain, [*found, model.generate(prompts(), stop_token_ids=None)["token_ids"]]


# In the parent


@pytest.mark.parametrize(
    "name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in GENERATING]
)
def test_generated_tokens_are_those_of_one_device(workers: WorkerPool, name: str) -> None:
    for plain, parallel in workers.run(both, name, "random"):
        np.testing.assert_array_equal(parallel, plain)
        assert len(set(parallel[:, 5:].ravel().tolist())) > 2


@pytest.mark.parametrize(
    ("sampler", "stop"),
    [("top_k", None), pytest.param("beam", None, marks=pytest.mark.slow), ("greedy", (STOP, 5, 7, 11, 13))],
)
def test_ranks_choose_alike(pools: Pools, sampler: str, stop: Any) -> None:
    """With rank 0's seed where a sampler draws, in beams, and where they stop."""
    for plain, parallel in pools(2).run(both, "llama3", sampler, stop):
        np.testing.assert_array_equal(parallel, plain)


@pytest.mark.slow
def test_weights_in_parts_are_put_together_for_each_token(pools: Pools) -> None:
    for plain, found in pools(2).run(in_parts):
        for each in found:
            np.testing.assert_array_equal(each, plain)


@pytest.mark.parametrize("kv_heads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_fewer_heads_of_keys_than_ranks(pools: Pools, kv_heads: int) -> None:
    for plain, parallel in pools(4).run(both, "llama3", "greedy", None, kv_heads):
        np.testing.assert_array_equal(parallel, plain)


def test_each_token_takes_what_a_forward_pass_takes(pools: Pools) -> None:
    """Two all-reduces a block, those of embedding and head, at sites of the plan; caches have a rank's own heads."""
    for tokens, collectives, shapes, after in pools(2).run(recorded, "llama3"):
        assert shapes == [(2, 2, 2, LENGTH, 2, 4)] * tokens
        assert not any(each.cause for each in collectives)
        kinds = Counter((each.kind, each.layer.rpartition("/")[2]) for each in collectives)
        blocks = FAMILIES["llama3"].sizes["num_layers"]
        assert kinds == {
            ("all_reduce", "token_embedding"): tokens,
            ("all_gather", "token_embedding"): tokens,
            ("all_reduce", "attention_output"): blocks * tokens,
            ("all_reduce", "feedforward_output_dense"): blocks * tokens,
        }
        np.testing.assert_array_equal(after[0], generated(FAMILIES["llama3"].build(), "greedy"))


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma", "llama3"))]
)
def test_tokens_are_replayed(pools: Pools, name: str) -> None:
    """After a call for the prompt and one for a token, and one of each that is taped, without the layers' code."""
    for plain, found, counts in pools(2).run(replayed, name):
        for tokens in found:
            np.testing.assert_array_equal(tokens, plain)
        assert counts == [3, 1, 0]


def test_a_full_cache_of_all_heads_is_cut(pools: Pools) -> None:
    for plain, parallel in pools(4).run(continued):
        np.testing.assert_allclose(parallel, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param({".*attention/(query|key|value)/kernel": (None, None, "model")}, marks=pytest.mark.slow),
        pytest.param({".*attention/(query|key|value)/kernel": ("model", None, None)}, marks=pytest.mark.slow),
        pytest.param({".*attention/(query|key)/kernel": (None, "model", None)}, marks=pytest.mark.slow),
        {".*attention/(key|value)/kernel": (None, "model", None), ".*attention/(key|value)/bias": ("model", None)},
        pytest.param({"(.*/)?position_embedding/embeddings": (None, "model")}, marks=pytest.mark.slow),
        pytest.param({"(.*/)?position_embedding/embeddings": ("model", None)}, marks=pytest.mark.slow),
    ],
)
def test_other_layouts_of_attention(pools: Pools, rules: Mapping[str, Axes]) -> None:
    """By head size, by what is contracted, and by the heads of some: their keys are put together before the cache."""
    for plain, found in pools(2).run(by_layout, rules):
        for tokens in found:
            np.testing.assert_array_equal(tokens, plain)


def test_what_would_be_wrong_is_refused(pools: Pools) -> None:
    for messages in pools(2).run(refusals):
        assert messages == [
            "ranks 0 and 1 were given different prompts; give all ranks of a replica the same",
            "replicas of model 'llama3_lm' put their weights together for each token, and have to generate equally "
            "many: give generate stop_token_ids=None",
        ]
